from __future__ import annotations

import itertools

import numpy as np
import pytest

from distillbench.errors import UsageError
from distillbench.metrics.wasserstein import exact_w2, sliced_w2, sliced_w2_to_normal


@pytest.mark.parametrize("d", [2, 5])
def test_a_shift_is_the_closed_form(d: int) -> None:
    rows = np.random.default_rng(0).standard_normal((500, d))
    shift = np.linspace(0.5, 2.0, d)
    # Whole orthonormal sets of directions make the mean of (direction . shift)^2 exactly |shift|^2 / d.
    assert sliced_w2(rows + shift, rows, projections=4 * d, seed=1) == pytest.approx(np.linalg.norm(shift) / np.sqrt(d), rel=1e-12)


def test_independent_shifted_gaussians_approach_the_closed_form() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.standard_normal((20_000, 3)) + [2.0, 0, 0], generator.standard_normal((15_000, 3))
    assert sliced_w2(a, b, projections=30, seed=0) == pytest.approx(2 / np.sqrt(3), rel=0.02)


def test_the_seed_alone_fixes_the_directions() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.standard_normal((100, 4)), generator.standard_normal((100, 4)) * [1, 2, 3, 4]
    assert sliced_w2(a, b, projections=5, seed=7) == sliced_w2(a[::-1], b, projections=5, seed=7)
    assert sliced_w2(a, b, projections=5, seed=7) != sliced_w2(a, b, projections=5, seed=8)
    assert sliced_w2(a, b, projections=5, seed=7) == pytest.approx(sliced_w2(b, a, projections=5, seed=7))
    assert sliced_w2(a, a, seed=0) == 0.0


def test_unequal_sizes_interpolate_quantiles() -> None:
    rows = np.random.default_rng(4).standard_normal((64, 2))
    assert sliced_w2(np.repeat(rows, 3, axis=0), rows, seed=0) < 0.12
    # A smooth distribution at two sizes: the gap is sampling error, far below that of a shift.
    grid, fine = (np.linspace(0, 1, n, endpoint=False)[:, None] + 0.5 / n for n in (100, 1000))
    assert sliced_w2(grid, fine, projections=1, seed=0) < 1e-3
    assert sliced_w2(grid + 0.25, fine, projections=1, seed=0) == pytest.approx(0.25, abs=1e-3)


def test_distance_to_the_normal_itself() -> None:
    generator = np.random.default_rng(5)
    rows = generator.standard_normal((40_000, 2))
    assert sliced_w2_to_normal(rows, seed=0) < 0.02
    assert sliced_w2_to_normal(np.zeros((100, 2)), seed=0) == pytest.approx(1.0, rel=1e-9)
    assert sliced_w2_to_normal(2 * rows, seed=0) == pytest.approx(1.0, abs=0.02)
    assert sliced_w2_to_normal(rows + [3.0, 4.0], projections=2, seed=0) == pytest.approx(5 / np.sqrt(2), abs=0.02)


def test_distance_to_the_normal_equals_numerical_integration() -> None:
    from scipy.stats import norm

    values = np.sort(np.random.default_rng(6).uniform(-1, 3, 9))
    levels = (np.arange(900_000) + 0.5) / 900_000
    truth = np.sqrt(np.mean((np.repeat(values, 100_000) - norm.ppf(levels)) ** 2))
    assert sliced_w2_to_normal(values[:, None], projections=1, seed=0) in (
        pytest.approx(truth, abs=1e-5),
        pytest.approx(np.sqrt(np.mean((np.repeat(-values[::-1], 100_000) - norm.ppf(levels)) ** 2)), abs=1e-5),
    )


def test_exact_matching_equals_all_permutations() -> None:
    generator = np.random.default_rng(7)
    a, b = generator.standard_normal((6, 3)), generator.standard_normal((6, 3))
    best = min(np.mean(np.sum((a - b[list(order)]) ** 2, axis=1)) for order in itertools.permutations(range(6)))
    assert exact_w2(a, b) == pytest.approx(np.sqrt(best), rel=1e-12)
    assert exact_w2(a + 5, a[::-1]) == pytest.approx(5 * np.sqrt(3))
    assert sliced_w2(a, b, projections=300, seed=0) <= exact_w2(a, b)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="use sliced_w2"):
        exact_w2(np.eye(4), np.eye(4)[:3])
    with pytest.raises(UsageError, match="at least 1 projection"):
        sliced_w2(np.eye(3), np.eye(3), projections=0, seed=0)
