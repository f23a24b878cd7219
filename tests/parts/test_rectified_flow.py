"""Rectified flow against closed forms, in float64: one step, straight lines, monotone maps, transport cost and straightness."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Conditions
from distillbench.data.mixture import exact_denoiser, standard_mixture
from distillbench.diffusion import Denoiser, Flow, heun, time_grid
from distillbench.errors import UsageError
from distillbench.parts.rectified_flow import (
    line_times,
    one_step,
    reflow_loss,
    straightness,
    transport_cost,
)
from distillbench.parts.simulation import step_grid

GAUSSIANS = [(0.7, 0.5), (0.0, 1.0), (-1.3, 2.0)]


class Field(nn.Module):
    """A velocity noise - x given by a function of (x, t); t (n, 1)."""

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **_: Any) -> Any:
        return SimpleNamespace(prediction=self.velocity(x, t[:, None]), features={}, log_variance=None)


def flow(velocity: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    network: Any = Field(velocity)
    return Denoiser(network, Flow(), "velocity")


def first_flow(mu: float, s: float) -> Denoiser:
    """The exact 1-flow of N(mu, s^2) in each dimension, from the paper's v_1 at tau = 1 - t."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        tau = 1 - t
        kappa = tau**2 * s**2 + (1 - tau) ** 2
        return -(mu + (tau * s**2 - (1 - tau)) / kappa * (x - tau * mu))

    return flow(velocity)


def second_flow(mu: float, s: float) -> Denoiser:
    """The flow of the coupling x = mu + s noise."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        tau = 1 - t
        return -(mu + (s - 1) * (x - tau * mu) / (1 + tau * (s - 1)))

    return flow(velocity)


def normal_points(n: int) -> Tensor:
    """Midpoints of equal parts of the normal law, (n, 1), scaled to mean 0 and variance 1 exactly."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = math.sqrt(2) * torch.erfinv(2 * u - 1)
    return (z / z.square().mean().sqrt())[:, None]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- the first flow


