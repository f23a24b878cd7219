"""Intervals against scipy, and their coverage by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from distillbench.statistics import Interval, mean_interval, paired_difference


@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_the_mean_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(3.0, 2.0, n)
    found = mean_interval(values.tolist())
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert found[:3] == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert found.n == n


def test_the_paired_interval_uses_shared_seeds_alone() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(0, 5, 10)
    a = {seed: float(common[seed] + 1 + rng.normal(0, 0.1)) for seed in range(10)}
    b = {seed: float(common[seed]) for seed in range(2, 10)} | {99: 1e9}
    found = paired_difference(a, b)
    assert found is not None
    differences = [a[seed] - b[seed] for seed in range(2, 10)]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (found.n, found.sign) == (8, 1)
    assert paired_difference(a, {77: 1.0}) is None


def test_one_value_decides_nothing() -> None:
    found = mean_interval([5.0])
    assert (found.value, found.low, found.high, found.sign) == (5.0, -math.inf, math.inf, 0)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_signs() -> None:
    assert [Interval(0, low, high, 2).sign for low, high in ((0.1, 1), (-1, -0.1), (-1, 1), (0, 1))] == [1, -1, 0, 0]


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for values in rng.normal(1.0, 3.0, (2000, 5)):
        found = mean_interval(values.tolist())
        hits += found.low <= 1.0 <= found.high
    assert 0.935 < hits / 2000 < 0.965
