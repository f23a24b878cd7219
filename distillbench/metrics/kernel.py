"""Kernel distances (squared maximum mean discrepancies) over all pairs, in blocks: no subsets, no sampling noise of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from distillbench.metrics.arrays import Array, as_pair, squared_distances, squared_norms


def kernel_distance(generated: Any, reference: Any, *, block: int = 1024) -> float:
    """Unbiased squared MMD with the kernel (x.y/d + 1)^3 between features (n, d) and (m, d), n and m at least 2.

    Called KID on Inception features (Binkowski et al. 2018, arXiv:1801.01401), there averaged over random subsets: this is
    the value that such averages scatter about. Can be negative near 0, and the sign is kept. Often quoted times 1000.
    """
    first, second = as_pair(generated, reference, least=2)

    def cubic(rows: Array, others: Array) -> Array:
        values = rows @ others.T
        values /= rows.shape[1]
        values += 1.0
        return values * values * values

    n, m = len(first), len(second)
    within = _sum_within(first, cubic, block) / (n * (n - 1)) + _sum_within(second, cubic, block) / (m * (m - 1))
    return within - 2.0 * _sum_across(first, second, cubic, block) / (n * m)


def gaussian_kernel_distance(generated: Any, reference: Any, *, sigma: float = 10.0, scale: float = 1000.0, block: int = 1024) -> float:
    """`scale` times the biased squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)) between features (n, d) and (m, d).

    With the defaults, on CLIP embeddings, this is CMMD (Jayasumana et al. 2024, arXiv:2401.09603). Never negative; the pairs of a
    sample with itself count, so that it shrinks with the number of samples: compare at equal numbers.
    """
    first, second = as_pair(generated, reference)

    def gaussian(rows: Array, others: Array) -> Array:
        return np.exp(squared_distances(rows, others, squared_norms(others)) / (-2.0 * sigma * sigma))

    n, m = len(first), len(second)
    within = (_sum_within(first, gaussian, block) + n) / (n * n) + (_sum_within(second, gaussian, block) + m) / (m * m)
    return scale * max(within - 2.0 * _sum_across(first, second, gaussian, block) / (n * m), 0.0)


def _sum_within(rows: Array, kernel: Callable[[Array, Array], Array], block: int) -> float:
    """Sum of the kernel over all ordered pairs of different rows; each block above the diagonal counts twice."""
    total = 0.0
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        values = kernel(part, part)
        np.fill_diagonal(values, 0.0)
        total += float(values.sum())
        for other in range(start + block, len(rows), block):
            total += 2.0 * float(kernel(part, rows[other : other + block]).sum())
    return total


def _sum_across(rows: Array, others: Array, kernel: Callable[[Array, Array], Array], block: int) -> float:
    starts = [(i, j) for i in range(0, len(rows), block) for j in range(0, len(others), block)]
    return sum(float(kernel(rows[i : i + block], others[j : j + block]).sum()) for i, j in starts)
