"""Means, differences, bootstraps and their intervals over training seeds. Pure functions of numbers, no torch, nothing else imported.

What is resampled takes a numpy `Generator` and draws from nothing else. Errors in the call (no values, a NaN, a level outside (0, 1)) are
`ValueError`: the caller has checked what users give.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

Name = TypeVar("Name", bound=Hashable)

RESAMPLES = 10_000
# Scores in records carry low, high = value -+ NORMAL_95 standard deviations of their sampling noise.
NORMAL_95 = 1.96


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


class SeedScore(NamedTuple):
    """One training's score. deviation: standard deviation of its sampling noise, that of scoring finitely many samples; 0 if none."""

    seed: int
    value: float
    deviation: float = 0.0

    @classmethod
    def from_bounds(cls, seed: int, value: float, low: float | None, high: float | None) -> SeedScore:
        """From a score as records carry it; without bounds the sampling noise is unknown and counted as none."""
        return cls(seed, value, 0.0 if low is None or high is None else (high - low) / (2 * NORMAL_95))


class Comparison(NamedTuple):
    """The mean of paired differences, its two-sided interval, the number n of pairs, and p of the one-sided test that it exceeds `margin`.

    One pair decides nothing: the interval is unbounded and p is None.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None
    margin: float = 0.0

    @property
    def interval(self) -> Interval:
        return Interval(self.value, self.low, self.high, self.n)

    @property
    def sign(self) -> int:
        """1 if the interval lies wholly above the margin, -1 if wholly below, else 0: undecided."""
        return int(self.low > self.margin) - int(self.high < self.margin)


class Extrapolation(NamedTuple):
    """The intercept a of a + c / n with its interval. n: number of points.  slope: c.  error: standard error of a, infinite at 2 points."""

    value: float
    low: float
    high: float
    n: int
    slope: float
    error: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean and its two-sided Student t interval, values taken as independent draws; raises `ValueError` if there are none."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to average")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * _standard_error(values, mean)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Interval | None:
    """The mean of a - b over the seeds that both have, with its t interval; None if they share none."""
    found = paired_comparison(a, b, level=level)
    return None if found is None else found.interval


def paired_comparison(a: Mapping[int, float], b: Mapping[int, float], *, margin: float = 0.0, level: float = 0.95) -> Comparison | None:
    """The paired t test of a - b > margin over the seeds that both have; None if they share none.

    p is one-sided, for "the mean difference exceeds the margin" against "it does not"; the interval is two-sided. Differences without
    any scatter are taken at their word: p is 0, 1 or, exactly at the margin, 1/2, and the interval is a point.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    differences = [a[seed] - b[seed] for seed in shared]
    mean, low, high, n = mean_interval(differences, level)
    if n == 1:
        return Comparison(mean, low, high, 1, None, margin)
    error, excess = _standard_error(differences, mean), mean - margin
    t = excess / error if error > 0 else math.copysign(math.inf, excess) if excess else 0.0
    return Comparison(mean, low, high, n, float(stdtr(n - 1, -t)), margin)


