"""How far apart two batches are in the features of a frozen network: what stands for LPIPS (Zhang et al. 2018, arXiv 1801.03924) here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..conditions import Conditions
from ..diffusion.base import Time
from ..diffusion.denoiser import Denoiser
from ..diffusion.solvers import jump


def feature_distance(mine: Tensor, other: Tensor) -> Tensor:
    """How far two batches of features (n, channels, ...) are apart in direction, in [0, 4].

    As in LPIPS with all weights 1: channels are scaled to unit length at each place, and squared differences are summed over channels
    and averaged over places and examples.
    """
    a, b = (f / f.square().sum(1, keepdim=True).add(1e-10).sqrt() for f in (mine, other))
    return (a - b).square().sum(1).mean()


def feature_loss(teacher: Denoiser, tap: str, mine: Tensor, other: Tensor, noise: Tensor, t: Time, conditions: Conditions) -> Tensor:
    """The distance of samples mine and other (n, *shape) in the teacher's features at `tap`, both at time t and with the same noise.

    The gradient reaches `mine` alone.
    """
    with torch.no_grad():
        wanted = teacher.features(jump(teacher.path, other, noise, t), t, conditions, (tap,))[tap]
    return feature_distance(teacher.features(jump(teacher.path, mine, noise, t), t, conditions, (tap,))[tap], wanted)
