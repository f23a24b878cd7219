"""TrigFlow where everything is known in closed form: Gaussian data, networks that are functions, float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Conditions
from distillbench.diffusion import Denoiser
from distillbench.parts.trigflow import HALF_PI, TrigFlow

N, D = 9, 3
FLOWS = (TrigFlow(), TrigFlow(0.5), TrigFlow(0.5, 0.5), TrigFlow(2.0, 0.7))
T = torch.linspace(0.05, 1.5, N, dtype=torch.float64)
NONE = Conditions.none(N)


def flows(function: Any) -> Any:
    return pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: f"{flow.sigma_data:g}-{flow.unit:g}")(function)


class Says(nn.Module):
    """A network that is a function of (x, t)."""

    capabilities = frozenset({"jvp"})

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Any:
        return SimpleNamespace(prediction=self.function(x, t), features={}, log_variance=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(value: Tensor) -> Tensor:
    return value[:, None]


def says_clean(flow: TrigFlow, end: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    """A denoiser on the flow's path whose f(x_t, t), in units of x0, is `end`."""
    return Denoiser(Says(lambda x, t: end(flow.unit * x, t * HALF_PI) / flow.unit), flow.path, "x0")


def gaussian_end(flow: TrigFlow, m: float, s: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Where the trajectories of x0 ~ N(m, s^2) end."""

    def end(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = column(t.cos()), column(t.sin())
        return m + s * (x - cos * m) / (cos**2 * s**2 + sin**2 * flow.sigma_data**2).sqrt()

    return end


def gaussian_slope(flow: TrigFlow, x: Tensor, t: Tensor, m: float, s: float) -> Tensor:
    cos, sin, d2 = column(t.cos()), column(t.sin()), flow.sigma_data**2
    return -sin * m + sin * cos * (d2 - s**2) * (x - cos * m) / (cos**2 * s**2 + sin**2 * d2)
