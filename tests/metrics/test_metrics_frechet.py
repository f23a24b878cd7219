from __future__ import annotations

import numpy as np
import pytest
import torch

from distillbench.errors import NonFiniteError, UsageError
from distillbench.metrics import frechet
from distillbench.metrics.frechet import frechet_distance, frechet_distance_from_moments, frechet_infinity


def exact_rows(n: int, d: int, seed: int) -> np.ndarray:
    """Rows whose sample mean is 0 and whose sample covariance is the identity, both exactly."""
    rows = np.random.default_rng(seed).standard_normal((n, d))
    rows -= rows.mean(0)
    return np.linalg.solve(np.linalg.cholesky(rows.T @ rows / (n - 1)), rows.T).T


def correlated(n: int, d: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n, d)) @ generator.standard_normal((d, d)) / np.sqrt(d) + generator.standard_normal(d)


@pytest.mark.parametrize("n", [300, 12])  # 12 rows in 11 dimensions: just enough for a covariance of full rank
def test_closed_form_for_a_shared_diagonal(n: int) -> None:
    d = 11
    scales = np.linspace(0.2, 3.0, d)
    factors, shift = np.linspace(0.5, 2.0, d), np.linspace(-1, 1, d)
    a = exact_rows(n, d, 0) * scales
    b = exact_rows(n, d, 1) * scales * factors + shift
    truth = np.sum(shift**2) + np.sum(scales**2 * (1 - factors) ** 2)
    assert frechet_distance(a, b) == pytest.approx(truth, abs=1e-9)


def test_closed_form_of_correlated_moments() -> None:
    # Covariances that commute: each pair of eigenvalues adds (root1 - root2)^2.
    generator = np.random.default_rng(2)
    rotation, _ = np.linalg.qr(generator.standard_normal((7, 7)))
    first, second = generator.uniform(0.1, 4, 7), generator.uniform(0.1, 4, 7)
    mean, other = generator.standard_normal(7), generator.standard_normal(7)
    truth = np.sum((mean - other) ** 2) + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    got = frechet_distance_from_moments(mean, rotation * first @ rotation.T, other, rotation * second @ rotation.T)
    assert got == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(500, 20), (21, 20), (20, 20), (8, 50)])
def test_a_set_is_at_distance_zero_of_itself(n: int, d: int) -> None:
    rows = correlated(n, d, 3) * 10
    assert 0.0 <= frechet_distance(rows, rows) < 1e-8


@pytest.mark.parametrize("n", [400, 15])
def test_order_rotation_and_sides_do_not_matter(n: int) -> None:
    a, b = correlated(n, 30, 4), correlated(n, 30, 5)
    generator = np.random.default_rng(6)
    rotation, _ = np.linalg.qr(generator.standard_normal((30, 30)))
    value = frechet_distance(a, b)
    assert frechet_distance(a[generator.permutation(n)], b) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-10)


def test_both_routes_agree() -> None:
    a, b = correlated(300, 25, 7), correlated(200, 25, 8)
    a, b = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (a, b))
    cholesky = frechet.cross_trace_cholesky(a.T @ a, b.T @ b)
    assert cholesky is not None
    assert frechet.cross_trace_factors(a, b) == pytest.approx(cholesky, abs=1e-8)


def test_few_rows_agree_with_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    a, b = correlated(10, 16, 9), correlated(12, 16, 10)
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.linalg.eigh(s)
    root = roots[1] * np.sqrt(np.maximum(roots[0], 0)) @ roots[1].T
    cross = np.trace(sqrtm(root @ t @ root).real)
    truth = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s) + np.trace(t) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(truth, abs=1e-6)


def test_a_dead_feature_falls_back_to_the_factor_route() -> None:
    a, b = correlated(200, 10, 11), correlated(200, 10, 12)
    dead = np.zeros((200, 3))
    assert frechet_distance(np.hstack([a, dead]), np.hstack([b, dead])) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    # A spread of variances over 16 orders defeats the eigenvalue route without an exception.
    tiny = np.random.default_rng(0).standard_normal((200, 3)) * 1e-8
    assert frechet.cross_trace_cholesky(np.cov(np.hstack([a, tiny]).T), np.cov(np.hstack([b, tiny]).T)) is None


def test_samples_and_their_moments_agree() -> None:
    a, b = correlated(100, 8, 13), correlated(150, 8, 14)
    moments = [f(rows) for rows in (a, b) for f in (lambda r: r.mean(0), lambda r: np.cov(r, rowvar=False))]
    assert frechet_distance_from_moments(*moments) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    singular = np.diag([1.0, 4.0, 0.0])
    assert frechet_distance_from_moments(np.zeros(3), singular, np.ones(3), 4 * singular) == pytest.approx(3 + 5, abs=1e-9)


def test_extrapolation_reaches_the_truth_where_the_plain_value_does_not() -> None:
    d, n, draws = 64, 8000, 8
    generator = np.random.default_rng(15)
    shift = np.full(d, 1 / 8)
    truth = 1.0
    plain, extrapolated, half = [], [], []
    for seed in range(draws):  # one draw scatters by 3 % whatever the estimator
        a, b = generator.standard_normal((n, d)) + shift, generator.standard_normal((n, d))
        plain.append(frechet_distance(a, b))
        extrapolated.append(frechet_infinity(a, b, seed=seed))
        half.append(frechet_infinity(a, b, seed=seed, fixed_reference=True))
    assert np.mean(plain) > 1.2 * truth
    assert np.mean(extrapolated) == pytest.approx(truth, rel=0.05)
    # Against a fixed reference only the bias of the generated set goes.
    assert 1.05 * truth < np.mean(half) < np.mean(plain)
    assert frechet_infinity(a, b, seed=3) == frechet_infinity(a, b, seed=3)


def test_tensors_of_any_kind_are_read_as_float64() -> None:
    a, b = correlated(60, 5, 16), correlated(60, 5, 17)
    assert frechet_distance(torch.tensor(a).requires_grad_(), torch.tensor(b)) == frechet_distance(a, b)
    half = torch.tensor(a).bfloat16()
    assert frechet_distance(half, b) == frechet_distance(half.double().numpy(), b)


def test_wrong_input_is_named() -> None:
    rows = correlated(10, 4, 18)
    with pytest.raises(UsageError, match="4 wide and reference features 3"):
        frechet_distance(rows, rows[:, :3])
    with pytest.raises(UsageError, match="at least 2"):
        frechet_distance(rows[:1], rows)
    with pytest.raises(NonFiniteError, match="1 values"):
        frechet_distance(np.where(np.arange(40).reshape(10, 4) == 7, np.nan, rows), rows)
    with pytest.raises(UsageError, match="at least 8 rows"):
        frechet_infinity(rows, rows, seed=0)