def nested_bootstrap(
    scores: Sequence[SeedScore], *, rng: np.random.Generator, shared: bool = True, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval:
    """The mean over trainings and its percentile interval by the bootstrap over seeds with normal sampling noise nested in it.

    A resample draws n trainings with replacement and moves each by its sampling noise. shared: all trainings are evaluated on the same
    noise and conditions, so that their sampling errors go up and down together: one normal number is drawn a resample and scales every
    deviation. More seeds do not average such noise away. That the errors are one and the same is the cautious end: where they are
    less alike, the scatter between seeds already holds part of them. With shared=False each draw has noise of its own (and the scatter
    between seeds holds such noise already, so that it counts twice: cautious again).
    The variance is that of the seeds, S^2 (n - 1) / n^2 with S^2 over n - 1, plus s^2 if shared, else s^2 / n, for one deviation s.
    As every percentile bootstrap it is too narrow at few seeds, by sqrt((n - 1) / n) and by normal in the place of t quantiles:
    below about ten seeds `mean_interval` is the one to quote where sampling noise is small.
    """
    values, deviations = _finite([s.value for s in scores]), _finite([s.deviation for s in scores])
    if (deviations < 0).any():
        raise ValueError("a deviation below 0")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    drawn = _resampled(n, resamples, rng)
    noise = rng.standard_normal((resamples, 1 if shared else n))
    return Interval(mean, *_percentiles((values[drawn] + noise * deviations[drawn]).mean(1), level), n)


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean of the middle half: floor(n / 4) values fall off at either end (Agarwal et al. 2021, arXiv:2108.13264)."""
    return float(_middle_mean(_finite(values)[None])[0])


def interquartile_mean_interval(
    values: Sequence[float], *, rng: np.random.Generator, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval:
    """The interquartile mean over seeds with its percentile bootstrap interval; unbounded at one seed."""
    array = _finite(values)
    value = interquartile_mean(values)
    if len(array) == 1:
        return Interval(value, -math.inf, math.inf, 1)
    return Interval(value, *_percentiles(_middle_mean(array[_resampled(len(array), resamples, rng)]), level), len(array))


def probability_of_improvement(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> Interval:
    """P(A > B) + P(A = B) / 2 for one training of each, all pairs of seeds counted; n is the smaller number of seeds. Undecided around 1/2.

    That is Mann and Whitney's U / (m n). The interval holds every P from which the estimate is at most z standard errors away, the error
    being Hanley and McNeil's at that P (Newcombe 2006, method 5). Resampling would give complete separation an interval of no width,
    and of three seeds against three one pair in ten is separated by chance. One seed on a side: the interval is [0, 1].
    """
    ours, others = _finite(a), _finite(b)
    m, n = len(ours), len(others)
    value = float((np.sign(ours[:, None] - others).mean() + 1) / 2)
    if min(m, n) == 1:
        return Interval(value, 0.0, 1.0, 1)
    z = float(ndtri(0.5 + _inside(level) / 2))
    apart = (m + n) / 2 - 1

    def inside(p: float) -> bool:
        variance = p * (1 - p) * (1 + apart * ((1 - p) / (2 - p) + p / (1 + p))) / (m * n)
        return (value - p) ** 2 <= z * z * variance

    def edge(outer: float) -> float:
        """Where `inside` changes between the estimate, which is inside or at the edge itself, and 0 or 1."""
        inner = value
        if inner == outer:
            return outer
        for _ in range(60):
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if inside(middle) else (inner, middle)
        return inner

    return Interval(value, edge(0.0), edge(1.0), min(m, n))


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's step-down adjusted p values, in the order given: reject those at or below alpha, and any is false at most so often.

    The i-th smallest of m is multiplied by m - i + 1, is no less than the adjusted one before it, and at most 1 (Holm 1979).
    """
    if any(not 0 <= p <= 1 for p in p_values.values()):
        raise ValueError("a p value outside [0, 1]")
    adjusted: dict[Name, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def extrapolate(points: Sequence[tuple[int, float]], *, weights: Sequence[float] | None = None, level: float = 0.95) -> Extrapolation:
    """A score biased by c / n, at infinitely many samples: least squares of value = a + c / n (Chong and Forsyth 2020, arXiv:1911.07023).

    points: (n, value), of two different n at least.  weights: of the squared residuals, up to a factor one over the variances; even if
    None. The error is that of the fit, from its residuals with t quantiles: it takes the points for independent, which values from
    parts of one set of samples are not, and says nothing of how those samples fell.
    """
    n, values = _finite([n for n, _ in points]), _finite([value for _, value in points])
    if (n <= 0).any() or len(np.unique(n)) < 2:
        raise ValueError("extrapolation takes two different numbers of samples at least, all positive")
    w = np.ones(len(n)) if weights is None else _finite(weights)
    if w.shape != n.shape or (w <= 0).any():
        raise ValueError("weights are positive, one for each point")
    w = w / w.sum()
    x = 1 / n
    centre, level_value = float(w @ x), float(w @ values)
    spread = float(w @ (x - centre) ** 2)
    slope = float(w @ ((x - centre) * values)) / spread
    value = level_value - slope * centre
    free = len(n) - 2
    if free == 0:
        return Extrapolation(value, -math.inf, math.inf, 2, slope, math.inf)
    residual = float(w @ (values - value - slope * x) ** 2) / free
    error = math.sqrt(residual * (1 + centre * centre / spread))
    half = float(stdtrit(free, 0.5 + _inside(level) / 2)) * error
    return Extrapolation(value, value - half, value + half, len(n), slope, error)


def _standard_error(values: Sequence[float], mean: float) -> float:
    """Of the mean of n >= 2 independent values."""
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _middle_mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interquartile means of rows (k, n)."""
    cut = rows.shape[1] // 4
    return np.asarray(np.sort(rows, axis=1)[:, cut : rows.shape[1] - cut].mean(1))


def _resampled(n: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices (resamples, n) of draws with replacement."""
    return rng.integers(0, n, (resamples, n))


def _percentiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    tail = (1 - _inside(level)) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _finite(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError("no values, or one that is NaN or infinite")
    return array


def _inside(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a level of {level}; it lies between 0 and 1")
    return level
