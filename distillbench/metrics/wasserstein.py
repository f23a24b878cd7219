"""2-Wasserstein distances of samples: sliced (fast, many samples), against a normal distribution, and exact (few samples)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import norm

from distillbench.errors import UsageError
from distillbench.metrics.arrays import Array, as_pair, as_rows

EXACT_LIMIT = 4096  # rows: 128 MiB of distances and about a minute


def sliced_w2(generated: Any, reference: Any, *, projections: int = 128, seed: int) -> float:
    """Root mean square, over fixed directions, of the one-dimensional W2 between projected samples (n, d) and (m, d).

    A mean shift s alone gives |s| / sqrt(d). Equal seeds give equal directions, so that students are compared on the same slices. Where
    n and m differ, the quantile function of the smaller set is interpolated linearly at the ranks (i + 1/2) / max(n, m).
    """
    first, second = as_pair(generated, reference)
    length = max(len(first), len(second))
    total = 0.0
    for part in _parts(_directions(first.shape[1], projections, seed)):
        gap = _quantiles(part @ first.T, length) - _quantiles(part @ second.T, length)
        total += float(np.vdot(gap, gap)) / length
    return float(np.sqrt(total / projections))


def sliced_w2_to_normal(samples: Any, *, projections: int = 128, seed: int) -> float:
    """Sliced W2 of samples (n, d) from the standard normal distribution itself: no reference sample, no noise from one.

    In one dimension W2^2 = mean(x^2) - 2 sum_i x_(i) c_i + 1, where c_i is the integral of the normal quantile function over
    [(i - 1)/n, i/n], that is, a difference of normal densities at the quantiles of the ends.
    """
    rows = as_rows(samples, "samples")
    n = len(rows)
    weights = -np.diff(norm.pdf(norm.ppf(np.linspace(0.0, 1.0, n + 1))))
    total = 0.0
    for part in _parts(_directions(rows.shape[1], projections, seed)):
        ordered = np.sort(part @ rows.T, axis=1)
        squares = (ordered**2).mean(1) - 2.0 * ordered @ weights + 1.0
        total += float(np.maximum(squares, 0.0).sum())
    return float(np.sqrt(total / projections))


def exact_w2(generated: Any, reference: Any) -> float:
    """W2 between two sets of n samples (n, d) each, by the best one-to-one matching; n at most `EXACT_LIMIT`."""
    first, second = as_pair(generated, reference)
    if len(first) != len(second) or len(first) > EXACT_LIMIT:
        raise UsageError(
            f"exact W2 needs two sets of equal size, at most {EXACT_LIMIT} rows, but has {len(first)} and {len(second)}: use sliced_w2"
        )
    costs = cdist(first, second, "sqeuclidean")
    return float(np.sqrt(costs[linear_sum_assignment(costs)].mean()))


def _directions(width: int, projections: int, seed: int) -> Array:
    """Unit directions (projections, width) in orthonormal sets of `width`: random rotations cover the sphere evenly."""
    if projections < 1:
        raise UsageError(f"sliced W2 needs at least 1 projection, got {projections}")
    generator = np.random.default_rng(seed)
    sets = []
    for start in range(0, projections, width):
        rotation, _ = np.linalg.qr(generator.standard_normal((width, min(width, projections - start))))
        sets.append(rotation.T)
    return np.concatenate(sets)


def _parts(directions: Array) -> list[Array]:
    return [directions[start : start + 64] for start in range(0, len(directions), 64)]


def _quantiles(values: Array, length: int) -> Array:
    """Sorted rows (p, n), or their quantiles at `length` evenly spaced ranks."""
    ordered = np.sort(values, axis=1)
    n = ordered.shape[1]
    if n == length:
        return ordered
    places = np.clip((np.arange(length) + 0.5) * (n / length) - 0.5, 0, n - 1)
    below = places.astype(np.int64)
    above = np.minimum(below + 1, n - 1)
    return ordered[:, below] + (places - below) * (ordered[:, above] - ordered[:, below])
