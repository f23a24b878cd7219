"""What every metric does with its input: float64 rows, checked once, and squared distances between them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillbench.errors import NonFiniteError, UsageError

Array = NDArray[np.float64]


def as_float64(values: Any, name: str = "values") -> Array:
    """A float64 numpy array of an array, a list or a torch tensor (any device and dtype); NaN and infinity are refused."""
    if hasattr(values, "detach"):
        values = values.detach().to("cpu").double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array.sum()):  # one pass and no copy; a sum of finite values may overflow, so the values decide
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise NonFiniteError(f"{name} of shape {array.shape} have {bad} values that are NaN or infinite: nothing can be scored on them")
    return array


def as_rows(values: Any, name: str = "features", least: int = 1) -> Array:
    """Float64 rows (n, d) with n >= `least`; trailing dimensions, as of images, are flattened."""
    array = as_float64(values, name)
    if array.ndim < 2:
        raise UsageError(f"{name} must have a row per sample, shape (n, d), but have shape {array.shape}")
    if len(array) < least:
        raise UsageError(f"{name} have {len(array)} rows: this metric needs at least {least}")
    return array.reshape(len(array), -1)


def as_pair(generated: Any, reference: Any, least: int = 1) -> tuple[Array, Array]:
    """Two sets of rows of one width."""
    first, second = as_rows(generated, "generated features", least), as_rows(reference, "reference features", least)
    if first.shape[1] != second.shape[1]:
        raise UsageError(
            f"generated features are {first.shape[1]} wide and reference features {second.shape[1]}: use one extractor for both"
        )
    return first, second


def as_labels(values: Any, n: int, name: str = "labels") -> NDArray[np.int64]:
    """Whole numbers (n,), one per sample."""
    array = as_float64(values, name)
    if array.shape != (n,):
        raise UsageError(f"{name} must have shape ({n},), one per sample, but have shape {array.shape}")
    whole = array.astype(np.int64)
    if (whole != array).any():
        raise UsageError(f"{name} must be whole numbers")
    return whole


def squared_distances(rows: Array, others: Array, others_norms: Array) -> Array:
    """Squared Euclidean distances (len(rows), len(others)) through one matrix product; `others_norms` are squared norms."""
    distances = rows @ others.T
    distances *= -2.0
    distances += np.einsum("nd,nd->n", rows, rows)[:, None]
    distances += others_norms
    return np.maximum(distances, 0.0, out=distances)


def squared_norms(rows: Array) -> Array:
    """Squared Euclidean norms (n,) of rows (n, d)."""
    return np.einsum("nd,nd->n", rows, rows)
