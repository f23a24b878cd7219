"""Directional derivatives through any denoiser: forward mode, or central differences.

Forward mode has no rule for the fused attention kernels, so attention runs in its plain form inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..conditions import Conditions
from ..errors import unknown
from .base import Time, as_time
from .denoiser import Denoiser

Function = Callable[..., Tensor]


def jvp(fn: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """fn(*primals) and its derivative along `tangents`, in one forward pass that costs about two.

    Both keep their graph to the parameters; detach the tangent where it serves as a target.
    """
    with sdpa_kernel(SDPBackend.MATH):
        out, tangent = torch.func.jvp(fn, tuple(primals), tuple(tangents))[:2]
    return out, tangent


def finite_difference(fn: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor], h: float) -> Tensor:
    """The same derivative as (fn(p + h v) - fn(p - h v)) / 2h: two evaluations, error of order h^2 plus rounding / h."""
    ahead = fn(*(p + h * v for p, v in zip(primals, tangents, strict=True)))
    behind = fn(*(p - h * v for p, v in zip(primals, tangents, strict=True)))
    return (ahead - behind) / (2 * h)


def time_derivative(denoiser: Denoiser, x: Tensor, t: Time, conditions: Conditions, dx: Tensor, dt: Time, *, of: str = "velocity",
                    method: str = "jvp", h: float = 1e-3, **options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The denoiser's `of` (x0, eps, velocity, score) at (x, t) and its derivative along (dx, dt), each of the shape of x.

    With dx = velocity and dt = 1 it is the total derivative d/dt along the flow. dt: float or a tensor of the shape of t.
    method: jvp, or finite_difference with step h (three evaluations; t +- h dt must lie in [0, 1]). options: as in `Denoiser.predict`.
    """
    if of not in ("x0", "eps", "velocity", "score"):
        raise unknown("reading", of, ("x0", "eps", "velocity", "score"))
    time = as_time(t).to(x.device)
    rate = as_time(dt).to(x.device).expand_as(time)

    def read(x: Tensor, time: Tensor) -> Tensor:
        return getattr(denoiser, of)(x, time, conditions, **options)

    if method == "jvp":
        return jvp(read, (x, time), (dx, rate))
    if method == "finite_difference":
        return read(x, time), finite_difference(read, (x, time), (dx, rate), h)
    raise unknown("method of differentiation", method, ("jvp", "finite_difference"))
