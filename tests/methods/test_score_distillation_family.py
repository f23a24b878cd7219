"""One fact for the whole family: with exact scores the expected gradient is zero at the truth and points towards it from elsewhere.

The data are N(mu, s^2 I) in the plane, the student is x = m + theta z, and the fake score is the student's own, in closed form. What is
asked for is the gradient of each method's loss, through its own turn, at m and theta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distillbench.api import Batch, Conditions, Context, Method, external
from distillbench.data.mixture import Mixture, exact_denoiser
from distillbench.diffusion import Denoiser
from distillbench.diffusion.schedules import Flow
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.randomness import generator_for
from distillbench_methods.diff_instruct import DiffInstruct
from distillbench_methods.disback import DisBack
from distillbench_methods.dmd import DMD
from distillbench_methods.dmd2 import DMD2
from distillbench_methods.f_distill import FDistill
from distillbench_methods.sid import SiD

MU, S = torch.tensor([0.4, -0.3], dtype=torch.float64), 0.8
N = 16_384


class Nothing:
    """A source of one empty condition."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise AssertionError("data was drawn")

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return Conditions({"label": torch.zeros(n, dtype=torch.long)}, {"label": torch.tensor(1)})


def gaussian(mean: Tensor, deviation: float) -> Mixture:
    return Mixture(
        mean.view(1, 1, 2), (deviation**2 * torch.eye(2, dtype=torch.float64)).view(1, 1, 2, 2), torch.ones(1, 1, dtype=torch.float64)
    )


def log_density(mean: Tensor, deviation: float, x_t: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = Flow().levels(t)
    variance = (alpha * deviation) ** 2 + sigma**2
    return -(x_t - alpha[:, None] * mean).square().sum(1) / (2 * variance) - (2 * math.pi * variance).log()


def built(method: Method) -> Any:
    network = MLP(MLPConfig(width=8, depth=2), torch.Generator().manual_seed(0))
    method.build(Context(teacher=external(Denoiser(network, Flow(), "velocity")), shape=(2,), steps=(1,)))
    return method


def by_turn(name: str) -> Callable[[Any, Batch], Tensor]:
    return lambda method, batch: sum(getattr(method, name)(batch).values())


def f_distill(divergence: str) -> Any:
    return built(FDistill(FDistill.Config(divergence=divergence, lambda_gan=0.0)))


FAMILY: dict[str, tuple[Callable[[], Any], Callable[[Any, Batch], Tensor]]] = {
    "dmd": (lambda: built(DMD(DMD.Config(lambda_reg=0.0, fake_per_gen=2))), by_turn("student_turn")),
    "dmd2": (lambda: built(DMD2(DMD2.Config(gan=False))), lambda method, batch: sum(method.generator_loss(False, batch).values())),
    "diff_instruct": (lambda: built(DiffInstruct()), by_turn("student_turn")),
    "disback": (lambda: built(DisBack()), by_turn("student_turn")),
    "sid": (lambda: built(SiD(SiD.Config(alpha=1.0))), by_turn("student_turn")),
    **{
        f"f_distill {name}": (lambda name=name: f_distill(name), lambda method, batch: method.generator_loss(True, batch)["matching"])
        for name in ("rkl", "sf", "js", "sh", "kl", "jf")
    },
}


def gradient(name: str, mean: Tensor, deviation: float) -> tuple[Tensor, float]:
    """Of the expected loss at m (2,) and theta."""
    make, loss = FAMILY[name]
    method = make()
    method.teacher = exact_denoiser(gaussian(MU, S), Flow())
    method.fake = exact_denoiser(gaussian(mean, deviation), Flow())
    m, theta = mean.clone().requires_grad_(), torch.tensor(deviation, dtype=torch.float64, requires_grad=True)

    def generate(batch: Batch) -> tuple[Tensor, Conditions]:
        z = batch.randn(batch.size // 2, 2).double()
        return m + theta * torch.cat([z, -z]), batch.conditions()

    method.generate = generate
    if name.startswith("f_distill"):  # the exact ratio in the place of the critic's
        plain = method.scores

        def scores(x_t: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> tuple:
            real, fake, _ = plain(x_t, t, conditions, critic=False, graph=False)
            ratio = log_density(MU, S, x_t.detach(), t) - log_density(mean, deviation, x_t.detach(), t)
            return real, fake, ratio[:, None]

        method.scores = scores
    batch = Batch(size=N, count=0, progress=0.0, source=Nothing(), generator=generator_for(0, "family", 0))
    loss(method, batch).backward()
    return m.grad, theta.grad.item()


@pytest.mark.parametrize("name", FAMILY)
def test_the_gradient_vanishes_at_the_truth(name: str) -> None:
    of_mean, of_deviation = gradient(name, MU, S)
    away, _ = gradient(name, MU + 0.5, S)
    assert of_mean.abs().max() < 1e-9 * away.abs().max()
    assert abs(of_deviation) < 1e-9 * away.abs().max()


@pytest.mark.parametrize("shift", [(0.3, 0.0), (0.0, -0.7), (-0.5, 0.5)])
@pytest.mark.parametrize("name", FAMILY)
def test_a_displaced_student_is_led_back(name: str, shift: tuple[float, float]) -> None:
    away = torch.tensor(shift, dtype=torch.float64)
    of_mean, _ = gradient(name, MU + away, S)
    cosine = (of_mean @ away / of_mean.norm() / away.norm()).item()
    assert cosine > 0.98  # 1 in expectation: the problem is symmetric about the shift


@pytest.mark.parametrize("deviation", [0.5, 0.7, 0.95, 1.3])
@pytest.mark.parametrize("name", FAMILY)
def test_a_student_too_narrow_widens_and_one_too_wide_narrows(name: str, deviation: float) -> None:
    _, of_deviation = gradient(name, MU, deviation)
    assert math.copysign(1.0, of_deviation) == math.copysign(1.0, deviation - S)
