"""A network that is exact for a Gaussian, so that denoisers and solvers can be held against closed forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distillbench.conditions import Conditions
from distillbench.diffusion import Denoiser, Schedule, broadcast

MEAN, SPREAD = 0.7, 0.5


class GaussianNetwork(nn.Module):
    """The exact network of N(mean + label, spread^2) on `schedule`; the null label is 0. It records what it was called with."""

    def __init__(self, schedule: Schedule, prediction: str):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction
        self.mean = nn.Parameter(torch.tensor(MEAN, dtype=torch.float64))
        self.calls: list[SimpleNamespace] = []

    def forward(self, x, t, conditions, *, second_time=None, guidance=None, taps=(), stop=False):
        call = SimpleNamespace(x=x, t=t, conditions=conditions, second_time=second_time, guidance=guidance, taps=taps, stop=stop)
        self.calls.append(call)
        mean = self.mean
        if "label" in conditions:
            mean = mean + conditions.field("label").to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        s = self.schedule
        alpha, sigma, d_alpha, d_sigma = (broadcast(f(t), x) for f in (s.alpha, s.sigma, s.d_alpha, s.d_sigma))
        variance = alpha**2 * SPREAD**2 + sigma**2
        score = -(x - alpha * mean) / variance
        x0 = mean + alpha * SPREAD**2 / variance * (x - alpha * mean)
        eps = -sigma * score
        out = {"x0": x0, "eps": eps, "score": score, "v": alpha * eps - sigma * x0}.get(self.prediction, d_alpha * x0 + d_sigma * eps)
        return SimpleNamespace(prediction=None if stop else out, features=dict.fromkeys(taps, x), log_variance=t)

    def copy(self) -> GaussianNetwork:
        return copy.deepcopy(self)

    def to_config(self) -> dict:
        return {"kind": "gaussian"}


@pytest.fixture
def gaussian() -> Callable[..., Denoiser]:
    """gaussian(schedule, prediction="velocity", path=None): the exact denoiser of the Gaussian."""

    def make(schedule: Schedule, prediction: str = "velocity", path: Schedule | None = None) -> Denoiser:
        return Denoiser(GaussianNetwork(schedule, prediction), schedule, prediction, path=path)

    return make


@pytest.fixture
def truth() -> Callable[[Schedule, Tensor, Tensor | float], SimpleNamespace]:
    """truth(schedule, x, t): x0, eps, velocity and score of the Gaussian, and flow(s), where the probability flow takes x."""

    def exact(schedule: Schedule, x: Tensor, t: Tensor | float) -> SimpleNamespace:
        def level(time: Tensor | float) -> tuple:
            alpha, sigma = (broadcast(f(time), x) for f in (schedule.alpha, schedule.sigma))
            return alpha, sigma, alpha**2 * SPREAD**2 + sigma**2

        def flow(s: float) -> Tensor:
            alpha_s, _, variance_s = level(s)
            return alpha_s * MEAN + (variance_s / variance).sqrt() * (x - alpha * MEAN)

        alpha, sigma, variance = level(t)
        x0 = MEAN + alpha * SPREAD**2 / variance * (x - alpha * MEAN)
        score = -(x - alpha * MEAN) / variance
        velocity = broadcast(schedule.d_alpha(t), x) * x0 - broadcast(schedule.d_sigma(t), x) * sigma * score
        return SimpleNamespace(x0=x0, eps=-sigma * score, velocity=velocity, score=score, flow=flow)

    return exact


@pytest.fixture
def nothing() -> Callable[[int], Conditions]:
    return Conditions.none
