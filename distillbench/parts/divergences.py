"""f-divergences between a teacher p and a student q as weights of distribution matching.

f-distill (Xu, Nie and Vahdat 2025, arXiv 2502.15681): D_f(p || q) = E_q[f(r)] with the density ratio r = p / q, and its gradient in the
student's weights is that of the reverse KL divergence, (student's score - teacher's score) carried to the sample, times h(r) = f''(r) r^2.
The ratio is read off a discriminator: one that is best under the logistic loss has the logit ln r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import unknown

LARGEST_LOGIT = 10.0
TINY = 1e-6  # beside the averages that ratios and weights are divided by

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """f on ratios r > 0, convex with f(1) = 0, its derivatives `first` and `second`, and h = f'' r^2, written out to be tame at any r."""

    f: Function
    first: Function
    second: Function
    h: Function


DIVERGENCES = {
    "rkl": Divergence(lambda r: -r.log(), lambda r: -1 / r, lambda r: 1 / r**2, torch.ones_like),
    "sf": Divergence(  # softened reverse KL
        lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
        lambda r: ((r + 1) / (2 * r)).log() - 1 / r,
        lambda r: 1 / (r**2 * (r + 1)),
        lambda r: 1 / (r + 1),
    ),
    "js": Divergence(  # twice the usual Jensen-Shannon divergence
        lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        lambda r: (2 * r / (r + 1)).log(),
        lambda r: 1 / (r * (r + 1)),
        lambda r: r / (r + 1),
    ),
    "sh": Divergence(  # squared Hellinger
        lambda r: 1 - r.sqrt(), lambda r: -1 / (2 * r.sqrt()), lambda r: r**-1.5 / 4, lambda r: r.sqrt() / 4
    ),
    "kl": Divergence(lambda r: r * r.log(), lambda r: r.log() + 1, lambda r: 1 / r, lambda r: r),
    "jf": Divergence(  # Jeffreys, kl + rkl
        lambda r: (r - 1) * r.log(), lambda r: r.log() + 1 - 1 / r, lambda r: 1 / r + 1 / r**2, lambda r: r + 1
    ),
    "neyman": Divergence(lambda r: (1 - r) ** 2 / r, lambda r: 1 - 1 / r**2, lambda r: 2 / r**3, lambda r: 2 / r),
    "pearson": Divergence(lambda r: (r - 1) ** 2, lambda r: 2 * (r - 1), lambda r: torch.full_like(r, 2.0), lambda r: 2 * r**2),
}


def density_ratio(logits: Tensor, lowest: float = 0.1, highest: float = 20.0) -> Tensor:
    """r (n,) from the logits (n, heads) of a discriminator: exp of their mean, within [lowest, highest]. No gradient passes."""
    return logits.detach().mean(1).clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp().clamp(lowest, highest)


def matching_weights(divergence: str, ratio: Tensor) -> Tensor:
    """h(r) over its mean in the batch, (n,): what each sample's gradient of the reverse KL divergence is multiplied by."""
    if divergence not in DIVERGENCES:
        raise unknown("divergence", divergence, DIVERGENCES)
    h = DIVERGENCES[divergence].h(ratio)
    return h / (h.mean() + TINY)


class RatioBins(nn.Module):
    """Divides ratios by their average b_i among samples of like noise: the student's mean of p / q is 1 at every level, a critic's is not.

    b_i <- rho b_i + (1 - rho) m_i, with m_i the mean of a batch in bin i; a bin that a batch leaves empty keeps its b_i, at first 1.
    The averages are a parameter, so that this update is one of gradient descent and `forward` stays pure: it divides by the averages
    as they are with this batch, and returns the loss that moves them there at the rate `rate`, without momentum.
    """

    def __init__(self, bins: int = 10, rho: float = 0.0):
        super().__init__()
        self.rho = rho
        self.averages = nn.Parameter(torch.ones(bins))

    @property
    def rate(self) -> float:
        return 1 - self.rho

    def forward(self, ratio: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Ratios (n,) at places (n,) in [0, 1] of the range of noise levels -> the ratios normalised (n,), and the loss ()."""
        bins = len(self.averages)
        index = (place * bins).long().clamp(0, bins - 1)
        before = self.averages.detach()
        ratio = ratio.to(before)
        member = F.one_hot(index, bins).to(before)
        count = member.sum(0)
        mean = torch.where(count > 0, (member * ratio[:, None]).sum(0) / count.clamp_min(1), before)
        now = torch.where(count > 0, torch.lerp(before, mean, self.rate), before)
        return ratio / (now[index] + TINY), (self.averages - mean).square().sum() / 2