def test_one_step_of_the_first_flow_gives_the_mean_of_the_data_whatever_the_noise() -> None:
    mixture = standard_mixture()
    labels = torch.arange(64) % mixture.classes
    mean = (mixture.weights[..., None] * mixture.means).sum(1)[labels]
    out = one_step(exact_denoiser(mixture, Flow()), randn(64, 2), mixture.conditions(labels))
    torch.testing.assert_close(out, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mu", "s"), GAUSSIANS)
def test_the_first_flow_of_a_gaussian_ends_at_mu_plus_s_noise(mu: float, s: float) -> None:
    z = randn(20, 3)
    for tau in (0.3, 0.8, 1.0):
        times = torch.linspace(1, 1 - tau, 401, dtype=torch.float64)
        x = heun(first_flow(mu, s), z, Conditions.none(20), times)
        torch.testing.assert_close(x, tau * mu + math.sqrt(tau**2 * s**2 + (1 - tau) ** 2) * z, rtol=0, atol=1e-4)


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_the_straightness_of_the_first_flow_of_a_gaussian(s: float) -> None:
    z = normal_points(200)
    measured = straightness(first_flow(0.0, s), z, Conditions.none(200), steps=1000)
    assert measured.item() == pytest.approx(s * (2 - math.pi / 2), rel=1e-5)
    doubled = straightness(first_flow(0.0, s), z.expand(200, 2), Conditions.none(200), steps=1000)
    assert doubled.item() == pytest.approx(2 * measured.item(), rel=1e-12)  # summed over dimensions


# ---------------------------------------------------------------- reflow


@pytest.mark.parametrize(("mu", "s"), GAUSSIANS)
def test_reflow_of_a_gaussian_is_straight_and_exact_in_one_step(mu: float, s: float) -> None:
    z, t = randn(50, 2), torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, none = mu + s * z, Conditions.none(50)
    assert reflow_loss(second_flow(mu, s), z, x, t, none).item() < 1e-24
    assert reflow_loss(first_flow(mu, s), z, x, t, none).item() > 1e-3
    torch.testing.assert_close(one_step(second_flow(mu, s), z, none), x, rtol=0, atol=1e-12)
    assert straightness(second_flow(mu, s), z, none, steps=20).item() < 1e-24


def two_modes(x: Tensor, t: Tensor) -> Tensor:
    """The exact 1-flow of 0.3 N(-1, 0.2^2) + 0.7 N(1.5, 0.3^2)."""
    mean, s, weight = (torch.tensor(v, dtype=torch.float64) for v in ((-1.0, 1.5), (0.2, 0.3), (0.3, 0.7)))
    alpha = 1 - t
    variance = alpha**2 * s**2 + t**2
    log = weight.log() - 0.5 * ((x - alpha * mean) ** 2 / variance + variance.log())
    x0 = (log.softmax(1) * (mean + alpha * s**2 / variance * (x - alpha * mean))).sum(1, keepdim=True)
    return (x - x0) / t.clamp_min(1e-9)


def test_in_one_dimension_one_reflow_gives_the_monotone_map_in_one_step() -> None:
    z = normal_points(2000)
    none = Conditions.none(len(z))
    times = torch.cat([time_grid(Flow(), 400)[:-1], torch.tensor([1e-4], dtype=torch.float64)])
    x = heun(flow(two_modes), z, none, times)
    assert (x.diff(dim=0) > 0).all()  # rank correlation 1
    quantiles = torch.quantile(x, torch.tensor([0.15, 0.65], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([-1.0, 1.5], abs=5e-3)  # the medians of the two modes

    def reflowed(at: Tensor, t: Tensor) -> Tensor:
        """E[noise - x | x_t]: lines do not cross, so it is the velocity of the one line through x_t."""
        lines = (1 - t) * x[:, 0] + t * z[:, 0]  # (n, lines)
        assert (lines.diff(dim=1) > 0).all()
        found = [np.interp(a.numpy(), row.numpy(), (z - x)[:, 0].numpy()) for a, row in zip(at, lines, strict=True)]
        return torch.tensor(np.array(found))

    some = slice(3, None, 97)
    few, few_x = z[some], x[some]
    for t in (0.2, 0.7, 1.0):
        assert reflow_loss(flow(reflowed), few, few_x, torch.full((len(few),), t, dtype=torch.float64), none).item() < 1e-20
    torch.testing.assert_close(one_step(flow(reflowed), few, none), few_x, rtol=0, atol=1e-10)
    assert straightness(flow(reflowed), few, none, steps=10).item() < 1e-20
    assert straightness(flow(two_modes), few, none, steps=100).item() > 0.1


@pytest.mark.parametrize(("mu", "s"), GAUSSIANS)
def test_the_transport_cost_falls_from_the_independent_coupling_to_the_flows(mu: float, s: float) -> None:
    z = normal_points(300)
    x = mu + s * z
    independent = transport_cost(z.repeat_interleave(300, 0), x.repeat(300, 1))
    assert independent.item() == pytest.approx(mu**2 + s**2 + 1, rel=1e-12)
    coupled = transport_cost(z, heun(first_flow(mu, s), z, Conditions.none(300), time_grid(Flow(), 1000)))
    assert coupled.item() == pytest.approx(mu**2 + (s - 1) ** 2, rel=1e-4, abs=1e-4)
    again = transport_cost(z, heun(second_flow(mu, s), z, Conditions.none(300), time_grid(Flow(), 10)))
    assert again.item() == pytest.approx(mu**2 + (s - 1) ** 2, rel=1e-12, abs=1e-12)


def test_the_cost_of_a_mixture_falls_too_and_its_law_stays() -> None:
    mixture = standard_mixture()
    labels = torch.arange(2048) % mixture.classes
    conditions, z = mixture.conditions(labels), randn(2048, 2)
    x = heun(exact_denoiser(mixture, Flow()), z, conditions, time_grid(Flow(), 100))
    data, other = (mixture.sample(2048, torch.Generator().manual_seed(seed), labels)[0] for seed in (1, 2))
    assert transport_cost(z, x) < 0.6 * transport_cost(z, data)
    assert energy_distance(x, data) < 3 * energy_distance(other, data) < 0.1 * energy_distance(z, data)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| without the pairs of a point with itself."""
    n, m = len(a), len(b)
    within = torch.cdist(a, a).sum() / (n * (n - 1)) + torch.cdist(b, b).sum() / (m * (m - 1))
    return float((2 * torch.cdist(a, b).mean() - within).abs())


# ---------------------------------------------------------------- losses and times


def test_distillation_at_pure_noise_is_the_reflow_loss_there() -> None:
    z, x = randn(30, 2, seed=1), randn(30, 2, seed=2)
    some = flow(lambda at, t: torch.sin(3 * at) + t)
    distilled = (one_step(some, z, Conditions.none(30)) - x).square().mean()
    assert reflow_loss(some, z, x, torch.ones(30, dtype=torch.float64), Conditions.none(30)).item() == pytest.approx(distilled.item())
    velocity = some.velocity(z, 1.0, Conditions.none(30))
    torch.testing.assert_close(distilled, (velocity - (z - x)).square().mean())


def test_times_are_where_they_should_be() -> None:
    u = torch.tensor([0.0, 0.25, 0.5, 0.999], dtype=torch.float64)
    torch.testing.assert_close(line_times("uniform", u), 1 - u)
    tau = 1 - line_times("uniform", u, tau_eps=0.01)
    torch.testing.assert_close(tau, 0.01 + 0.99 * u)
    assert line_times("t0", u).tolist() == [1.0] * 4
    many = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    for k in (1, 2, 4):
        stops, often = line_times("k-grid", many, k=k).unique(return_counts=True)
        assert stops.flip(0).tolist() == pytest.approx(list(step_grid(k)))
        assert often.tolist() == [1000 // k] * k
    with pytest.raises(UsageError, match="did you mean uniform"):
        line_times("unifrom", u)
