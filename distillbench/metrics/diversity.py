"""How different the samples of one condition are from each other, and how near samples lie to the data they learnt from."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from distillbench.errors import UsageError
from distillbench.metrics.arrays import Array, as_labels, as_pair, as_rows, squared_distances, squared_norms


def group_diversity(features: Any, groups: Any, *, distance: Literal["cosine", "euclidean"] = "cosine") -> float:
    """Mean over groups (a class or a prompt each) of the mean distance between pairs of different rows of the group.

    `features` (n, d), `groups` whole numbers (n,). `distance` is "cosine" (1 - cosine similarity) or "euclidean". Every group
    needs at least 2 rows; 4 seeds per prompt is the custom. Read it beside the teacher's own value.
    """
    if distance not in ("cosine", "euclidean"):
        raise UsageError(f"unknown distance {distance!r}; known: cosine, euclidean")
    rows = as_rows(features, least=2)
    labels = as_labels(groups, len(rows), "groups")
    if distance == "cosine" and not np.all(np.any(rows, axis=1)):
        raise UsageError("a feature row is all zero and has no direction: use distance='euclidean'")
    means = []
    for label in np.unique(labels):
        members = rows[labels == label]
        if len(members) < 2:
            raise UsageError(f"group {label} has one sample: diversity within groups needs at least two of each")
        means.append(pdist(members, distance).mean())
    return float(np.mean(means))


class Nearest(NamedTuple):
    """Distances from samples to their nearest reference row: see `nearest_distance`."""

    median: float
    minimum: float
    copied: float


def nearest_distance(samples: Any, reference: Any, *, block: int = 1024) -> Nearest:
    """How near samples (n, d) come to reference rows (m, d), for instance training images: median, minimum, and share of copies.

    A sample counts as copied if it lies nearer to its nearest reference row than that row's own nearest neighbour does: one minus
    the authenticity of Alaa et al. 2022 (arXiv:2102.08921). Held-out data show what share is natural: 2/3 in one dimension, less in more.
    """
    first, second = as_pair(samples, reference)
    if len(second) < 2:
        raise UsageError("the share of copies needs at least two reference rows")
    squares, nearest = _nearest(first, second, block)
    own, _ = _nearest(second, second, block, skip_self=True)
    distances = np.sqrt(squares)
    return Nearest(float(np.median(distances)), float(distances.min()), float((squares < own[nearest]).mean()))


def _nearest(rows: Array, others: Array, block: int, skip_self: bool = False) -> tuple[Array, NDArray[np.int64]]:
    """Squared distance (n,) to the nearest of `others` and its index; differences are taken anew, so that a copy is at exactly 0."""
    norms = squared_norms(others)
    index = np.empty(len(rows), dtype=np.int64)
    for start in range(0, len(rows), block):
        distances = squared_distances(rows[start : start + block], others, norms)
        if skip_self:
            here = np.arange(len(distances))
            distances[here, start + here] = np.inf
        index[start : start + block] = distances.argmin(1)
    gaps = rows - others[index]
    return squared_norms(gaps), index
