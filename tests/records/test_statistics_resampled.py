"""What is resampled, counted over pairs or extrapolated, against scipy and closed forms, and coverage by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from distillbench.metrics.frechet import frechet_distance_from_moments
from distillbench.statistics import (
    NORMAL_95,
    Interval,
    SeedScore,
    extrapolate,
    interquartile_mean,
    interquartile_mean_interval,
    nested_bootstrap,
    probability_of_improvement,
)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def deviation_of(interval: Interval) -> float:
    """Of a normal distribution with this 95 % interval."""
    return interval.half_width / float(stats.norm.ppf(0.975))


def test_a_score_of_a_record_gives_its_deviation() -> None:
    low, high = 3.0 - NORMAL_95 * 0.5, 3.0 + NORMAL_95 * 0.5
    assert SeedScore.from_bounds(4, 3.0, low, high) == (4, 3.0, pytest.approx(0.5, rel=1e-14))
    assert SeedScore.from_bounds(4, 3.0, None, None) == (4, 3.0, 0.0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_without_sampling_noise_the_bootstrap_is_scipys(n: int, shared: bool) -> None:
    values = rng_of(n).normal(3.0, 2.0, n)
    scores = [SeedScore(seed, value) for seed, value in enumerate(values.tolist())]
    found = nested_bootstrap(scores, rng=rng_of(1), shared=shared, resamples=3000, level=0.9)
    oracle = stats.bootstrap((values,), np.mean, n_resamples=3000, confidence_level=0.9, method="percentile", rng=rng_of(1))
    assert found == pytest.approx((values.mean(), *oracle.confidence_interval, n), rel=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_the_nested_bootstrap_has_the_closed_variance(shared: bool) -> None:
    n, s = 40, 0.4
    values = rng_of(0).normal(1.0, 2.0, n)
    found = nested_bootstrap([SeedScore(i, v, s) for i, v in enumerate(values.tolist())], rng=rng_of(1), shared=shared, resamples=100_000)
    variance = values.var(ddof=1) / n * (n - 1) / n + s**2 / (1 if shared else n)
    assert deviation_of(found) == pytest.approx(math.sqrt(variance), rel=0.01)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)


def test_shared_sampling_noise_does_not_average_out() -> None:
    scores = [SeedScore(seed, 5.0, 0.3) for seed in range(25)]
    assert deviation_of(nested_bootstrap(scores, rng=rng_of(0), resamples=100_000)) == pytest.approx(0.3, rel=0.01)
    assert deviation_of(nested_bootstrap(scores, rng=rng_of(0), shared=False, resamples=100_000)) == pytest.approx(0.06, rel=0.01)


def test_the_nested_bootstrap_covers_where_the_sampling_noise_is_common() -> None:
    """Every training moves by its seed, and all of them by one error of sampling: intervals of the seeds alone miss the truth."""
    rng, n, s = rng_of(3), 12, 1.0
    hits = {True: 0, False: 0}
    for _ in range(1000):
        values = rng.normal(0.0, 1.0, n) + rng.normal(0.0, s)
        for nested in hits:
            found = nested_bootstrap([SeedScore(i, v, s * nested) for i, v in enumerate(values.tolist())], rng=rng, resamples=500)
            hits[nested] += found.low <= 0 <= found.high
    assert 0.935 < hits[True] / 1000 < 0.965
    assert hits[False] / 1000 < 0.5


def test_resampling_draws_from_its_generator_alone() -> None:
    scores = [SeedScore(seed, float(seed), 0.5) for seed in range(5)]
    values = [score.value for score in scores]
    np.random.seed(0)
    first = nested_bootstrap(scores, rng=rng_of(0)), interquartile_mean_interval(values, rng=rng_of(0))
    np.random.seed(1)
    assert first == (nested_bootstrap(scores, rng=rng_of(0)), interquartile_mean_interval(values, rng=rng_of(0)))
    assert first[0] != nested_bootstrap(scores, rng=rng_of(1))


def test_one_seed_decides_nothing_under_any_bootstrap() -> None:
    assert nested_bootstrap([SeedScore(0, 5.0, 0.1)], rng=rng_of(0)) == (5.0, -math.inf, math.inf, 1)
    assert interquartile_mean_interval([5.0], rng=rng_of(0)) == (5.0, -math.inf, math.inf, 1)
    assert probability_of_improvement([5.0], [1.0, 2.0]) == (1.0, 0.0, 1.0, 1)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 8, 41])
def test_the_interquartile_mean_is_scipys_trimmed_mean(n: int) -> None:
    values = rng_of(n).standard_cauchy(n)
    assert interquartile_mean(values.tolist()) == pytest.approx(stats.trim_mean(values, 0.25), rel=1e-12)


def test_the_interval_of_the_interquartile_mean_is_scipys() -> None:
    values = rng_of(9).standard_cauchy(9)
    found = interquartile_mean_interval(values.tolist(), rng=rng_of(2), resamples=2000)

    def middle(x: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(stats.trim_mean(x, 0.25, axis=axis))

    oracle = stats.bootstrap((values,), middle, n_resamples=2000, method="percentile", vectorized=True, rng=rng_of(2))
    assert found == pytest.approx((stats.trim_mean(values, 0.25), *oracle.confidence_interval, 9), rel=1e-12)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (3, 5), (8, 8), (30, 20)])
def test_the_probability_of_improvement_is_mann_and_whitneys(m: int, n: int) -> None:
    rng = rng_of(m)
    a, b = rng.integers(0, 6, m).astype(float), rng.integers(0, 5, n).astype(float)  # with ties
    found = probability_of_improvement(a.tolist(), b.tolist())
    assert found.value == pytest.approx(stats.mannwhitneyu(a, b).statistic / (m * n), rel=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1
    turned = probability_of_improvement(b.tolist(), a.tolist())
    assert (turned.value, turned.low, turned.high) == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low), abs=1e-12)


def test_the_edges_are_z_errors_of_hanley_and_mcneil_away() -> None:
    a, b = rng_of(0).normal(0.7, 1, 6).tolist(), rng_of(1).normal(0, 1, 6).tolist()
    found = probability_of_improvement(a, b, level=0.9)
    for p in (found.low, found.high):
        q1, q2 = p / (2 - p), 2 * p**2 / (1 + p)
        variance = (p * (1 - p) + 5 * (q1 - p**2) + 5 * (q2 - p**2)) / 36
        assert abs(found.value - p) == pytest.approx(stats.norm.ppf(0.95) * math.sqrt(variance), rel=1e-9)


def test_complete_separation_of_few_seeds_is_not_certainty() -> None:
    few, many = (probability_of_improvement(list(range(n, 2 * n)), list(range(n))) for n in (3, 30))
    assert (few.value, few.high, many.value, many.high) == (1, 1, 1, 1)
    assert few.low < 0.6
    assert 0.85 < many.low < 1


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_interval_of_improvement_covers(shift: float) -> None:
    rng, truth = rng_of(5), float(stats.norm.cdf(shift / math.sqrt(2)))
    hits = 0
    for _ in range(1000):
        found = probability_of_improvement(rng.normal(shift, 1, 8).tolist(), rng.normal(0, 1, 8).tolist())
        hits += found.low <= truth <= found.high
    assert 0.93 < hits / 1000 < 0.985


def test_a_line_in_one_over_n_is_found() -> None:
    found = extrapolate([(n, 2.5 + 300 / n) for n in (250, 500, 1000, 2000)])
    assert (found.value, found.slope) == pytest.approx((2.5, 300.0), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((2.5, 2.5), abs=1e-9)
    two = extrapolate([(10, 1.0), (20, 0.5)])
    assert two == (pytest.approx(0.0, abs=1e-12), -math.inf, math.inf, 2, pytest.approx(10.0), math.inf)


def test_the_fit_and_its_error_are_scipys_and_numpys() -> None:
    rng = rng_of(0)
    n = np.array([100, 200, 400, 400, 800, 1600])
    values, weights = 1 + 50 / n + rng.normal(0, 0.05, 6), rng.uniform(0.5, 4, 6)
    points = list(zip(n.tolist(), values.tolist(), strict=True))
    plain, oracle = extrapolate(points), stats.linregress(1 / n, values)
    assert (plain.value, plain.slope, plain.error) == pytest.approx((oracle.intercept, oracle.slope, oracle.intercept_stderr), rel=1e-9)
    assert plain.high - plain.value == pytest.approx(stats.t.ppf(0.975, 4) * oracle.intercept_stderr, rel=1e-9)
    (slope, intercept), covariance = np.polyfit(1 / n, values, 1, w=np.sqrt(weights), cov=True)
    weighted = extrapolate(points, weights=weights.tolist())
    assert (weighted.value, weighted.slope, weighted.error) == pytest.approx((intercept, slope, math.sqrt(covariance[1, 1])), rel=1e-9)


def test_the_interval_of_the_intercept_covers() -> None:
    rng, hits = rng_of(1), 0
    for noise in rng.normal(0, 0.1, (1000, 5)):
        found = extrapolate([(n, 1 + 20 / n + e) for n, e in zip((50, 100, 150, 200, 400), noise.tolist(), strict=True)])
        hits += found.low <= 1 <= found.high
    assert 0.93 < hits / 1000 < 0.97


def test_gaussians_are_extrapolated_to_their_closed_distance() -> None:
    """N(0, I) against N(0, 1.5^2 I) in d dimensions is d / 4 apart. Fréchet distances of finite samples lie above it."""
    rng, d = rng_of(0), 8
    mean, covariance = np.zeros(d), 1.5**2 * np.eye(d)

    def distance(n: int) -> float:
        rows = rng.normal(0, 1, (n, d))
        return frechet_distance_from_moments(rows.mean(0), np.cov(rows.T), mean, covariance)

    points = [(n, float(np.mean([distance(n) for _ in range(300)]))) for n in (50, 100, 200, 400)]
    found = extrapolate(points)
    biases = [value - d / 4 for _, value in points]
    assert biases == sorted(biases, reverse=True)
    assert biases[-1] > 0.02
    assert abs(found.value - d / 4) < biases[-1] / 2
    assert found.low < d / 4 < found.high


@pytest.mark.parametrize(
    "call",
    [
        lambda: nested_bootstrap([], rng=rng_of(0)),
        lambda: nested_bootstrap([SeedScore(0, 1.0, -0.1), SeedScore(1, 1.0)], rng=rng_of(0)),
        lambda: nested_bootstrap([SeedScore(0, math.nan), SeedScore(1, 1.0)], rng=rng_of(0)),
        lambda: nested_bootstrap([SeedScore(0, 1.0), SeedScore(1, 2.0)], rng=rng_of(0), level=95),
        lambda: interquartile_mean([]),
        lambda: probability_of_improvement([], [1.0]),
        lambda: extrapolate([(100, 1.0), (100, 2.0)]),
        lambda: extrapolate([(0, 1.0), (100, 2.0)]),
        lambda: extrapolate([(50, 1.0), (100, 2.0)], weights=[1.0]),
    ],
)
def test_what_has_no_answer_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"no values|below 0|level|two different|one for each"):
        call()
