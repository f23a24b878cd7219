"""Backward simulation: a few-step student trained on its own intermediate states (Yin et al. 2024, arXiv 2405.14867, section 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..conditions import Conditions
from ..diffusion.denoiser import Denoiser
from ..diffusion.solvers import few_step, jump
from ..errors import UsageError


def step_list(total: int, steps: int) -> list[int]:
    """Indices of a discrete schedule of `total` levels: from total - 1 down in strides of total // steps (999, 749, 499, 249)."""
    if not 1 <= steps <= total:
        raise UsageError(f"cannot take {steps} steps out of {total} noise levels")
    return [total - 1 - i * (total // steps) for i in range(steps)]


def step_grid(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """The same in continuous time, without the final 0: 1, 3/4, 1/2, 1/4 for 4 steps.

    shift above 1 moves the inner times towards noise, below 1 towards data: t -> shift t / (1 + (shift - 1) t).
    """
    if steps < 1:
        raise UsageError(f"a student takes at least 1 step, not {steps}")
    return tuple(shift * t / (1 + (shift - 1) * t) for t in (1 - i / steps for i in range(steps)))


def pure_noise(student: Denoiser, grid: Sequence[float], noise: Tensor) -> Tensor:
    """What the first step is given, in training as at inference: path.start(t_1) eps."""
    return student.path.start(grid[0]) * noise


@torch.no_grad()
def simulated_input(student: Denoiser, grid: Sequence[float], k: int, conditions: Conditions, noise: Callable[[int], Tensor]) -> Tensor:
    """What step k of `grid` (counted from 0) is given at inference: steps 0 ... k - 1 are run, then noise is added up to grid[k].

    noise(i): the i-th standard normal noise (n, *shape); 0 is the start.
    """
    if k == 0:
        return pure_noise(student, grid, noise(0))
    x0 = few_step(student, conditions, grid[:k], noise)
    return jump(student.path, x0, noise(k), grid[k])
