"""Means, differences and their intervals over seeds. Pure functions of numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.special import stdtrit


class Interval(NamedTuple):
    """A value and its interval; n is the number of seeds behind it. With one seed the interval is unbounded: nothing is known."""

    value: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def sign(self) -> int:
        """1 if wholly above 0, -1 if wholly below, else 0: undecided."""
        return int(self.low > 0) - int(self.high < 0)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean and its two-sided Student t interval, values taken as independent draws; raises `ValueError` if there are none."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to average")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Interval | None:
    """The mean of a - b over the seeds that both have, with its t interval; None if they share none."""
    shared = sorted(a.keys() & b.keys())
    return mean_interval([a[seed] - b[seed] for seed in shared], level) if shared else None
