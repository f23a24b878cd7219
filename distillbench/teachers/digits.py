"""The teacher of `digits`: a class-conditional flow transformer, trained on the 4,000 training images.

Flow matching on x_t = (1 - t) x_0 + t eps with the velocity eps - x_0 as target; a tenth of the labels dropped, so that it can be guided.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..conditions import Conditions
from ..data.digits import SHAPE, DigitSet, digits_sha256, label_conditions, load_digits
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import Flow
from ..diffusion.solvers import euler, time_grid
from ..errors import BadFileError
from ..metrics.arrays import as_float64
from ..metrics.digits import evaluation_labels, evaluation_seeds, see, values
from ..networks import Backbone, Transformer, TransformerConfig
from ..networks.files import sha256_file
from ..randomness import generator_for, sample_noise
from .cards import read_card
from .digits_classifier import classifier_sha256
from .files import save_teacher

SCHEDULE = Flow()
CONFIG = TransformerConfig(channels=1, size=28, patch=7, width=88, depth=4, heads=4, classes=10)
STEPS = 16_000
BATCH = 64
UNCONDITIONAL = 0.1  # share of the labels that are dropped
LEARNING_RATE = 3e-3
REFERENCE = "reference.safetensors"
REFERENCE_STEPS = 50
REFERENCE_SEEDS = range(2_000_000, 2_002_000)  # apart from those that are scored, so that the teacher's own row is no copy
SHIFT = 1  # pixels by which training images are moved, at most, along each axis


def train(folder: Path, progress: Callable[[str], None], *, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """Train the teacher, write network, features of its own samples and card.json into `folder`; returns the card.

    One thread: threads change the last digits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        network = _fit(load_digits("train"), progress, steps, seed)
        return finish(network, folder, {"steps": steps, "seed": seed, "cpu_seconds": round(time.process_time() - began)})
    finally:
        torch.set_num_threads(threads)


def finish(network: Backbone, folder: Path, cost: dict[str, Any]) -> dict[str, Any]:
    """Sample the trained teacher for its card and for the track's fidelity scores, and write all files."""
    denoiser = Denoiser(network, SCHEDULE, "velocity")
    labels = evaluation_labels()
    own = see(sample(denoiser, labels, REFERENCE_SEEDS, REFERENCE_STEPS), labels).features
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"features": torch.from_numpy(own).float()}, folder / REFERENCE)
    own = as_float64(load_file(folder / REFERENCE)["features"])
    scores = {
        str(n): {name: round(value, 4) for name, value in values(see(sample(denoiser, labels, evaluation_seeds(), n), labels), own).items()}
        for n in (1, 2, 4, 8, 50)
    }
    card = {
        "name": "digits",
        "what": "class-conditional flow transformer, velocity prediction, 28x28 digits in [-1, 1]",
        "recipe": "distillbench zoo train digits",
        "training": f"AdamW {LEARNING_RATE:g}, cosine to 0, batch {BATCH}, EMA 0.999, labels dropped {UNCONDITIONAL:g}, "
        f"times half uniform and half logit-normal, images shifted by at most {SHIFT} pixel",
        "cost": {**cost, "threads": 1},
        "data": {"digits": digits_sha256(), "split": "train"},
        "licence": "Apache-2.0; trained on MNIST",
        "reference": {
            "file": REFERENCE,
            "what": f"classifier features of its own samples, euler, {REFERENCE_STEPS} steps",
            "seeds": f"{REFERENCE_SEEDS[0]}..{REFERENCE_SEEDS[-1]}",
            "classifier": classifier_sha256(),
            "sha256": sha256_file(folder / REFERENCE),
        },
        "held_out_loss": round(held_out_loss(network), 4),
        "scores": {"by": "evaluations, euler, no guidance, 2,000 samples", **scores},
    }
    return save_teacher(denoiser, folder, card)


