"""The Vendi score: the effective number of different samples in a set."""

from __future__ import annotations

from typing import Any

import numpy as np

from distillbench.errors import UsageError
from distillbench.metrics.arrays import as_rows


def vendi(features: Any) -> float:
    """exp(entropy of the eigenvalues of K/n), K the cosine similarities of features (n, d); from 1 (all alike) to min(n, d).

    Friedman and Dieng 2023, arXiv:2210.02410. Needs no reference; grows with n, so compare at equal numbers of samples. With fewer
    features than samples the d x d matrix, which has the same nonzero eigenvalues, is used.
    """
    rows = as_rows(features)
    lengths = np.linalg.norm(rows, axis=1)
    if (lengths == 0).any():
        raise UsageError(f"{int((lengths == 0).sum())} feature rows are all zero and have no direction: cosine similarity is undefined")
    rows = rows / lengths[:, None]
    gram = (rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T) / len(rows)
    values = np.linalg.eigvalsh(gram)
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))
