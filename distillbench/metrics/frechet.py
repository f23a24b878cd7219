"""The Fréchet distance between Gaussians fitted to two sets of features.

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)),   covariances with n - 1

(Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500, on Inception features, where it is called FID.) The matrix root is never
formed. With S1 = L L', the trace is the sum of the square roots of the eigenvalues of the symmetric L' S2 L. With factors S = F' F it is
the nuclear norm of F1 F2': slower, but right for singular covariances, as with no more samples than features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk

from distillbench.errors import UsageError
from distillbench.metrics.arrays import Array, as_float64, as_pair

# Largest share of the total variance by which rounding may move the trace before the factor route is taken instead.
_ROUNDING = 1e-9
_BLOCK = 2048  # rows


def frechet_distance(generated: Any, reference: Any) -> float:
    """Fréchet distance between features (n, d) and (m, d), n and m at least 2; symmetric, in squared feature units.

    Biased upwards by about c/n: compare only at equal numbers of samples, or use `frechet_infinity`.
    """
    first, second = as_pair(generated, reference, least=2)
    means = [rows.mean(0) for rows in (first, second)]
    distance = float((means[0] - means[1]) @ (means[0] - means[1]))
    cross = None
    if min(len(first), len(second)) > first.shape[1]:
        covariances = [_lower_covariance(rows, mean) for rows, mean in zip((first, second), means, strict=True)]
        total = sum(float(np.trace(covariance)) for covariance in covariances)
        cross = cross_trace_cholesky(*covariances)
    if cross is None:
        factors = [(rows - mean) / np.sqrt(len(rows) - 1) for rows, mean in zip((first, second), means, strict=True)]
        total = sum(float(np.vdot(factor, factor)) for factor in factors)
        cross = cross_trace_factors(*factors)
    return max(distance + total - 2.0 * cross, 0.0)


def _lower_covariance(rows: Array, mean: Array) -> Array:
    """The lower triangle of the covariance (d, d), summed over blocks of rows so that no centred copy of all of them is made."""
    total = np.zeros((rows.shape[1], rows.shape[1]), order="F")
    for start in range(0, len(rows), _BLOCK):
        centred = rows[start : start + _BLOCK] - mean
        total = dsyrk(1.0 / (len(rows) - 1), centred.T, beta=1.0, c=total, lower=1, overwrite_c=1)
    return total


def frechet_distance_from_moments(mean: Any, covariance: Any, other_mean: Any, other_covariance: Any) -> float:
    """Fréchet distance of Gaussians with means (d,) and covariances (d, d), as published statistics files store them."""
    means = [as_float64(value, "mean") for value in (mean, other_mean)]
    covariances = [as_float64(value, "covariance") for value in (covariance, other_covariance)]
    width = means[0].size
    if any(m.shape != (width,) for m in means) or any(c.shape != (width, width) for c in covariances):
        shapes = [array.shape for array in means + covariances]
        raise UsageError(f"moments must have shapes (d,), (d, d), (d,), (d, d) of one d, but have {shapes}")
    cross = cross_trace_cholesky(*covariances)
    if cross is None:
        cross = cross_trace_factors(*(_root(covariance) for covariance in covariances))
    gap = means[0] - means[1]
    return max(float(gap @ gap) + float(np.trace(covariances[0]) + np.trace(covariances[1])) - 2.0 * cross, 0.0)


def frechet_infinity(
    generated: Any, reference: Any, *, seed: int, splits: tuple[int, ...] = (1, 2, 3, 4), fixed_reference: bool = False
) -> float:
    """Fréchet distance extrapolated to infinitely many samples: the intercept of a line in 1/n.

    For every k of `splits` both sets are shuffled (by `seed`), cut into k disjoint parts and the distances of the k pairs averaged.
    Shrinking both sets removes the bias of both; `fixed_reference` keeps the reference whole, as Chong and Forsyth 2020
    (arXiv:1911.07023) do, for whom the reference set is the target itself. The smallest part must hold 2 d rows, where the
    bias is still close to linear in 1/n. Can be slightly negative at a true distance of 0.
    """
    first, second = as_pair(generated, reference, least=2)
    smallest = (len(first) if fixed_reference else min(len(first), len(second))) // max(splits)
    if len(set(splits)) < 2 or smallest < 2 * first.shape[1]:
        raise UsageError(
            f"the extrapolation needs two different splits and parts of at least {2 * first.shape[1]} rows, but has splits {splits} and "
            f"{smallest} rows: use more samples or features of fewer dimensions"
        )
    if not fixed_reference and len(first) != len(second):
        length = min(len(first), len(second))
        first, second = first[:length], second[:length]
    generator = np.random.default_rng(seed)
    first, second = (rows[generator.permutation(len(rows))] for rows in (first, second))
    values = []
    for k in splits:
        parts = np.array_split(first, k)
        others = [second] * k if fixed_reference else np.array_split(second, k)
        values.append(np.mean([frechet_distance(part, other) for part, other in zip(parts, others, strict=True)]))
    _, intercept = np.polyfit(np.asarray(splits) / len(first), values, 1)
    return float(intercept)


def cross_trace_cholesky(covariance: Array, other: Array) -> float | None:
    """tr((S1 S2)^(1/2)) by the Cholesky factor of S1, from lower triangles; None where S1 is singular or rounding would show."""
    try:
        # LAPACK's symmetric problem "other @ covariance @ v = w v" forms L' other L at half the cost of two products.
        # "gv" is the fastest driver without vectors; scipy-stubs 1.17 knows it only for problems with vectors.
        eigenvalues = eigh(other, covariance, type=2, eigvals_only=True, driver="gv", check_finite=False)  # type: ignore[call-overload]
    except np.linalg.LinAlgError:
        return None
    # An eigenvalue v is known to about e = eps * largest, its root therefore to e / (2 root(v)): large errors where v is tiny.
    error = np.finfo(np.float64).eps * max(float(eigenvalues[-1]), 0.0)
    roots = np.sqrt(np.maximum(eigenvalues, 0.0))
    doubt = float(np.sum(error / np.maximum(2 * roots, np.sqrt(error) + np.finfo(np.float64).tiny)))
    if doubt > _ROUNDING * float(np.trace(covariance) + np.trace(other)):
        return None
    return float(roots.sum())


def cross_trace_factors(factor: Array, other: Array) -> float:
    """tr((S1 S2)^(1/2)) from factors (rows, d) with S = F' F: the nuclear norm of F1 F2', for singular covariances too."""
    small = [np.asarray(np.linalg.qr(f, mode="r")) if f.shape[0] > f.shape[1] else f for f in (factor, other)]
    return float(np.linalg.svd(small[0] @ small[1].T, compute_uv=False).sum())


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
