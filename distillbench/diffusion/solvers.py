"""Solvers of the probability flow ODE from noise to data, and few-step sampling of students.

A solver takes x at times[0] and returns it at times[-1], usually 1 and 0, on the denoiser's path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..conditions import Conditions
from ..errors import UsageError, unknown
from .base import Schedule, Time, broadcast
from .denoiser import Denoiser

Times = Tensor | Sequence[float]

# The noise-to-signal ratios of Karras et al. 2022, for grids in noise level where a schedule has no end of its own.
LOWEST_RATIO, HIGHEST_RATIO = 0.002, 80.0
KARRAS_RHO = 7.0


def time_grid(schedule: Schedule, steps: int, kind: str = "uniform") -> Tensor:
    """steps + 1 times from 1 to 0, float64.

    uniform: in t.  log_snr: in log-SNR.  karras: in (sigma / alpha)^(1/7). The last two take sigma / alpha = 80 and 0.002 for an end
    of infinite log-SNR; the first and last time are 1 and 0 all the same.
    """
    if steps < 1:
        raise UsageError(f"a time grid needs at least 1 step, got {steps}")
    if kind == "uniform":
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    ends = schedule.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64))
    noisy, clean = torch.nan_to_num(ends, posinf=-2 * math.log(LOWEST_RATIO), neginf=-2 * math.log(HIGHEST_RATIO))
    part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if kind == "log_snr":
        log_snr = noisy + part * (clean - noisy)
    elif kind == "karras":
        high, low = torch.exp(-noisy / (2 * KARRAS_RHO)), torch.exp(-clean / (2 * KARRAS_RHO))
        log_snr = -2 * KARRAS_RHO * torch.log(high + part * (low - high))
    else:
        raise unknown("kind of time grid", kind, ("uniform", "log_snr", "karras"))
    times = schedule.time_of(log_snr)
    times[0], times[-1] = 1.0, 0.0
    return times


def _floats(times: Times, least: int) -> list[float]:
    values = [float(t) for t in times]
    falling = all(a > b for a, b in pairwise(values)) and all(0 <= t <= 1 for t in values)
    if not falling or len(values) < least:
        raise UsageError(f"times must fall strictly within [0, 1] and number at least {least}, got {values}")
    return values


def jump(path: Schedule, x0: Tensor, eps: Tensor, s: Time) -> Tensor:
    """The point at time s with this x0 and eps: alpha_s x0 + sigma_s eps. s: float, () or (n,)."""
    return broadcast(path.alpha(s), x0) * x0 + broadcast(path.sigma(s), eps) * eps


def euler(denoiser: Denoiser, x: Tensor, conditions: Conditions, times: Times, *, guidance_scale: Time | None = None) -> Tensor:
    """First order in t: x + (s - t) velocity."""
    for t, s in pairwise(_floats(times, 2)):
        x = x + (s - t) * denoiser.velocity(x, t, conditions, guidance_scale=guidance_scale)
    return x


def heun(denoiser: Denoiser, x: Tensor, conditions: Conditions, times: Times, *, guidance_scale: Time | None = None) -> Tensor:
    """Second order in t (Karras et al. 2022, algorithm 1): two evaluations a step, one in the last step when it ends in 0."""
    for t, s in pairwise(_floats(times, 2)):
        slope = denoiser.velocity(x, t, conditions, guidance_scale=guidance_scale)
        if s > 0:
            ahead = denoiser.velocity(x + (s - t) * slope, s, conditions, guidance_scale=guidance_scale)
            slope = (slope + ahead) / 2
        x = x + (s - t) * slope
    return x


def ddim(denoiser: Denoiser, x: Tensor, conditions: Conditions, times: Times, *, guidance_scale: Time | None = None) -> Tensor:
    """First order, exact for a constant x0 and eps (Song et al. 2021, eq. 12 with eta 0). On `flow` it is euler."""
    for t, s in pairwise(_floats(times, 2)):
        prediction = denoiser.predict(x, t, conditions, guidance_scale=guidance_scale)
        x = jump(denoiser.path, prediction.x0, prediction.eps, s)
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, conditions: Conditions, times: Times, *, guidance_scale: Time | None = None) -> Tensor:
    """DPM-Solver++(2M), data prediction, second order in log-SNR with one evaluation a step (Lu et al. 2022, algorithm 2).

    The first step, and every step that touches an infinite log-SNR in what it needs, is of first order (that is ddim).
    """
    grid = torch.tensor(_floats(times, 2), dtype=torch.float64)
    path = denoiser.path
    alpha, sigma, half_log_snr = path.alpha(grid).tolist(), path.sigma(grid).tolist(), (path.log_snr(grid) / 2).tolist()
    previous: Tensor | None = None
    for i, t in enumerate(grid[:-1].tolist()):
        x0 = denoiser.x0(x, t, conditions, guidance_scale=guidance_scale)
        estimate = x0
        if previous is not None and all(map(math.isfinite, half_log_snr[i - 1 : i + 2])):
            before, now, after = half_log_snr[i - 1 : i + 2]
            estimate = x0 + (after - now) / (2 * (now - before)) * (x0 - previous)
        ratio = sigma[i + 1] / sigma[i]
        x = ratio * x + (alpha[i + 1] - alpha[i] * ratio) * estimate
        previous = x0
    return x


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def evaluations_per_step(solver: str) -> int:
    """Predictions in one step of a solver, not counting that guidance doubles each."""
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    return 2 if solver == "heun" else 1


def evaluations(solver: str, steps: int) -> int:
    """Predictions in `steps` steps that end at time 0; heun saves one in the last."""
    return steps * evaluations_per_step(solver) - (solver == "heun")


def few_step(denoiser: Denoiser, conditions: Conditions, times: Times, noise: Callable[[int], Tensor], *, mode: str = "renoise",
             guidance: Time | None = None, guidance_scale: Time | None = None) -> Tensor:  # fmt: skip
    """Sample a student that predicts x0: from times t_1 > ... > t_n > 0, without the 0. Returns the last x0 (n, *shape).

    noise(k): the k-th standard normal noise; k = 0 is the start, x = path.start(t_1) noise(0).
    renoise: the next x is alpha x0 + sigma noise(k) (multistep consistency sampling).  deterministic: it keeps the implied eps (ddim).
    """
    grid = _floats(times, 1)
    if grid[-1] == 0:
        raise UsageError("the times of few-step sampling end above 0: the last x0 is the sample")
    if mode not in ("renoise", "deterministic"):
        raise unknown("few-step mode", mode, ("renoise", "deterministic"))
    options: dict[str, Any] = {"guidance": guidance, "guidance_scale": guidance_scale}
    start = noise(0)
    prediction = denoiser.predict(denoiser.path.start(grid[0]) * start, grid[0], conditions, **options)
    for k, t in enumerate(grid[1:], start=1):
        eps = noise(k) if mode == "renoise" else prediction.eps
        x = jump(denoiser.path, prediction.x0, eps, t)
        prediction = denoiser.predict(x, t, conditions, **options)
    return prediction.x0
