from __future__ import annotations

import numpy as np
import pytest

from distillbench.metrics.kernel import gaussian_kernel_distance, kernel_distance


def pair(n: int, m: int, d: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n, d)) + shift, generator.standard_normal((m, d))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_cubic_kernel_equals_the_sums_over_all_pairs(block: int) -> None:
    a, b = pair(23, 31, 6, 0, shift=0.4)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 6 + 1) ** 3)

    xx = sum(k(a[i], a[j]) for i in range(23) for j in range(23) if i != j) / (23 * 22)
    yy = sum(k(b[i], b[j]) for i in range(31) for j in range(31) if i != j) / (31 * 30)
    xy = sum(k(x, y) for x in a for y in b) / (23 * 31)
    assert kernel_distance(a, b, block=block) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


@pytest.mark.parametrize("block", [5, 64])
def test_gaussian_kernel_equals_the_sums_over_all_pairs(block: int) -> None:
    a, b = pair(17, 12, 5, 1, shift=0.5)

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([np.exp(-np.sum((p - q) ** 2) / (2 * 3.0**2)) for p in x for q in y]))

    truth = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert gaussian_kernel_distance(a, b, sigma=3.0, block=block) == pytest.approx(1000 * truth, rel=1e-9)


def test_cubic_kernel_is_unbiased_and_keeps_its_sign() -> None:
    values = np.array([kernel_distance(*pair(40, 40, 4, seed)) for seed in range(200)])
    assert abs(values.mean()) < 2.5 * values.std() / np.sqrt(len(values))
    assert (values < 0).mean() > 0.2


def test_cubic_kernel_sees_a_shift_of_known_size() -> None:
    # For x ~ N(s, 1), y ~ N(0, 1) in one dimension: E k over (x, x'), (y, y') and (x, y), by expanding (1 + xy)^3.
    s = 0.5
    truth = 3 * s**2 + 3 * ((1 + s**2) ** 2 - 2 * (1 + s**2) + 1) + (s**3 + 3 * s) ** 2
    values = [kernel_distance(*pair(500, 500, 1, seed, shift=s)) for seed in range(100)]
    assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values) / 10)


def test_gaussian_kernel_is_zero_only_for_the_same_set() -> None:
    a, b = pair(50, 50, 3, 2)
    assert gaussian_kernel_distance(a, a) == pytest.approx(0.0, abs=1e-10)
    assert gaussian_kernel_distance(a, b) > 0
    assert gaussian_kernel_distance(a, b + 1) > gaussian_kernel_distance(a, b)
