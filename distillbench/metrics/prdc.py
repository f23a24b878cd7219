"""Precision, recall, density and coverage: how two sets of features lie in one another's nearest-neighbour balls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from distillbench.errors import UsageError
from distillbench.metrics.arrays import Array, as_pair, squared_distances, squared_norms


class PRDC(NamedTuple):
    """Shares in [0, 1], except `density`, whose expectation is 1 for a perfect generator and which can exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(generated: Any, reference: Any, *, neighbours: int = 3, density_neighbours: int = 5, block: int = 1024) -> PRDC:
    """Precision and recall (k = `neighbours`), density and coverage (k = `density_neighbours`) of features (n, d) against (m, d).

    The ball of a row reaches to its k-th nearest other row of the same set. Precision: share of generated rows in the ball of any
    reference row; recall the other way round (Kynkäänniemi et al. 2019, arXiv:1904.06991; a ball holds its rim). Density: mean number
    of reference balls around a generated row, over k; coverage: share of reference balls that hold a generated row (Naeem et
    al. 2020, arXiv:2002.09797; a ball does not hold its rim).
    """
    first, second = as_pair(generated, reference)
    largest = max(neighbours, density_neighbours)
    if min(neighbours, density_neighbours) < 1 or len(second) <= largest or len(first) <= neighbours:
        raise UsageError(f"{len(first)} generated and {len(second)} reference rows are too few for {largest} nearest neighbours")
    (generated_radius,) = _radii(first, (neighbours,), block)
    reference_radius, density_radius = _radii(second, (neighbours, density_neighbours), block)
    precise = np.zeros(len(first), dtype=bool)
    recalled = covered = balls = 0
    norms = squared_norms(first)
    for start in range(0, len(second), block):
        rows = slice(start, start + block)
        distances = squared_distances(second[rows], first, norms)
        precise |= (distances <= reference_radius[rows, None]).any(0)
        recalled += int((distances <= generated_radius).any(1).sum())
        inside = distances < density_radius[rows, None]
        balls += int(inside.sum())
        covered += int(inside.any(1).sum())
    density = balls / (density_neighbours * len(first))
    return PRDC(float(precise.mean()), recalled / len(second), density, covered / len(second))


def _radii(rows: Array, neighbours: tuple[int, ...], block: int) -> list[Array]:
    """Squared distances (n,) from each row to its k-th nearest other row, for every k; each pair of blocks is computed once."""
    norms = squared_norms(rows)
    nearest = np.full((len(rows), max(neighbours)), np.inf)
    for start in range(0, len(rows), block):
        here = slice(start, start + block)
        for other in range(start, len(rows), block):
            there = slice(other, other + block)
            distances = squared_distances(rows[here], rows[there], norms[there])
            if start == other:
                np.fill_diagonal(distances, np.inf)
            else:
                nearest[there] = _smallest(nearest[there], distances.T)
            nearest[here] = _smallest(nearest[here], distances)
    nearest.sort(axis=1)
    return [nearest[:, k - 1] for k in neighbours]


def _smallest(found: Array, distances: Array) -> Array:
    """The smallest values of each row of both, as many as were found before."""
    depth = found.shape[1]
    return np.partition(np.concatenate([found, distances], axis=1), depth - 1, axis=1)[:, :depth]