@torch.no_grad()
def sample(denoiser: Denoiser, labels: Tensor, seeds: Sequence[int], steps: int) -> Tensor:
    """Samples (n, 1, 28, 28) of the flow by Euler's method, without guidance."""
    grid = time_grid(denoiser.path, steps)
    parts = zip(sample_noise(seeds, SHAPE).split(250), labels.split(250), strict=True)
    return torch.cat([euler(denoiser, noise, label_conditions(some), grid) for noise, some in parts])


@cache
def reference_features(folder: Path) -> Tensor:
    """Features (2000, 64) of the shipped teacher's own samples. Raises BadFileError if the file is not what the card states."""
    path = folder / REFERENCE
    if not path.is_file() or sha256_file(path) != reference_sha256(folder):
        raise BadFileError(f"{path}: missing or not what the teacher's card states; install distillbench again")
    return load_file(path)["features"]


def reference_sha256(folder: Path) -> str:
    """The checksum of those features that the teacher's card states."""
    card = read_card(folder)
    try:
        return str(card["reference"]["sha256"])
    except (KeyError, TypeError):
        raise BadFileError(f"{folder}: the teacher's card names no reference features; make the teacher again with `zoo train`") from None


def _fit(digits: DigitSet, progress: Callable[[str], None], steps: int, seed: int) -> Backbone:
    network = Transformer(CONFIG, generator_for(seed, "teacher/weights", 0))
    average = network.copy()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    generator = generator_for(seed, "teacher/batches", 0)
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, t, conditions, velocity = training_batch(digits, BATCH, generator)
        loss = F.mse_loss(network(x, t, conditions).prediction, velocity)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.999, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - keep)
        total += loss.item()
        if (step + 1) % 500 == 0:
            progress(f"step {step + 1}/{steps}: loss {total / 500:.4f}, on held-out images {held_out_loss(average):.4f}")
            total = 0.0
    return average.eval()


def training_batch(digits: DigitSet, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Conditions, Tensor]:
    """Noised images x (n, 1, 28, 28), times (n,), conditions and velocities (n, 1, 28, 28), in float32."""
    picked = torch.randint(len(digits), (n,), generator=generator)
    x0 = shifted(digits.images[picked], generator)
    conditions = label_conditions(digits.labels[picked]).dropped(torch.rand(n, generator=generator) < UNCONDITIONAL)
    t = times(n, generator)
    noise = torch.randn(x0.shape, generator=generator)
    at = t[:, None, None, None]
    return (1 - at) * x0 + at * noise, t, conditions, noise - x0


def times(n: int, generator: torch.Generator) -> Tensor:
    """Half logit-normal, where the field is hardest to learn; half uniform, so that the ends are not left out."""
    normal = torch.randn(n, generator=generator).sigmoid()
    uniform = torch.rand(n, generator=generator)
    return torch.where(torch.arange(n) % 2 == 0, normal, uniform)


def shifted(x: Tensor, generator: torch.Generator, most: int = SHIFT) -> Tensor:
    """Images (n, 1, 28, 28) moved by a random whole number of pixels along each axis; paper (-1) moves in."""
    padded = F.pad(x[:, 0], (most,) * 4, value=-1.0)
    offset = torch.randint(2 * most + 1, (2, len(x), 1), generator=generator) + torch.arange(x.shape[-1])
    rows, columns = offset[0][:, :, None], offset[1][:, None, :]
    return padded[torch.arange(len(x))[:, None, None], rows, columns].unsqueeze(1)


@torch.no_grad()
def held_out_loss(network: Backbone) -> float:
    """The flow-matching loss on the held-out images at evenly spread times, fixed noise: rises when training images are learnt by heart."""
    digits = load_digits("held-out")
    noise = torch.randn(digits.images.shape, generator=generator_for(0, "teacher/held-out", 0))
    order = torch.randperm(len(digits), generator=generator_for(0, "teacher/held-out", 1))
    t = (order + 0.5) / len(digits)
    at = t[:, None, None, None]
    x = (1 - at) * digits.images + at * noise
    return F.mse_loss(network(x, t, label_conditions(digits.labels)).prediction, noise - digits.images).item()
