"""Noise schedules under one convention: x_t = alpha(t) x_0 + sigma(t) eps, t in [0, 1], 0 is clean.

Every schedule has a log-SNR, log(alpha^2 / sigma^2), that falls strictly with t, and its inverse. Two schedules that agree in
log-SNR differ only by a scale of x, so a denoiser of one serves the other (Kingma et al. 2021, "Variational Diffusion Models").
Times are float64; floats are accepted. All functions are differentiable in t where the schedule is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError, unknown
from .base import Schedule, Time, as_time, require


@dataclass(frozen=True)
class Flow(Schedule):
    """The straight path of flow matching and rectified flow: sigma = shift t / (1 + (shift - 1) t), alpha = 1 - sigma.

    shift 1 is sigma = t; above 1 more of the time is spent at high noise (Esser et al. 2024, eq. 23).
    """

    name: ClassVar[str] = "flow"
    shift: float = 1.0

    def __post_init__(self) -> None:
        require(self.shift > 0, self, f"shift must be above 0, got {self.shift}")

    def _denominator(self, t: Tensor) -> Tensor:
        return 1 + (self.shift - 1) * t

    def alpha(self, t: Time) -> Tensor:
        t = as_time(t)
        return (1 - t) / self._denominator(t)

    def sigma(self, t: Time) -> Tensor:
        t = as_time(t)
        return self.shift * t / self._denominator(t)

    def d_alpha(self, t: Time) -> Tensor:
        return -self.d_sigma(t)

    def d_sigma(self, t: Time) -> Tensor:
        return self.shift / self._denominator(as_time(t)) ** 2

    def _inverse(self, log_snr: Tensor) -> Tensor:
        alpha, sigma = torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)
        return sigma / (self.shift * alpha + sigma)


@dataclass(frozen=True)
class Trig(Schedule):
    """TrigFlow: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Lu & Song 2024), with the angle measured in units of pi / 2.

    The velocity per unit of t is pi / 2 times the paper's F = cos(.) eps - sin(.) x_0.
    """

    name: ClassVar[str] = "trig"

    def alpha(self, t: Time) -> Tensor:
        return torch.sin((1 - as_time(t)) * (math.pi / 2))  # not cos(pi t / 2), which misses 0 at t = 1

    def sigma(self, t: Time) -> Tensor:
        return torch.sin(as_time(t) * (math.pi / 2))

    def d_alpha(self, t: Time) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Time) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def _inverse(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr / 2)) * (2 / math.pi)


@dataclass(frozen=True)
class VPLinear(Schedule):
    """Variance preserving with beta(t) linear in t: alpha^2 = exp(-int_0^t beta) (Song et al. 2021, eq. 32-33)."""

    name: ClassVar[str] = "vp_linear"
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        require(0 < self.beta_min <= self.beta_max, self, f"needs 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + (self.beta_max - self.beta_min) / 2 * t)

    def alpha(self, t: Time) -> Tensor:
        return torch.exp(-self._integral(as_time(t)) / 2)

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(-self._integral(as_time(t)))).sqrt()

    def d_alpha(self, t: Time) -> Tensor:
        return -self._beta(as_time(t)) / 2 * self.alpha(t)

    def d_sigma(self, t: Time) -> Tensor:
        return self._beta(as_time(t)) / 2 * self.alpha(t) ** 2 / self.sigma(t)

    def _inverse(self, log_snr: Tensor) -> Tensor:
        total = (self.beta_min + self.beta_max) / 2
        integral = torch.logaddexp(torch.zeros_like(log_snr), -log_snr).clamp(max=total)
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt())


@dataclass(frozen=True)
class VPCosine(Schedule):
    """Variance preserving with alpha = cos(u(t)) / cos(u(0)), u = (t + s) / (1 + s) pi / 2 (Nichol & Dhariwal 2021, eq. 17)."""

    name: ClassVar[str] = "vp_cosine"
    s: float = 0.008

    def __post_init__(self) -> None:
        require(self.s >= 0, self, f"s must not be negative, got {self.s}")

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.s)

    @property
    def _start(self) -> float:
        return self.s * self._rate

    def alpha(self, t: Time) -> Tensor:
        return torch.sin((1 - as_time(t)) * self._rate) / math.cos(self._start)  # exactly 0 at t = 1

    def sigma(self, t: Time) -> Tensor:
        angle = as_time(t) * self._rate  # 1 - alpha^2 without cancellation at small t
        return (torch.sin(angle) * torch.sin(angle + 2 * self._start)).sqrt() / math.cos(self._start)

    def d_alpha(self, t: Time) -> Tensor:
        return -self._rate * torch.cos((1 - as_time(t)) * self._rate) / math.cos(self._start)

    def d_sigma(self, t: Time) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def _inverse(self, log_snr: Tensor) -> Tensor:
        alpha2, sigma2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
        sine = (sigma2 + alpha2 * math.sin(self._start) ** 2).sqrt()
        return (torch.atan2(sine, alpha2.sqrt() * math.cos(self._start)) - self._start) / self._rate


@dataclass(frozen=True)
class VPTable(Schedule):
    """Variance preserving from a trained model's table: alpha^2 = alphas_cumprod[i] at t = (i + 1) / T, i = 0 ... T - 1.

    Between these times the log-SNR is interpolated linearly. Towards an infinite log-SNR that is impossible, so on [0, 1 / T], and on
    the last interval of a table that ends in 0, alpha^2 is: t = 0 is clean. The table must fall strictly; its last value may be 0.
    """

    name: ClassVar[str] = "vp_table"
    alphas_cumprod: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas_cumprod", tuple(float(a) for a in self.alphas_cumprod))
        values = (1.0, *self.alphas_cumprod)
        falls = all(a > b for a, b in pairwise(values))
        rule = "alphas_cumprod needs two or more values that fall strictly from below 1 to no less than 0"
        require(len(values) > 2 and falls and values[-1] >= 0, self, rule)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.alphas_cumprod)

    @cached_property
    def _intervals(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """For each of the T intervals: alpha^2 at its start and its step, the same of the log-SNR, and whether alpha^2 is interpolated."""
        alpha2 = torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)
        log_snr = alpha2.log() - torch.log1p(-alpha2)
        by_square = torch.isinf(log_snr[:-1]) | torch.isinf(log_snr[1:])
        slope = torch.where(by_square, torch.ones(()), log_snr.diff())
        return alpha2[:-1], alpha2.diff(), log_snr[:-1], slope, by_square

    def _squares(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """alpha^2, sigma^2 and the derivative of alpha^2."""
        t = as_time(t)
        position = t * len(self.alphas_cumprod)
        low = position.detach().long().clamp(0, len(self.alphas_cumprod) - 1)
        first, step, start, slope, by_square = (values.to(t.device)[low] for values in self._intervals)
        part = position - low
        log_snr = start + slope * part
        a2 = torch.where(by_square, first + step * part, torch.sigmoid(log_snr))
        s2 = torch.where(by_square, (1 - first) - step * part, torch.sigmoid(-log_snr))
        return a2, s2, len(self.alphas_cumprod) * torch.where(by_square, step, a2 * s2 * slope)

    def levels(self, t: Time) -> tuple[Tensor, Tensor]:
        a2, s2, _ = self._squares(t)
        return a2.sqrt(), s2.sqrt()

    def slopes(self, t: Time) -> tuple[Tensor, Tensor]:
        a2, s2, change = self._squares(t)
        return change / (2 * a2.sqrt()), -change / (2 * s2.sqrt())

    def start(self, t: float) -> float:
        """1 at the end of the table, though its sigma may lie a little below: where the samplers of such models start."""
        return 1.0 if t == 1 else super().start(t)

    def alpha(self, t: Time) -> Tensor:
        return self.levels(t)[0]

    def sigma(self, t: Time) -> Tensor:
        return self.levels(t)[1]

    def d_alpha(self, t: Time) -> Tensor:
        return self.slopes(t)[0]

    def d_sigma(self, t: Time) -> Tensor:
        return self.slopes(t)[1]

    def _inverse(self, log_snr: Tensor) -> Tensor:
        first, step, start, slope, by_square = (values.to(log_snr.device) for values in self._intervals)
        low = torch.searchsorted(-start, -log_snr.detach().contiguous(), right=True).sub(1).clamp(min=0)
        by_log = (log_snr - start[low]) / slope[low]
        square = ((1 - first[low]) - torch.sigmoid(-log_snr)) / step[low]
        return (low + torch.where(by_square[low], square, by_log)) / len(self.alphas_cumprod)


@dataclass(frozen=True)
class EDM(Schedule):
    """Variance exploding with the time steps of Karras et al. 2022 (eq. 5): alpha = 1, sigma^(1/rho) linear in t.

    sigma(0) is sigma_min, not 0: what a solver returns at t = 0 still carries that little noise.
    """

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        ordered = 0 < self.sigma_min < self.sigma_max
        require(ordered, self, f"needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        require(self.rho > 0, self, f"rho must be above 0, got {self.rho}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        low, high = self._ends
        return (low + as_time(t) * (high - low)) ** self.rho

    def d_alpha(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def d_sigma(self, t: Time) -> Tensor:
        low, high = self._ends
        return self.rho * (high - low) * (low + as_time(t) * (high - low)) ** (self.rho - 1)

    def _inverse(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends
        return (torch.exp(-log_snr / (2 * self.rho)) - low) / (high - low)


SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (Flow, Trig, VPLinear, VPCosine, VPTable, EDM)}


def get_schedule(name: str, **fields: Any) -> Schedule:
    """The schedule `name` (a key of SCHEDULES) with its fields; an unknown name or field is a UsageError."""
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    try:
        return SCHEDULES[name](**fields)
    except TypeError as error:
        raise UsageError(f"schedule {name!r} cannot be made of the fields {sorted(fields)}: {error}") from None


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule that `Schedule.to_config` described."""
    fields = dict(config)
    if "name" not in fields:
        raise UsageError("a schedule's configuration needs a 'name'")
    return get_schedule(fields.pop("name"), **fields)


def match_time(source: Schedule, t: Time, target: Schedule) -> Tensor:
    """The time t' at which `target` has the log-SNR that `source` has at t; the nearer end where it never does.

    At the ends of infinite log-SNR the value is right, and its derivative is given as 0.
    """
    return as_time(t) if source == target else target.time_of(source.log_snr(t))


def match_scale(source: Schedule, t: Time, target: Schedule, target_t: Time) -> Tensor:
    """The factor that takes x on `source` at t to x on `target` at the matching time: the ratio of sqrt(alpha^2 + sigma^2)."""
    return torch.hypot(*target.levels(target_t)) / torch.hypot(*source.levels(t))
