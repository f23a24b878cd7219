"""What DMD claims of its terms, in float64 on two narrow modes of a line: scores are exact, the fake score too, and the student is a table.

The table has a value for each of 32 cells of z, equally likely. Its samples are its values, so its exact fake score is that of points,
and the teacher's map from noise to samples is the monotone one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from distillbench.api import Batch, Conditions
from distillbench.diffusion import Denoiser, heun, time_grid
from distillbench.diffusion.schedules import Flow
from distillbench.networks.backbone import Output
from distillbench.parts.pairs import PairStore
from distillbench.randomness import generator_for
from distillbench_methods.dmd import DMD

N, STEPS, RATE = 32, 150, 0.04
DEVIATION = 0.1
APART = 0.4  # up to this noise level the modes at -1 and 1 hardly meet
RANKS = (torch.arange(N, dtype=torch.float64) + 0.5) / N
Z = Normal(0.0, 1.0).icdf(RANKS)[:, None]  # the middles of the cells
EDGES = Normal(0.0, 1.0).icdf(torch.arange(1, N, dtype=torch.float64) / N)
MODES = torch.tensor([-1.0, 1.0], dtype=torch.float64)


class NoData:
    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return Conditions.none(n)

    def draw(self, n: int, generator: torch.Generator) -> Any:
        raise AssertionError("drew data")


class Equal(nn.Module):
    """The posterior mean under equally likely normals of one deviation around `means`, on flow."""

    def __init__(self, means: Tensor, deviation: float):
        super().__init__()
        self.means, self.variance = means, deviation**2

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Output:
        alpha, sigma = 1 - t[:, None], t[:, None]
        noised = alpha**2 * self.variance + sigma**2
        off = x - alpha * self.means
        share = (-off.square() / (2 * noised)).softmax(1)
        return Output((share * (self.means + alpha * self.variance / noised * off)).sum(1, keepdim=True))


class Table(nn.Module):
    def __init__(self, values: Tensor):
        super().__init__()
        self.values = nn.Parameter(values.clone())

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Output:
        return Output(self.values[torch.searchsorted(EDGES, x[:, 0].contiguous())])


class Batch64(Batch):
    """Noise in float64."""

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def target() -> Tensor:
    """What the teacher's ODE makes of the cells' middles: of the lower half the left mode, of the upper half the right one."""
    inner = Normal(0.0, 1.0).icdf((2 * RANKS) % 1)[:, None]
    return MODES[(RANKS > 0.5).long()][:, None] + DEVIATION * inner


def made(start: Tensor, *, exact_fake: bool = True, **knobs: Any) -> DMD:
    """A method on exact scores, as `build` would leave it."""
    method = DMD(DMD.Config(pair_share=0.0, **knobs))
    table = Table(start)
    method.grid, method.shape, method.scale, method.tap = (1.0,), (1,), 1.0, ""
    method.teacher = Denoiser(Equal(MODES, DEVIATION), Flow(), "x0")
    method.student = Denoiser(table, Flow(), "x0")
    method.fake = Denoiser(Equal(table.values[:, 0], 1e-3), Flow(), "x0") if exact_fake else None
    method.pairs = PairStore(None)
    method.pairs.append(Z, target(), Conditions.none(N))
    return method


def batch(count: int) -> Batch64:
    return Batch64(size=64, count=count, progress=0.0, source=NoData(), generator=generator_for(0, "t", count))


def trained(method: DMD) -> Tensor:
    """The samples after STEPS updates of the student; the fake score is exact all along."""
    values = method.student.network.values
    optimizer = torch.optim.Adam([values], lr=RATE)
    for count in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - count / STEPS)
        optimizer.zero_grad()
        sum(method.student_turn(batch(count)).values()).backward()
        optimizer.step()
    return values.detach()


def right(x: Tensor) -> float:
    """The mass of the right mode."""
    return (x > 0).double().mean().item()


def width(x: Tensor) -> float:
    """Root mean square distance from the nearest mode, without the quarter that is farthest."""
    return (x.abs() - 1).abs()[:, 0].sort().values[: 3 * N // 4].square().mean().sqrt().item()


def test_the_teachers_ode_is_the_map_that_the_pairs_hold() -> None:
    method = made(target())
    y = heun(method.teacher, Z, Conditions.none(N), time_grid(Flow(), 400))
    torch.testing.assert_close(y, target(), rtol=0, atol=0.02)


def test_a_student_that_is_the_teachers_map_has_no_regression_loss() -> None:
    drawn = batch(0)
    assert made(target()).regression(drawn).item() == 0
    assert made(-target()).regression(drawn).item() > 0.1


def test_the_regression_preserves_modes_that_matching_alone_never_finds() -> None:
    """From a start on one mode, at noise levels that see the modes apart."""
    start = 1 + DEVIATION * Z
    assert right(trained(made(start, lambda_reg=0.0, t_max=APART))) == 1
    assert abs(right(trained(made(start, lambda_reg=1.0, t_max=APART))) - 0.5) < 0.1


def test_noise_levels_that_join_the_modes_let_matching_find_both_if_the_fake_score_is_exact() -> None:
    assert abs(right(trained(made(1 + DEVIATION * Z, lambda_reg=0.0))) - 0.5) < 0.1


def test_the_real_score_alone_collapses_onto_the_centres_and_the_full_gradient_does_not() -> None:
    full = trained(made(target(), lambda_reg=0.0, t_max=APART))
    collapsed = trained(made(target(), exact_fake=False, fake="none", lambda_reg=0.0, t_max=APART))
    assert right(full) == right(collapsed) == 0.5
    assert width(full) == pytest.approx(width(target()), rel=0.25)
    assert width(collapsed) < 0.2 * width(target())
