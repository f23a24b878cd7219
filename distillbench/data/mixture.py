"""A class-conditional Gaussian mixture in the plane whose denoiser is known in closed form, for any schedule.

Eight classes of four modes. Within a class the weights span 12:1; every covariance has its own size, shape and angle; no
two modes mirror each other, so a bug cannot hide behind a symmetry. The whole has mean 0 and unit variance per dimension.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..conditions import Conditions
from ..diffusion import Denoiser, Schedule
from ..errors import ContractError
from ..networks.backbone import Output
from ..randomness import mix

CLASSES, MODES = 8, 4
WEIGHT_RATIO = 12.0  # largest over smallest weight within a class
SEED = 20


@dataclass(frozen=True, eq=False)
class Mixture:
    """means (C, M, 2), covariances (C, M, 2, 2), weights (C, M) with rows that sum to 1; float64. Classes are equally likely."""

    means: Tensor
    covariances: Tensor
    weights: Tensor

    @property
    def classes(self) -> int:
        return self.means.shape[0]

    @property
    def modes(self) -> int:
        """Modes per class."""
        return self.means.shape[1]

    @cached_property
    def sha256(self) -> str:
        """A checksum of the parameters to nine decimals, the same on every machine."""
        numbers = torch.cat([value.flatten() for value in (self.means, self.covariances, self.weights)]).tolist()
        return hashlib.sha256(" ".join(f"{number:.9f}" for number in numbers).encode()).hexdigest()

    @cached_property
    def _roots(self) -> Tensor:
        return torch.linalg.cholesky(self.covariances)

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        """Variances (C, M, 2) along the principal axes, and the axes as columns (C, M, 2, 2)."""
        variances, axes = torch.linalg.eigh(self.covariances)
        return variances, axes

    @cached_property
    def _bounds(self) -> Tensor:
        return self.weights.cumsum(1)[:, :-1].contiguous()

    def conditions(self, labels: Tensor) -> Conditions:
        """Labels (n,) as conditions; the null label is the number of classes."""
        return Conditions({"label": labels}, {"label": self.classes})

    def sample(self, n: int, generator: torch.Generator, labels: Tensor | None = None) -> tuple[Tensor, Conditions]:
        """Exact samples (n, 2) in float64 and their labels: drawn from all classes alike, or the given ones (n,)."""
        if labels is None:
            labels = torch.randint(self.classes, (n,), generator=generator)
        u = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        mode = (u >= self._bounds[labels]).sum(1)
        noise = torch.randn(n, 2, 1, generator=generator, dtype=torch.float64)
        x = self.means[labels, mode] + (self._roots[labels, mode] @ noise).squeeze(-1)
        return x, self.conditions(labels)

    def mahalanobis(self, x: Tensor) -> Tensor:
        """Squared Mahalanobis distances (n, C, M) of points (n, 2) from every mode."""
        return self._terms(x, 1.0, 0.0)[0]

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(mode, x | class), (n, C, M), at points (n, 2)."""
        return self._terms(x, 1.0, 0.0)[1]

    def responsibilities(self, x: Tensor, labels: Tensor) -> Tensor:
        """p(mode | x, class), (n, M), of points (n, 2) in their own classes (n,)."""
        return self._terms(x, 1.0, 0.0, labels)[1].squeeze(1).softmax(-1)

    def class_posterior(self, x: Tensor) -> Tensor:
        """p(class | x), (n, C)."""
        return self.log_joint(x).logsumexp(-1).softmax(-1)

    def posterior_mean(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Tensor) -> Tensor:
        """E[x_0 | x_t = x, label], (n, 2) in float64, for x_t = alpha x_0 + sigma eps; alpha, sigma () or (n,).

        The null label (the number of classes) stands for all classes together. Well defined at both ends: sigma = 0
        returns x / alpha, alpha = 0 returns the mean of the class.
        """
        null = labels == self.classes
        if not bool(null.any()):
            _, log_joint, means = self._terms(x, alpha, sigma, labels)
        else:
            _, log_joint, means = self._terms(x, alpha, sigma)
            own = torch.arange(self.classes, device=labels.device) == labels[:, None]
            log_joint = log_joint.masked_fill(~(own | null[:, None]).unsqueeze(-1), -math.inf)
        share = log_joint.flatten(1).softmax(-1)
        return (share.unsqueeze(-1) * means.flatten(1, 2)).sum(1)

    def _terms(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """For each mode: squared distance and log p(mode, x_t | class), (n, C, M); E[x_0 | x_t, mode], (n, C, M, 2).

        With labels (n,) only the modes of these classes, which is faster: the axis C then has length 1.
        """
        tables = (self.means, *self._axes, self.weights)
        means, variances, axes, weights = (v.to(x.device) if labels is None else v.to(x.device)[labels[:, None]] for v in tables)
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64, device=x.device).reshape(-1, 1, 1, 1) for v in (alpha, sigma))
        noised = alpha**2 * variances + sigma**2
        along = ((x.double()[:, None, None] - alpha * means).unsqueeze(-1) * axes).sum(-2)
        squares = (along**2 / noised).sum(-1)
        log_joint = weights.log() - 0.5 * (squares + noised.log().sum(-1)) - math.log(2 * math.pi)
        pulled = means + ((alpha * variances / noised * along).unsqueeze(-2) * axes).sum(-1)
        return squares, log_joint, pulled


