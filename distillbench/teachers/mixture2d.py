"""The teacher of `mixture2d`: a small MLP regressed on the exact velocity of the mixture, so that its own error is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conditions import Conditions
from ..data.mixture import Mixture, exact_denoiser, standard_mixture
from ..diffusion import Denoiser, Flow, ddim, time_grid
from ..metrics.mixture import class_accuracy, in_mode_rate
from ..metrics.wasserstein import sliced_w2
from ..networks import MLP, MLPConfig
from ..randomness import generator_for
from .files import save_teacher

SCHEDULE = Flow()
CONFIG = MLPConfig(
    dimension=2, width=128, depth=3, classes=8, frequencies=8, highest_frequency=10.0, x_frequencies=3, highest_x_frequency=6.0
)
STEPS = 12_000
BATCH = 1024
UNCONDITIONAL = 0.1  # share of a batch without its label
LEARNING_RATE = 1e-2
EARLIEST = 0.004  # smallest time trained on; below it x is clean to 0.4 % of its scale

TIME_BINS = (EARLIEST, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
ERROR_SAMPLES = 131_072
SCORED_STEPS = (1, 2, 4, 8, 50)
SCORED_PER_CLASS = 1024


def train(folder: Path, progress: Callable[[str], None], *, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """Fit the teacher, write it and its card into `folder`, return the card.

    On one thread, whatever is set, because the number of threads changes the last digits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        mixture = standard_mixture()
        denoiser = Denoiser(_fit(mixture, progress, steps, seed), SCHEDULE, "velocity")
        seconds = time.process_time() - began
        progress("scoring")
        card = {
            "name": "mixture2d",
            "title": "MLP fitted to the exact velocity of the mixture of mixture2d@1, by class and without",
            "source": "made by this repository; the data are drawn from a formula (distillbench/data/mixture.py)",
            "licence": "Apache-2.0",
            "recipe": "distillbench zoo train mixture2d" + (f" with steps={steps}, seed={seed}" if (steps, seed) != (STEPS, 0) else ""),
            "training": f"{steps} steps of {BATCH}, Adam, learning rate {LEARNING_RATE} with cosine decay, exponential average of weights",
            "seed": seed,
            "steps": steps,
            "processor seconds": round(seconds, 1),
            "threads": 1,
            "relative velocity error": velocity_errors(denoiser, mixture),
            "scores": own_scores(denoiser, mixture),
        }
        return save_teacher(denoiser, folder, card)
    finally:
        torch.set_num_threads(threads)


def _fit(mixture: Mixture, progress: Callable[[str], None], steps: int, seed: int) -> MLP:
    """Least squares on E[velocity | x_t], which has no noise: the only error left is the network's own."""
    network = MLP(CONFIG, generator_for(seed, "teacher/weights", 0))
    average = network.copy()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), foreach=True)
    generator = generator_for(seed, "teacher/batches", 0)
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, t, conditions, velocity = training_batch(mixture, BATCH, generator)
        loss = (network(x.float(), t.float(), conditions).prediction - velocity.float()).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            keep = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)
        total += loss.item()
        if (step + 1) % 1000 == 0:
            progress(f"step {step + 1}/{steps}: squared velocity error {total / 1000:.5f}")
            total = 0.0
    return average.eval()


def training_batch(mixture: Mixture, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Conditions, Tensor]:
    """Noised samples x (n, 2), times (n,), conditions and the exact velocity (n, 2), in float64.

    Half of the times are uniform, half are squares of uniform ones: the field is sharpest near the data, where the modes part.
    """
    x0, conditions = mixture.sample(n, generator)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    t = torch.where(torch.arange(n) % 2 == 0, u, u**2).clamp(min=EARLIEST)
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x = SCHEDULE.alpha(t)[:, None] * x0 + SCHEDULE.sigma(t)[:, None] * noise
    free = round(UNCONDITIONAL * n)
    conditions = conditions.dropped(torch.arange(n) < free)
    parts = (slice(0, free), slice(free, n))  # apart, because labelled points need an eighth of the modes
    velocity = torch.cat([exact_velocity(mixture, x[part], t[part], conditions[part]) for part in parts])
    return x, t, conditions, velocity


def exact_velocity(mixture: Mixture, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """E[d x_t / d t | x_t] on the teacher's path: x (n, 2) and t (n,) > 0 in float64 -> (n, 2)."""
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x0 = mixture.posterior_mean(x, alpha, sigma, conditions.field("label"))
    eps = (x - alpha[:, None] * x0) / sigma[:, None]
    return SCHEDULE.d_alpha(t)[:, None] * x0 + SCHEDULE.d_sigma(t)[:, None] * eps


@torch.no_grad()
def velocity_errors(denoiser: Denoiser, mixture: Mixture) -> dict[str, float]:
    """Root mean square error of the velocity over that of the velocity itself, on fresh noised samples: by time, and by label.

    A few points between modes carry much of it, so it takes many samples to be known to a tenth.
    """
    x, t, conditions, velocity = training_batch(mixture, ERROR_SAMPLES, generator_for(0, "teacher/errors", 0))
    error = (denoiser.velocity(x.float(), t, conditions) - velocity).square().sum(1)
    size = velocity.square().sum(1)
    parts = {f"t {low} to {high}": (t >= low) & (t < high) for low, high in pairwise(TIME_BINS)}
    parts["without label"] = conditions.field("label") == mixture.classes
    parts["with label"] = ~parts["without label"]
    return {name: round(math.sqrt(error[part].sum() / size[part].sum()), 4) for name, part in parts.items()}


@torch.no_grad()
def own_scores(denoiser: Denoiser, mixture: Mixture) -> dict[str, dict[str, float]]:
    """In-mode rate, sliced W2 to a fresh sample of the truth and class accuracy: of the truth, of 50 DDIM steps of the exact
    denoiser, and of the teacher at several numbers of steps, all from the same conditions and noise."""
    labels = torch.arange(mixture.classes * SCORED_PER_CLASS) % mixture.classes
    conditions = mixture.conditions(labels)
    truth, reference = (mixture.sample(len(labels), generator_for(0, "teacher/truth", i), labels)[0] for i in range(2))
    noise = torch.randn(len(labels), 2, generator=generator_for(0, "teacher/noise", 0))
    exact = exact_denoiser(mixture, SCHEDULE)
    samples = {"truth": truth, "exact denoiser, 50 steps": ddim(exact, noise, conditions, time_grid(SCHEDULE, 50))}
    for steps in SCORED_STEPS:
        samples[f"{steps} steps"] = ddim(denoiser, noise, conditions, time_grid(SCHEDULE, steps))
    parameters = (mixture.means, mixture.covariances, mixture.weights)
    return {
        name: {
            "in-mode": round(in_mode_rate(x, labels, *parameters), 4),
            "sliced-w2": round(sliced_w2(x, reference, projections=64, seed=0), 4),
            "class-acc": round(class_accuracy(x, labels, *parameters), 4),
        }
        for name, x in samples.items()
    }
