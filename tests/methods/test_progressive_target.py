"""Progressive distillation's target, loss weights and step counts against closed forms, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Conditions
from distillbench.diffusion import EDM, Denoiser, Flow, Schedule, Trig, broadcast, ddim, jump, time_grid
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench_methods.progressive import interval_times, loss_weight, one_step_target, shares, step_counts

HALF_PI = math.pi / 2


class Gaussian(nn.Module):
    """The exact x0 of N(mean, spread^2); spread 0 is one point."""

    def __init__(self, schedule: Schedule, mean: float = 0.0, spread: float = 1.0):
        super().__init__()
        self.schedule, self.mean, self.spread = schedule, mean, spread

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> SimpleNamespace:
        alpha, sigma = (broadcast(level, x) for level in self.schedule.levels(t))
        gain = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        return SimpleNamespace(prediction=self.mean + gain * (x - alpha * self.mean), features={}, log_variance=None)


def exact(path: Schedule | None = None, mean: float = 0.0, spread: float = 1.0) -> Denoiser:
    path = path or Trig()
    return Denoiser(Gaussian(path, mean, spread), path, "x0")


def numbers(*values: float) -> Tensor:
    return torch.tensor([[value] for value in values], dtype=torch.float64)


def random_teacher(path: Schedule) -> Denoiser:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9)).double()
    return Denoiser(network, Flow(), "velocity", path=path)


@pytest.mark.parametrize(("steps", "value"), [(1, 0.0), (2, 0.5), (4, 0.728553), (8, 0.856232), (1024, 0.998796)])
def test_a_ddim_step_of_angle_d_on_normal_data_shrinks_by_cos_d(steps: int, value: float) -> None:
    end = ddim(exact(), numbers(1.0), Conditions.none(1), time_grid(Trig(), steps)).item()
    assert end == pytest.approx(value, abs=5e-7)
    assert end == pytest.approx(math.cos(HALF_PI / steps) ** steps, abs=1e-12)


def test_two_teacher_steps_on_normal_data_imply_the_known_x0_and_v() -> None:
    times = torch.tensor([[0.9], [0.8], [0.7]], dtype=torch.float64) / HALF_PI
    z = numbers(0.7)
    x0 = one_step_target(exact(), z, times, Conditions.none(1)).item()
    eps = (0.7 - math.cos(0.9) * x0) / math.sin(0.9)
    v = math.cos(0.9) * eps - math.sin(0.9) * x0
    assert x0 == pytest.approx(0.46263517, abs=5e-9)
    assert x0 == pytest.approx((math.cos(0.9) + math.sin(0.9) * math.tan(0.1) / 2) * 0.7, abs=1e-14)
    assert v == pytest.approx(-0.03511714, abs=5e-9)


class Learnt(nn.Module):
    """x0 = g(t) z: a student that has converged on its grid, and knows nothing elsewhere."""

    def __init__(self, gains: dict[float, float]):
        super().__init__()
        self.gains = gains

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> SimpleNamespace:
        gain = torch.tensor([self.gains.get(value, math.nan) for value in t.tolist()], dtype=x.dtype)
        return SimpleNamespace(prediction=broadcast(gain, x) * x, features={}, log_variance=None)


@pytest.mark.parametrize("factor", [2, 4])
def test_exact_halvings_keep_the_endpoint_of_the_first_teacher(factor: int) -> None:
    start, teacher, before = 32, exact(), 32
    for n in step_counts(start, (1,), factor):
        i = torch.arange(n)
        times = interval_times(i, n, before // n)
        gains = one_step_target(teacher, torch.ones(n, 1, dtype=torch.float64), times, Conditions.none(n)).flatten()
        angle, step = times[0] * HALF_PI, HALF_PI / n
        c = math.cos(HALF_PI / start) ** (start / n)
        torch.testing.assert_close(gains, (c * angle.sin() - (angle - step).sin()) / math.sin(step), rtol=1e-11, atol=1e-11)
        teacher, before = Denoiser(Learnt(dict(zip(times[0].tolist(), gains.tolist(), strict=True))), Trig(), "x0"), n
        end = ddim(teacher, numbers(1.0), Conditions.none(1), time_grid(Trig(), n)).item()
        assert end == pytest.approx(math.cos(HALF_PI / start) ** start, abs=1e-11)


@pytest.mark.parametrize(
    ("spread", "ends"),
    [(0.5, {2: 0.2, 4: 0.333441, 8: 0.411375, 1024: 0.499248}), (2.0, {2: 0.8, 4: 1.333763, 8: 1.645502, 1024: 1.996990})],
)
def test_gaussian_data_have_the_known_endpoints_and_one_step_targets(spread: float, ends: dict[int, float]) -> None:
    for steps, factor in ends.items():
        end = ddim(exact(spread=spread), numbers(1.0), Conditions.none(1), time_grid(Trig(), steps)).item()
        assert end == pytest.approx(factor, abs=5e-7)
        moved = ddim(exact(mean=3.0, spread=spread), numbers(1.0), Conditions.none(1), time_grid(Trig(), steps)).item()
        assert moved == pytest.approx(3.0 + factor, abs=5e-7)
        times = interval_times(torch.zeros(1, dtype=torch.long), 1, steps)  # the whole of the way in one step, from pure noise
        assert one_step_target(exact(spread=spread), numbers(1.0), times, Conditions.none(1)).item() == pytest.approx(factor, abs=5e-7)


@pytest.mark.parametrize("path", [Trig(), Flow(), EDM()], ids=lambda path: path.name)
@pytest.mark.parametrize("parts", [2, 4])
def test_one_ddim_step_with_the_target_lands_where_the_teacher_does(path: Schedule, parts: int) -> None:
    teacher = random_teacher(path)
    generator = torch.Generator().manual_seed(1)
    n = 8
    z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    times = interval_times(torch.arange(n), n, parts)
    x0 = one_step_target(teacher, z, times, Conditions.none(n), last_x0=False)
    with torch.no_grad():
        landed = torch.cat([ddim(teacher, z[k : k + 1], Conditions.none(1), times[:, k]) for k in range(n)])
    (alpha, first), (alpha_end, end) = ([broadcast(level, z) for level in path.levels(times[k])] for k in (0, -1))
    rho = end / first
    torch.testing.assert_close(x0, (landed - rho * z) / (alpha_end - rho * alpha), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(jump(path, x0, (z - alpha * x0) / first, times[-1]), landed, rtol=1e-10, atol=1e-10)
    if path == Trig():
        phi, phi_end = times[0, :, None] * HALF_PI, times[-1, :, None] * HALF_PI
        d = phi - phi_end
        torch.testing.assert_close(x0, (phi.sin() * landed - phi_end.sin() * z) / d.sin(), rtol=1e-6, atol=1e-9)
        v = (d.cos() * z - landed) / d.sin()
        torch.testing.assert_close(v, (z - alpha * x0) / first * alpha - first * x0, rtol=1e-6, atol=1e-9)
    if path == Flow():
        velocity = (z - landed) / (times[0] - times[-1])[:, None]
        torch.testing.assert_close(x0, z - times[0][:, None] * velocity, rtol=1e-10, atol=1e-10)


def test_the_weights_are_those_of_the_losses_in_x0_eps_and_v_and_finite_at_pure_noise() -> None:
    generator = torch.Generator().manual_seed(2)
    t = torch.rand(16, generator=generator, dtype=torch.float64)
    path = Trig()
    x0, other, z = (torch.randn(16, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, sigma = (level[:, None] for level in path.levels(t))
    eps, other_eps = ((z - alpha * x) / sigma for x in (x0, other))
    error_x, error_eps = (x0 - other).square().mean(1), (eps - other_eps).square().mean(1)
    error_v = ((alpha * eps - sigma * x0) - (alpha * other_eps - sigma * other)).square().mean(1)
    expected = {"constant": error_x, "snr": error_eps, "snr_trunc": torch.maximum(error_x, error_eps), "v_mse": error_v}
    for kind, value in expected.items():
        torch.testing.assert_close(loss_weight(kind, path, t) * error_x, value, rtol=1e-9, atol=1e-12)
        for schedule in (Trig(), Flow()):
            assert loss_weight(kind, schedule, torch.ones(1, dtype=torch.float64)).item() == (0.0 if kind == "snr" else 1.0)
            assert bool(loss_weight(kind, schedule, torch.tensor([1 / 4096], dtype=torch.float64)).isfinite().all())


@pytest.mark.parametrize("path", [Trig(), Flow()], ids=lambda path: path.name)
def test_data_in_one_point_have_that_point_as_the_target_of_every_stage(path: Schedule) -> None:
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for n, parts in ((1, 2), (4, 2), (16, 2), (4, 8)):
        times = interval_times(torch.arange(16) % n, n, parts)
        target = one_step_target(exact(path, mean=0.7, spread=0.0), z, times, Conditions.none(16))
        torch.testing.assert_close(target, torch.full_like(z, 0.7), rtol=1e-13, atol=0)


@pytest.mark.parametrize("path", [Trig(), Flow(), EDM()], ids=lambda path: path.name)
def test_the_last_step_aims_at_the_teachers_last_x0(path: Schedule) -> None:
    times = interval_times(torch.arange(2), 2, 2)
    assert times.tolist() == [[0.5, 1.0], [0.25, 0.75], [0.0, 0.5]]
    by_rule, by_formula = (shares(path, times, last_x0=rule) for rule in (True, False))
    assert by_rule[:, 0].tolist() == [0.0, 1.0]  # to the last digit
    assert torch.equal(by_rule, by_formula) == (path != EDM())
    torch.testing.assert_close(by_rule.sum(0), torch.ones(2, dtype=torch.float64))
    assert 0 < by_rule[0, 1] < 1


@pytest.mark.parametrize(
    ("start", "asked", "factor", "counts"),
    [
        (32, (1,), 2, (16, 8, 4, 2, 1)),
        (8, (4,), 2, (4,)),
        (64, (1,), 4, (16, 4, 1)),
        (64, (4, 2, 1), 4, (16, 4, 2, 1)),
        (32, (1,), 4, (8, 2, 1)),
    ],
)
def test_each_stage_halves_and_leaps_over_no_count_that_is_asked_for(start, asked, factor, counts) -> None:
    assert step_counts(start, asked, factor) == counts