class ExactMixture(nn.Module):
    """The exact denoiser as a network: (x, t, conditions) on `schedule` -> Output(E[x_0 | x_t, label]).

    Computes in float64 and answers in the dtype of x.
    """

    capabilities = frozenset({"jvp"})

    def __init__(self, mixture: Mixture, schedule: Schedule):
        super().__init__()
        self.mixture = mixture
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, *, second_time: Tensor | None = None,
                guidance: Tensor | None = None, taps: Sequence[str] = (), stop: bool = False) -> Output:  # fmt: skip
        if second_time is not None or guidance is not None or taps or stop:
            raise ContractError("the exact denoiser of a mixture has no second time, guidance input or taps")
        time = t.double()
        x0 = self.mixture.posterior_mean(x, self.schedule.alpha(time), self.schedule.sigma(time), conditions.field("label"))
        return Output(prediction=x0.to(x.dtype), features={}, log_variance=None)


def exact_denoiser(mixture: Mixture, schedule: Schedule) -> Denoiser:
    """The exact denoiser of the mixture on any schedule, with exact score, velocity and guidance."""
    return Denoiser(ExactMixture(mixture, schedule), schedule, "x0")  # type: ignore[arg-type]  # a network without surgery


class MixtureSource:
    """Training examples: fresh exact samples in float32."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        x, conditions = self.mixture.sample(n, generator)
        return x.float(), conditions

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return self.mixture.conditions(torch.randint(self.mixture.classes, (n,), generator=generator))


def standard_mixture() -> Mixture:
    """The mixture of the track `mixture2d@1`, from whole-number hashes: the same on every machine and torch version."""
    draws = _Uniform(SEED)
    means: list[list[tuple[float, float]]] = []
    for _ in range(CLASSES):
        means.append(_place(draws, [point for row in means for point in row]))
    covariances = [[_covariance(draws) for _ in range(MODES)] for _ in range(CLASSES)]
    weights = [_weights(draws) for _ in range(CLASSES)]
    return _standardised(*(torch.tensor(v, dtype=torch.float64) for v in (means, covariances, weights)))


class _Uniform:
    """Numbers in [0, 1) by counting: the k-th depends on (seed, k) alone."""

    def __init__(self, seed: int):
        self.seed, self.count = seed, 0

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        self.count += 1
        return low + (high - low) * mix(self.seed, self.count) / 2**63


def _place(draws: _Uniform, others: list[tuple[float, float]], within: float = 0.4, across: float = 0.2) -> list[tuple[float, float]]:
    """Four centres in the square [-1, 1]^2: `within` apart from each other and `across` from those of other classes."""
    for _ in range(100_000):
        placed = [(draws(-1, 1), draws(-1, 1)) for _ in range(MODES)]
        pairs = [(a, b) for i, a in enumerate(placed) for b in placed[:i]]
        if all(math.dist(a, b) > within for a, b in pairs) and all(math.dist(a, b) > across for a in placed for b in others):
            return placed
    raise RuntimeError("no room left for another class")


def _covariance(draws: _Uniform) -> list[list[float]]:
    """A standard deviation of 0.025 to 0.05 across an axis of any angle, and 1.3 to 3 times that along it."""
    minor = draws(0.025, 0.05)
    major = minor * draws(1.3, 3.0)
    c, s = math.cos(angle := draws(0, math.pi)), math.sin(angle)
    return [[(major * c) ** 2 + (minor * s) ** 2, (major**2 - minor**2) * c * s],
            [(major**2 - minor**2) * c * s, (major * s) ** 2 + (minor * c) ** 2]]  # fmt: skip


def _weights(draws: _Uniform) -> list[float]:
    """Weights that span exactly WEIGHT_RATIO, in random order."""
    powers = [0.0, 1.0, draws(0.1, 0.9), draws(0.1, 0.9)]
    powers.sort(key=lambda _: draws())
    raw = [WEIGHT_RATIO**power for power in powers]
    return [w / sum(raw) for w in raw]


def _standardised(means: Tensor, covariances: Tensor, weights: Tensor) -> Mixture:
    """Shifted and scaled per dimension to mean 0 and variance 1 over all classes."""
    share = (weights / len(weights)).unsqueeze(-1)
    means = means - (share * means).sum((0, 1))
    variance = (share * (means**2 + covariances.diagonal(dim1=-2, dim2=-1))).sum((0, 1))
    scale = variance.rsqrt()
    return Mixture(means * scale, covariances * scale.outer(scale), weights)
