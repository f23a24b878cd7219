"""Scores of samples from a class-conditional Gaussian mixture whose truth is known, in two dimensions or more.

Each score answers one question: are the samples on a mode of the class asked for (`in_mode_rate`), are the modes met in the right
proportions (`mode_mass_tv`), are all met at all (`coverage`), has each the right shape (`within_mode_w2`), and is the class
right (`class_accuracy`).

Arrays everywhere: samples (n, d), labels (n,), means (C, M, d), covariances (C, M, d, d), weights (C, M) with rows that sum to 1; a mode
of weight 0 is absent (its covariance still has to be one), so that classes may have different numbers of modes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import chi2

from distillbench.errors import UsageError
from distillbench.metrics.arrays import Array, as_float64, as_labels, as_rows
from distillbench.metrics.wasserstein import sliced_w2_to_normal

IN_MODE = 0.99  # share of a Gaussian inside the ellipse that counts as its mode


class _Problem(NamedTuple):
    samples: Array
    labels: NDArray[np.int64]
    means: Array
    covariances: Array
    weights: Array


def mahalanobis2(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any) -> Array:
    """Squared Mahalanobis distances (n, M) from each sample to the modes of its wanted class; infinite for absent modes."""
    p = _check(samples, labels, means, covariances, weights)
    return np.where(p.weights[p.labels] > 0, _squares(p)[np.arange(len(p.labels)), p.labels], np.inf)


def nearest_mode(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any) -> NDArray[np.int64]:
    """Index (n,) of the mode of the wanted class that is nearest by Mahalanobis distance."""
    return mahalanobis2(samples, labels, means, covariances, weights).argmin(1)


def responsible_mode(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any) -> NDArray[np.int64]:
    """Index (n,) of the mode of the wanted class with the largest posterior probability."""
    p = _check(samples, labels, means, covariances, weights)
    return _log_joint(p)[np.arange(len(p.labels)), p.labels].argmax(1)


def in_mode_rate(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any) -> float:
    """Share of samples inside the 99 % ellipse (about 3 sigma) of any mode of the wanted class; truth gives 0.99 for modes apart."""
    squares = mahalanobis2(samples, labels, means, covariances, weights)
    return float((squares.min(1) <= _radius2(means)).mean())


def mode_mass_tv(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any) -> float:
    """Total variation between the shares of samples per mode and the weights, averaged over the classes that were asked for.

    A sample belongs to the mode of its wanted class with the largest posterior. From 0 to 1; truth itself scatters by about
    sqrt(M / n_class), so read it beside the floor.
    """
    p = _check(samples, labels, means, covariances, weights)
    counts = _counts(p, responsible_mode(*p))
    asked = counts.sum(1) > 0
    shares = counts[asked] / counts[asked].sum(1, keepdims=True)
    return float(0.5 * np.abs(shares - p.weights[asked]).sum(1).mean())


def coverage(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any) -> float:
    """Share of the modes (of classes asked for) whose ellipse holds at least a quarter of the mode's mass in samples."""
    p = _check(samples, labels, means, covariances, weights)
    squares = mahalanobis2(*p)
    inside = squares.min(1) <= _radius2(p.means)
    found = _counts(p, squares.argmin(1), inside)
    asked = np.bincount(p.labels, minlength=len(p.weights))
    modes = (p.weights > 0) & (asked > 0)[:, None]
    return float((found >= 0.25 * p.weights * asked[:, None])[modes].mean())


def within_mode_w2(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any, *, projections: int = 32, seed: int = 0) -> float:
    """Distance of the samples of a mode from that mode's Gaussian, in units of its own standard deviation; 0 is perfect.

    The samples of each mode (largest posterior in the wanted class) are whitened by its true mean and covariance and compared with the
    standard normal by sliced W2. The mean over modes is weighted by their samples, so that a dropped mode does not show here.
    A set collapsed onto its mode's centre scores 1, one twice too wide scores 1.
    """
    p = _check(samples, labels, means, covariances, weights)
    modes = responsible_mode(*p)
    lower = np.linalg.cholesky(p.covariances)
    total = 0.0
    for label, mode in np.unique(np.stack([p.labels, modes], 1), axis=0):
        members = p.samples[(p.labels == label) & (modes == mode)]
        white = np.linalg.solve(lower[label, mode], (members - p.means[label, mode]).T).T
        total += len(members) * sliced_w2_to_normal(white, projections=projections, seed=seed)
    return total / len(p.samples)


def class_accuracy(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any, priors: Any = None) -> float:
    """Share of samples whose most probable class, by the exact posterior under `priors` (C,) (uniform if None), is the one asked for.

    Truth gives the accuracy of the best possible classifier: 1 only if the classes do not overlap.
    """
    p = _check(samples, labels, means, covariances, weights)
    classes = len(p.weights)
    prior = np.full(classes, 1.0 / classes) if priors is None else as_float64(priors, "priors")
    if prior.shape != (classes,) or (prior < 0).any() or not np.isclose(prior.sum(), 1.0):
        raise UsageError(f"priors must be {classes} shares that sum to 1")
    with np.errstate(divide="ignore"):
        posterior = logsumexp(_log_joint(p), axis=2) + np.log(prior)
    return float((posterior.argmax(1) == p.labels).mean())


def _check(samples: Any, labels: Any, means: Any, covariances: Any, weights: Any) -> _Problem:
    rows = as_rows(samples, "samples")
    means, covariances, weights = as_float64(means, "means"), as_float64(covariances, "covariances"), as_float64(weights, "weights")
    wanted = as_labels(labels, len(rows))
    width = rows.shape[1]
    shape = weights.shape
    if weights.ndim != 2 or means.shape != (*shape, width) or covariances.shape != (*shape, width, width):
        raise UsageError(
            f"samples with d = {width} need means (C, M, d), covariances (C, M, d, d) and weights (C, M), "
            f"but these have shapes {means.shape}, {covariances.shape} and {shape}"
        )
    if (weights < 0).any() or not np.allclose(weights.sum(1), 1.0):
        raise UsageError("the weights of each class must be shares that sum to 1")
    if wanted.min() < 0 or wanted.max() >= len(weights):
        raise UsageError(f"labels must lie in 0..{len(weights) - 1}, but span {wanted.min()}..{wanted.max()}")
    return _Problem(rows, wanted, means, covariances, weights)


def _squares(p: _Problem) -> Array:
    """Squared Mahalanobis distances (n, C, M) to all modes of all classes."""
    gaps = p.samples[:, None, None, :] - p.means
    white = np.einsum("cmij,ncmj->ncmi", np.linalg.inv(np.linalg.cholesky(p.covariances)), gaps)
    return (white**2).sum(-1)


def _log_joint(p: _Problem) -> Array:
    """log(weight x density) (n, C, M), less the constant that all modes share; minus infinity for absent modes."""
    with np.errstate(divide="ignore"):
        return np.log(p.weights) - 0.5 * np.linalg.slogdet(p.covariances)[1] - 0.5 * _squares(p)


def _counts(p: _Problem, modes: NDArray[np.int64], keep: NDArray[np.bool_] | None = None) -> Array:
    """Numbers of samples (C, M) by wanted class and mode."""
    counts = np.zeros(p.weights.shape)
    np.add.at(counts, (p.labels, modes), 1.0 if keep is None else keep)
    return counts


def _radius2(means: Any) -> float:
    return float(chi2.ppf(IN_MODE, df=np.shape(means)[-1]))
