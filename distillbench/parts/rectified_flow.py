"""Rectified flow: straight lines between a noise and the sample an ODE made of it. Liu et al. 2022 (ICLR 2023), arXiv 2209.03003.

In the suite's time, x_t = (1 - t) x + t noise and dx_t / dt = noise - x; the paper's time is tau = 1 - t and its velocity x - noise.
Every denoiser here is on the path `flow`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..conditions import Conditions
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import Flow
from ..diffusion.solvers import jump, time_grid
from ..errors import unknown

TIMES = ("uniform", "t0", "k-grid")


def line_times(kind: str, u: Tensor, *, tau_eps: float = 0.0, k: int = 1) -> Tensor:
    """Times t (n,) at which to train, from u (n,) uniform in [0, 1); both float64.

    uniform: tau = 1 - t uniform in [tau_eps, 1).  t0: pure noise, tau = 0.  k-grid: where a k-step Euler sampler stops, tau = j / k.
    """
    if kind == "uniform":
        return 1 - (tau_eps + (1 - tau_eps) * u)
    if kind == "t0":
        return torch.ones_like(u)
    if kind == "k-grid":
        return 1 - (k * u).floor() / k
    raise unknown("sampling of times", kind, TIMES)


def reflow_loss(denoiser: Denoiser, noise: Tensor, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """mean (velocity(x_t, t) - (noise - x))^2 over pairs and dimensions: noise and x (n, *shape), t (n,)."""
    return (denoiser.velocity(jump(Flow(), x, noise, t), t, conditions) - (noise - x)).square().mean()


def one_step(denoiser: Denoiser, noise: Tensor, conditions: Conditions) -> Tensor:
    """One Euler step from noise (n, *shape) at t = 1 to t = 0: noise - velocity(noise, 1)."""
    return noise - denoiser.velocity(noise, 1.0, conditions)


def transport_cost(noise: Tensor, x: Tensor) -> Tensor:
    """E |x - noise|^2 of a coupling, pairs (n, *shape): a number. Exact reflow never raises it."""
    return (x - noise).flatten(1).square().sum(1).mean()


@torch.no_grad()
def straightness(denoiser: Denoiser, noise: Tensor, conditions: Conditions, steps: int = 100) -> Tensor:
    """S = int E |(noise - x) - velocity(x_t, t)|^2 dt along the flow from noise (n, *shape) to x: a number, 0 if all paths are straight.

    Heun's method with `steps` steps, then the trapezoidal rule over its points (two evaluations a step).
    """
    x, velocities = noise, [denoiser.velocity(noise, 1.0, conditions)]
    times = time_grid(denoiser.path, steps).tolist()
    for t, s in pairwise(times):
        ahead = denoiser.velocity(x + (s - t) * velocities[-1], s, conditions)
        x = x + (s - t) * (velocities[-1] + ahead) / 2
        velocities.append(denoiser.velocity(x, s, conditions))
    bends = torch.stack([transport_cost(velocity, noise - x) for velocity in velocities])
    return torch.trapezoid(bends, dx=1 / steps)
