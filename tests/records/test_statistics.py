"""Means, paired differences and Holm's correction against scipy and closed forms, and coverage by counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distillbench.statistics import Interval, holm, mean_interval, paired_comparison, paired_difference


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


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


@pytest.mark.parametrize("n", [2, 3, 8, 30])
@pytest.mark.parametrize("margin", [0.0, 0.4, -1.0])
def test_the_paired_test_is_scipys(n: int, margin: float) -> None:
    rng = rng_of(n)
    first, second = rng.normal(0.5, 1.0, n), rng.normal(0.0, 1.0, n)
    found = paired_comparison(dict(enumerate(first)), dict(enumerate(second)), margin=margin)
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel(first - margin, second, alternative="greater").pvalue, rel=1e-12, abs=1e-12)
    oracle = stats.ttest_1samp(first - second, margin, alternative="greater")
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-12, abs=1e-12)
    both = stats.ttest_1samp(first - second, margin).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx(((first - second).mean(), both.low, both.high), rel=1e-12)
    assert (found.n, found.margin) == (n, margin)
    assert found.interval == paired_difference(dict(enumerate(first)), dict(enumerate(second)))


def test_the_sign_of_a_comparison_is_about_its_margin() -> None:
    b = dict.fromkeys(range(6), 0.0)
    a = {seed: 1.0 + (-1) ** seed * 0.1 for seed in range(6)}
    signs = []
    for margin in (0.0, 1.0, 2.0):
        found = paired_comparison(a, b, margin=margin)
        assert found is not None
        assert found.p is not None
        assert (found.sign == 1) == (found.p < 0.025)
        signs.append(found.sign)
    assert signs == [1, 0, -1]


def test_one_pair_has_no_p_and_no_pair_no_comparison() -> None:
    found = paired_comparison({3: 2.0}, {3: 1.5, 4: 0.0}, margin=0.1)
    assert found == (0.5, -math.inf, math.inf, 1, None, 0.1)
    assert found.sign == 0
    assert paired_comparison({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(("difference", "p", "sign"), [(1.0, 0.0, 1), (0.25, 0.5, 0), (-1.0, 1.0, -1)])
def test_differences_without_scatter_are_taken_at_their_word(difference: float, p: float, sign: int) -> None:
    found = paired_comparison(dict.fromkeys(range(4), 2 + difference), dict.fromkeys(range(4), 2.0), margin=0.25)
    assert found == (difference, difference, difference, 4, p, 0.25)
    assert found.sign == sign


def test_holms_examples() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"alone": 0.2}) == {"alone": 0.2}
    assert holm({1: 0.6, 2: 0.7}) == {1: 1.0, 2: 1.0}
    assert list(holm({"z": 0.5, "a": 0.1})) == ["z", "a"]
    assert holm({}) == {}
    with pytest.raises(ValueError, match="outside"):
        holm({"a": math.nan})


P_VALUES = st.dictionaries(st.integers(), st.floats(0, 1), max_size=6)


@given(P_VALUES, st.floats(0.001, 0.5))
@settings(max_examples=200, deadline=None)
def test_holm_rejects_what_the_closed_test_of_bonferroni_rejects(p: dict[int, float], alpha: float) -> None:
    """Holm is the closure of Bonferroni: a hypothesis falls when every set of hypotheses that holds it has a p at or below alpha / size."""
    adjusted = holm(p)
    for name in p:
        sets = [group for k in range(1, len(p) + 1) for group in itertools.combinations(p, k) if name in group]
        closed = max(len(group) * min(p[other] for other in group) for group in sets)
        assert adjusted[name] == min(1.0, closed)
        assert (adjusted[name] <= alpha) == all(len(group) * min(p[other] for other in group) <= alpha for group in sets)


@given(P_VALUES)
@settings(max_examples=200, deadline=None)
def test_holm_lies_between_the_raw_and_bonferroni_and_keeps_the_order(p: dict[int, float]) -> None:
    adjusted = holm(p)
    assert list(adjusted) == list(p)
    assert all(p[name] <= adjusted[name] <= min(1.0, len(p) * p[name]) for name in p)
    assert all(adjusted[a] <= adjusted[b] for a in p for b in p if p[a] <= p[b])
