"""Backward simulation against the exact laws for a Gaussian: means and variances without sampling error.

All maps are affine in the noises, so feeding unit vectors gives their coefficients; the variance is the sum of squares.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distillbench.conditions import Conditions
from distillbench.diffusion import Denoiser, broadcast
from distillbench.diffusion.base import Schedule
from distillbench.diffusion.schedules import EDM, Flow, Trig, VPTable
from distillbench.errors import UsageError
from distillbench.networks.backbone import Output
from distillbench.parts.simulation import simulated_input, step_grid, step_list

MEAN, VARIANCE = 0.4, 0.3
ROWS = 6


class GaussianStudent(nn.Module):
    """x0 from x_t of N(MEAN, VARIANCE): the exact consistency map, or the posterior mean."""

    def __init__(self, schedule: Schedule, consistent: bool):
        super().__init__()
        self.schedule, self.consistent = schedule, consistent
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t, conditions, *, second_time=None, guidance=None, taps=(), stop=False):
        alpha, sigma = (broadcast(f(t.double()), x) for f in (self.schedule.alpha, self.schedule.sigma))
        variance = alpha**2 * VARIANCE + sigma**2
        slope = (VARIANCE / variance) ** 0.5 if self.consistent else alpha * VARIANCE / variance
        return Output(MEAN + self.shift + slope * (x - alpha * MEAN))


def law(schedule: Schedule, k: int, grid: tuple[float, ...], consistent: bool) -> tuple[float, float]:
    """Mean and variance of the input of step k."""
    student = Denoiser(GaussianStudent(schedule, consistent), schedule, "x0")

    def noise(i: int) -> Tensor:
        draws = torch.zeros(ROWS, 1, dtype=torch.float64)
        draws[i + 1] = 1.0
        return draws

    x = simulated_input(student, grid, k, Conditions.none(ROWS), noise)
    assert not x.requires_grad
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


@pytest.mark.parametrize("schedule", [Flow(), Trig()], ids=lambda s: s.name)
@pytest.mark.parametrize("k", range(4))
def test_under_the_exact_consistency_map_every_input_has_the_noised_law(schedule: Schedule, k: int) -> None:
    grid = step_grid(4)
    mean, variance = law(schedule, k, grid, consistent=True)
    alpha, sigma = float(schedule.alpha(grid[k])), float(schedule.sigma(grid[k]))
    assert mean == pytest.approx(alpha * MEAN, abs=1e-12)
    assert variance == pytest.approx(alpha**2 * VARIANCE + sigma**2, rel=1e-12)


def test_under_the_posterior_mean_the_inputs_are_too_narrow_by_a_known_amount() -> None:
    grid, expected = (0.9, 0.7, 0.5, 0.25), 0.9**2
    for k, t in enumerate(grid):
        alpha, sigma = 1 - t, t
        if k > 0:
            before = 1 - grid[k - 1]
            slope = before * VARIANCE / (before**2 * VARIANCE + grid[k - 1] ** 2)
            expected = alpha**2 * slope**2 * expected + sigma**2
        _, variance = law(Flow(), k, grid, consistent=False)
        assert variance == pytest.approx(expected, rel=1e-12)
    assert variance < alpha**2 * VARIANCE + sigma**2  # what noised real data (forward simulation) would have


@pytest.mark.parametrize("schedule", [Flow(), EDM()], ids=lambda s: s.name)
def test_the_first_input_is_pure_noise(schedule: Schedule) -> None:
    mean, variance = law(schedule, 0, step_grid(2), consistent=True)
    assert mean == 0
    assert variance == pytest.approx(float(schedule.sigma(1.0)) ** 2)


def test_step_lists() -> None:
    assert step_list(1000, 4) == [999, 749, 499, 249]
    assert step_list(1000, 1) == [999]
    assert step_list(1000, 3) == [999, 666, 333]
    assert step_grid(4) == (1.0, 0.75, 0.5, 0.25)
    assert step_grid(4) == tuple((i + 1) / 1000 for i in step_list(1000, 4))
    for wrong in (lambda: step_list(10, 0), lambda: step_list(3, 4), lambda: step_grid(0)):
        with pytest.raises(UsageError):
            wrong()


def test_a_shifted_grid_is_that_of_the_shifted_flow() -> None:
    assert step_grid(4, 3.0) == pytest.approx([float(Flow(shift=3.0).sigma(t)) for t in step_grid(4)])
    assert step_grid(4, 3.0)[0] == 1.0


def test_the_grid_of_a_table_names_its_own_levels() -> None:
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    table = torch.cumprod(1 - betas, 0)
    path = VPTable(tuple(table.tolist()))
    for index, t in zip(step_list(1000, 4), step_grid(4), strict=True):
        assert float(path.alpha(t)) ** 2 == pytest.approx(table[index].item(), rel=1e-9)
