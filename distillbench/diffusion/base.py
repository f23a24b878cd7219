"""What every noise schedule has: alpha, sigma, their derivatives, the log-SNR and its inverse."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError

Time = float | Tensor


def as_time(t: Time) -> Tensor:
    """t as a float64 tensor."""
    return t.to(torch.float64) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def broadcast(coefficient: float | Tensor, x: Tensor) -> float | Tensor:
    """A coefficient, of shape () or (n,), ready to multiply x (n, *shape) without changing its dtype."""
    if not isinstance(coefficient, Tensor) or coefficient.dim() == 0:
        return coefficient
    return coefficient.to(x).view(-1, *[1] * (x.dim() - 1))


def require(holds: bool, schedule: Schedule, rule: str) -> None:
    if not holds:
        raise UsageError(f"schedule {schedule.name!r}: {rule}")


class Schedule(ABC):
    """alpha, sigma and their derivatives per unit of t; tensors of the shape of t, float64.

    Where alpha(1) = 0 or sigma(0) = 0 the log-SNR is infinite. The derivative of sigma is infinite at t = 0 on the variance
    preserving schedules.
    """

    name: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Time) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Time) -> Tensor: ...

    @abstractmethod
    def d_alpha(self, t: Time) -> Tensor: ...

    @abstractmethod
    def d_sigma(self, t: Time) -> Tensor: ...

    @abstractmethod
    def _inverse(self, log_snr: Tensor) -> Tensor:
        """The time of a log-SNR, right inside the range of the schedule; the ends are `time_of`'s."""

    def levels(self, t: Time) -> tuple[Tensor, Tensor]:
        """alpha and sigma."""
        return self.alpha(t), self.sigma(t)

    def slopes(self, t: Time) -> tuple[Tensor, Tensor]:
        """The derivatives of alpha and sigma."""
        return self.d_alpha(t), self.d_sigma(t)

    def start(self, t: float) -> float:
        """The scale of the noise from which sampling starts at t: sigma(t)."""
        return float(self.sigma(t))

    def log_snr(self, t: Time) -> Tensor:
        """2 log(alpha / sigma): +inf where sigma is 0, -inf where alpha is 0."""
        alpha, sigma = self.levels(t)
        return 2 * (alpha.log() - sigma.log())

    def time_of(self, log_snr: Time) -> Tensor:
        """The inverse of `log_snr`. A value beyond what the schedule reaches, infinity included, gives the end point, 0 or 1."""
        value = as_time(log_snr)
        t = self._inverse(value).clamp(0, 1)
        t = torch.where(value == math.inf, torch.zeros_like(t), t)
        return torch.where(value == -math.inf, torch.ones_like(t), t)

    def to_config(self) -> dict[str, Any]:
        """The name and the fields, json-able; `from_config` reads it."""
        fields = asdict(self)  # type: ignore[call-overload]
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}
