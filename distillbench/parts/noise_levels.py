"""Laws of the noise levels that a loss is drawn at, for any path.

Levels are sigma / alpha. Papers on EDM (Karras et al. 2022, arXiv 2206.00364) give them for data of deviation 0.5 on x = x0 + sigma eps;
here they scale with the deviation of the data at hand, and a denoiser on another path sees the same ratio at its own time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.base import Schedule, Time, as_time

EDM_DATA = 0.5  # deviation of the data for which papers give their levels
LOWEST, HIGHEST, RHO = 0.002, 80.0, 7.0


def time_at(path: Schedule, level: Time, *, data_std: float = EDM_DATA) -> Tensor:
    """The path's time, float64, at which sigma / alpha is `level` (as papers give it) for data of deviation data_std."""
    return path.time_of(-2 * (as_time(level) * (data_std / EDM_DATA)).log())


def lognormal_level(normal: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """exp(mean + std normal), float64, for standard normal numbers (n,)."""
    return (mean + std * normal.to(torch.float64)).exp()


def karras_level(u: Tensor, *, lowest: float = LOWEST, highest: float = HIGHEST, rho: float = RHO) -> Tensor:
    """(u highest^(1/rho) + (1 - u) lowest^(1/rho))^rho, float64: from lowest at u = 0 to highest at u = 1."""
    u = u.to(torch.float64)
    return (u * highest ** (1 / rho) + (1 - u) * lowest ** (1 / rho)) ** rho
