"""What the track `digits` measures: features of images against 1,000 held-out digits, and pixels against the training images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..data.digits import CLASSES, load_digits
from ..errors import UsageError
from ..statistics import extrapolate
from ..teachers.digits_classifier import features_of, labels_of
from .arrays import Array, as_float64, squared_distances, squared_norms
from .diversity import group_diversity
from .frechet import frechet_distance
from .prdc import prdc
from .score import bootstrap

PER_CLASS = 200
FIRST_SEED = 1_000_000
RESAMPLES = 16
PARTS = (1, 2, 4)  # into which the samples are cut for the extrapolation in their number
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5


@dataclass(frozen=True)
class Seen:
    """What the scores see of n images. features: (n, 64).  labels: asked for, (n,).  agrees: 1 where the classifier sees that label, (n,).

    nearest: distance to the nearest training image, root mean square over pixels of [-1, 1], (n,).
    """

    features: Array
    labels: Array
    agrees: Array
    nearest: Array


def evaluation_labels() -> Tensor:
    """The labels (2,000,) of the samples that are scored: 0 to 9, again and again."""
    return torch.arange(PER_CLASS * CLASSES) % CLASSES


def evaluation_seeds() -> range:
    """Their seeds."""
    return range(FIRST_SEED, FIRST_SEED + PER_CLASS * CLASSES)


def see(x: Tensor, labels: Tensor) -> Seen:
    """Images (n, 1, 28, 28), clipped to [-1, 1], and the labels (n,) that were asked for."""
    x = x.float().cpu().clamp(-1, 1)
    features = features_of(x)
    agrees = labels_of(features) == labels
    return Seen(as_float64(features, "features of samples"), as_float64(labels), as_float64(agrees), as_float64(nearest_training(x)))


@cache
def held_out() -> Seen:
    """The reference: 1,000 images, 100 of each class."""
    digits = load_digits("held-out")
    return see(digits.images, digits.labels)


def nearest_training(x: Tensor) -> Tensor:
    """Distance (n,) from each image to the nearest training image: root mean square over pixels.

    Found in float32 through a matrix product, then measured in float64, so that a copy is at 0.
    """
    rows, others = x.flatten(1), load_digits("train").images.flatten(1)
    norms = others.square().sum(1)
    index = torch.cat([torch.addmm(norms, part, others.T, alpha=-2).argmin(1) for part in rows.split(500)])
    return (rows.double() - others[index].double()).square().mean(1).sqrt()


def diversity(features: Array, labels: Array) -> float:
    """Mean distance between two images of one class, relative to that of the held-out images."""
    return group_diversity(features, labels, distance="euclidean") / _held_out_spread()


@cache
def _held_out_spread() -> float:
    return group_diversity(held_out().features, held_out().labels, distance="euclidean")


def frechet_infinity_in_order(features: Array, reference: Array) -> float:
    """Fréchet distance of features (n, d) to a whole reference (m, d), extrapolated to infinitely many samples: a line in 1/n.

    For each k of `PARTS` the samples are cut in order into k equal parts and the parts' distances averaged; n is a multiple of 40. Samples
    in the order of `evaluation_labels` so have parts with as many of each class as the whole has. Parts drawn at random have not, and
    the classes' uneven shares add a bias that grows as the parts shrink: it would be subtracted from the intercept without being in
    `fd`. What the reference's own size adds stays, the same for all. Can be slightly negative at a true distance of 0.
    """
    points = []
    for k in PARTS:
        distances = [frechet_distance(part, reference) for part in np.split(features, k)]
        points.append((len(features) // k, math.fsum(distances) / k))
    return extrapolate(points).value


def values(seen: Seen, teacher_features: Array | None) -> dict[str, float]:
    """The scores by name; `fidelity-fd` only where features (m, 64) of the teacher's own samples are given."""
    reference = held_out()
    shares = prdc(seen.features, reference.features, neighbours=NEIGHBOURS, density_neighbours=DENSITY_NEIGHBOURS)
    found = {
        "fd": frechet_distance(seen.features, reference.features),
        "fd-inf": frechet_infinity_in_order(seen.features, reference.features),
        **shares._asdict(),
        "label-agreement": float(seen.agrees.mean()),
        "diversity": diversity(seen.features, seen.labels),
        "nearest": float(np.median(seen.nearest) / np.median(reference.nearest)),
    }
    if teacher_features is not None:
        found["fidelity-fd"] = frechet_distance(seen.features, teacher_features)
    return found


def deviations(seen: Seen, found: dict[str, float], teacher_features: Array | None) -> dict[str, float]:
    """Standard deviations of `values` over fresh samples, the reference held fixed, for samples in the order of `evaluation_labels`.

    By the bootstrap over rows of ten samples, one of each class, so that the classes stay balanced. Precision, recall and coverage are
    shares of points inside balls, and resampled points coincide and would shrink the balls: sqrt(p (1 - p) / n) over the points counted.
    """
    reference = held_out()
    centre = float(np.median(reference.nearest))
    classes = np.arange(CLASSES)
    if not np.array_equal(seen.labels, np.resize(classes, len(seen.labels))):
        raise UsageError("intervals are taken of samples whose labels are 0 to 9 again and again, as evaluation_labels() gives them")

    def spread(fn: Callable[[Array], float], rows: Array) -> float:
        return bootstrap(lambda tens: fn(tens.reshape(rows.shape)), [rows.reshape(len(rows) // CLASSES, -1)], resamples=RESAMPLES, seed=0)

    moved = {
        "fd": spread(lambda rows: frechet_distance(rows, reference.features), seen.features),
        "fd-inf": spread(lambda rows: frechet_infinity_in_order(rows, reference.features), seen.features),
        "density": spread(lambda rows: float(rows.mean()), balls_around(seen.features)),
        "label-agreement": spread(lambda rows: float(rows.mean()), seen.agrees),
        "diversity": spread(lambda rows: diversity(rows, seen.labels), seen.features),
        "nearest": spread(lambda rows: float(np.median(rows)) / centre, seen.nearest),
    }
    if teacher_features is not None:
        moved["fidelity-fd"] = spread(lambda rows: frechet_distance(rows, teacher_features), seen.features)
    counted = {"precision": len(seen.features), "recall": len(reference.features), "coverage": len(reference.features)}
    return moved | {name: math.sqrt(found[name] * (1 - found[name]) / points) for name, points in counted.items()}


def balls_around(features: Array) -> Array:
    """Number (n,) of held-out images whose 5th nearest neighbour is farther than the sample, over 5; their mean is the density."""
    rows = held_out().features
    distances = squared_distances(features, rows, squared_norms(rows))
    return (distances < _ball_radii()).sum(1) / DENSITY_NEIGHBOURS


@cache
def _ball_radii() -> Array:
    rows = held_out().features
    return np.partition(squared_distances(rows, rows, squared_norms(rows)), DENSITY_NEIGHBOURS, axis=1)[:, DENSITY_NEIGHBOURS]
