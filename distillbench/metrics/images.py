"""What a set of images scores against a reference set, on the features of one extractor: distance, cover, variety, with their intervals.

Every number is named by its extractor, as in `fd/efflite0-b10@64`. Images that belong to one prompt are drawn again together for the
intervals, since they are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError
from .arrays import Array, as_labels, as_rows, squared_distances, squared_norms
from .extractors import Extractor
from .frechet import frechet_distance
from .kernel import kernel_distance
from .prdc import prdc
from .score import Score, identity
from .vendi import vendi

RESAMPLES = 16
BLOCK = 1024
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
SEEDS_PER_PROMPT = 4  # images of a prompt that its diversity needs
# name -> how it is estimated, what it is held against, which way is better, unit
SCORES: dict[str, tuple[str, str, bool | None, str]] = {
    "fd": ("Fréchet distance to the reference", "reference", False, "squared feature units"),
    "kid": ("squared MMD, kernel (x.y/d + 1)^3, unbiased over all pairs, to the reference", "reference", False, ""),
    "precision": (f"share of samples in a reference ball, k = {NEIGHBOURS}", "reference", True, ""),
    "recall": (f"share of references in a sample's ball, k = {NEIGHBOURS}", "reference", True, ""),
    "density": (f"reference balls around a sample, k = {DENSITY_NEIGHBOURS}, over k", "reference", True, ""),
    "coverage": (f"share of reference balls that hold a sample, k = {DENSITY_NEIGHBOURS}", "reference", True, ""),
    "vendi": ("exp of the entropy of the eigenvalues of the cosine similarities over n", "", None, "images"),
    "diversity": ("mean over prompts of the mean over pairs of its images of 1 - cosine similarity", "", None, ""),
    "fidelity-fd": ("Fréchet distance to the teacher's samples", "teacher", False, "squared feature units"),
    "fidelity-kid": ("squared MMD, kernel (x.y/d + 1)^3, unbiased over all pairs, to the teacher's samples", "teacher", False, ""),
}


@dataclass(frozen=True)
class Seen:
    """What the scores see of n images. features: (n, d).  prompts: the number of each one's prompt, (n,); all different without prompts."""

    features: Array
    prompts: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.features) != len(self.prompts):
            raise UsageError(f"{len(self.features)} images have {len(self.prompts)} prompts: give the number of its prompt for each image")

    @cached_property
    def groups(self) -> list[NDArray[np.int64]]:
        """The rows of each prompt."""
        order = np.argsort(self.prompts, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.prompts[order])) + 1)


@dataclass(frozen=True)
class Reference:
    """Images to be held against. features: (m, d), of the same extractor.  sha256: of the set, as `image_folder.set_sha256` makes it."""

    features: Array
    sha256: str

    @cached_property
    def radii(self) -> tuple[Array, Array]:
        """Squared distances (m,) of each row to its 3rd and to its 5th nearest other row."""
        norms = squared_norms(self.features)
        parts = []
        for start in range(0, len(self.features), BLOCK):
            distances = squared_distances(self.features[start : start + BLOCK], self.features, norms)
            here = np.arange(len(distances))
            distances[here, start + here] = np.inf  # not its own neighbour
            parts.append(np.partition(distances, (NEIGHBOURS - 1, DENSITY_NEIGHBOURS - 1), axis=1)[:, :DENSITY_NEIGHBOURS])
        nearest = np.concatenate(parts)
        return nearest[:, NEIGHBOURS - 1], nearest[:, DENSITY_NEIGHBOURS - 1]


def see(images: Tensor, extractor: Extractor, prompts: Sequence[int] | Tensor | None = None) -> Seen:
    """uint8 images (n, 3, h, w) and the number of the prompt of each, (n,)."""
    return seen_features(extractor(images), prompts)


def seen_features(features: Tensor | Array, prompts: Sequence[int] | Tensor | None = None) -> Seen:
    """As `see`, of features (n, d) that were taken before."""
    rows = as_rows(features, "features of images")
    return Seen(rows, np.arange(len(rows)) if prompts is None else as_labels(prompts, len(rows), "prompts"))


def values(seen: Seen, reference: Reference, teacher: Reference | None = None) -> dict[str, float]:
    """The scores by name. `diversity` only where every prompt has 4 images or more, `fidelity-` ones only with the teacher's images."""
    features = seen.features
    shares = prdc(features, reference.features, neighbours=NEIGHBOURS, density_neighbours=DENSITY_NEIGHBOURS)
    found = {
        "fd": frechet_distance(features, reference.features),
        "kid": kernel_distance(features, reference.features),
        **shares._asdict(),
        "vendi": vendi(features),
    }
    if _enough_per_prompt(seen):
        found["diversity"] = float(prompt_diversities(seen).mean())
    if teacher is not None:
        found["fidelity-fd"] = frechet_distance(features, teacher.features)
        found["fidelity-kid"] = kernel_distance(features, teacher.features)
    return found


def deviations(seen: Seen, found: dict[str, float], reference: Reference, teacher: Reference | None = None) -> dict[str, float]:
    """Standard deviations of `values` over fresh prompts and samples, the reference held fixed; none with fewer than two prompts.

    By the bootstrap over prompts. Recall and coverage count reference rows in balls that resampled points, which coincide, would
    shrink: there it is sqrt(p (1 - p) / m) over the rows counted.
    """
    if len(seen.groups) < 2:
        return {}
    draws = _draws(seen)

    def spread(fn: Callable[[NDArray[np.int64]], float]) -> float:
        return float(np.std([fn(rows) for rows in draws], ddof=1))

    features = seen.features
    precise, balls = balls_around(features, reference)
    moved = {
        "fd": spread(lambda rows: frechet_distance(features[rows], reference.features)),
        "kid": _kernel_deviation(features, reference.features, draws),
        "precision": spread(lambda rows: float(precise[rows].mean())),
        "density": spread(lambda rows: float(balls[rows].mean())),
        "vendi": spread(lambda rows: vendi(features[rows])),
    }
    if "diversity" in found:
        each = prompt_diversities(seen)
        moved["diversity"] = float(each.std(ddof=1)) / math.sqrt(len(each))
    if teacher is not None:
        moved["fidelity-fd"] = spread(lambda rows: frechet_distance(features[rows], teacher.features))
        moved["fidelity-kid"] = _kernel_deviation(features, teacher.features, draws)
    counted = len(reference.features)
    return moved | {name: math.sqrt(found[name] * (1 - found[name]) / counted) for name in ("recall", "coverage")}


def image_scores(
    seen: Seen, reference: Reference, extractor: Extractor, *, image_steps: tuple[str, ...] = (), teacher: Reference | None = None,
    prompts_sha256: str | None = None, seeds: Sequence[int] = (),
) -> list[Score]:  # fmt: skip
    """All scores of an image set with 95 % intervals, in the order of SCORES; one that cannot be taken has no value and says why.

    image_steps: what was done to the images before the extractor saw them (`ImageFolder.reading`, or how samples became uint8).
    """
    found = values(seen, reference, teacher)
    moved = deviations(seen, found, reference, teacher)
    scores = []
    for name, (estimator, against, higher, unit) in SCORES.items():
        held = {"reference": reference, "teacher": teacher}.get(against)
        if against == "teacher" and teacher is None:
            continue
        what = identity(
            f"{name}/{extractor.name}",
            estimator=estimator,
            extractor=extractor.name,
            weights_sha256=extractor.weights_sha256,
            preprocessing=(*image_steps, *extractor.preprocessing),
            dtype="features float32, statistics float64",
            n_generated=len(seen.features),
            n_reference=None if held is None else len(held.features),
            reference_sha256=None if held is None else held.sha256,
            prompts_sha256=prompts_sha256,
            seeds=seeds,
        )
        note = "" if name in found else f"not run: some prompt has fewer than {SEEDS_PER_PROMPT} images"
        score = Score(name, what, found.get(name), None, None, len(seen.features), higher, unit, note)
        scores.append(score.with_interval(moved[name]) if name in moved else score)
    return scores


def prompt_diversities(seen: Seen) -> Array:
    """Mean (prompts,) over the pairs of images of one prompt of 1 - cosine similarity; every prompt has at least two."""
    lengths = np.linalg.norm(seen.features, axis=1)
    if (lengths == 0).any():
        raise UsageError(f"{int((lengths == 0).sum())} feature rows are all zero and have no direction: their diversity is undefined")
    unit = seen.features / lengths[:, None]
    sums = np.stack([unit[rows].sum(0) for rows in seen.groups])
    counts = np.array([len(rows) for rows in seen.groups], dtype=np.float64)
    if counts.min() < 2:
        raise UsageError("a prompt has one image: diversity within prompts needs at least two of each")
    return np.maximum(1 - (squared_norms(sums) - counts) / (counts * (counts - 1)), 0.0)


def balls_around(features: Array, reference: Reference) -> tuple[Array, Array]:
    """Of each row (n,): 1 if it lies in the ball of a reference row at k = 3, and the number of those balls at k = 5, over 5.

    Their means are the precision and the density of `prdc`.
    """
    norms = squared_norms(reference.features)
    rim, open_rim = reference.radii
    precise, balls = np.empty(len(features)), np.empty(len(features))
    for start in range(0, len(features), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = squared_distances(features[rows], reference.features, norms)
        precise[rows] = (distances <= rim).any(1)
        balls[rows] = (distances < open_rim).sum(1) / DENSITY_NEIGHBOURS
    return precise, balls


def _enough_per_prompt(seen: Seen) -> bool:
    return min(len(rows) for rows in seen.groups) >= SEEDS_PER_PROMPT


def _draws(seen: Seen) -> list[NDArray[np.int64]]:
    """Rows of `RESAMPLES` sets, each of as many prompts as there are, drawn with replacement."""
    generator = np.random.default_rng(0)
    groups = seen.groups
    return [np.concatenate([groups[g] for g in generator.integers(len(groups), size=len(groups))]) for _ in range(RESAMPLES)]


def _kernel_deviation(features: Array, reference: Array, draws: list[NDArray[np.int64]]) -> float:
    """Standard deviation of the unbiased kernel distance over the draws.

    An image that was drawn twice is no pair with itself: pairs are weighted by how often both were drawn, and those of an image with
    itself left out. All draws share one pass over the kernel. What the reference has within itself is constant and left out as well.
    """
    n, width = features.shape
    times = np.stack([np.bincount(rows, minlength=n) for rows in draws], 1).astype(np.float64)  # (n, draws)
    within, across = np.zeros(len(draws)), np.zeros(len(draws))
    for start in range(0, n, BLOCK):
        rows = slice(start, start + BLOCK)
        for other in range(0, n, BLOCK):
            kernel = (features[rows] @ features[other : other + BLOCK].T / width + 1) ** 3
            if other == start:
                np.fill_diagonal(kernel, 0.0)
            within += np.einsum("nr,nr->r", times[rows], kernel @ times[other : other + BLOCK])
        for other in range(0, len(reference), BLOCK):
            kernel = (features[rows] @ reference[other : other + BLOCK].T / width + 1) ** 3
            across += times[rows].T @ kernel.sum(1)
    total = times.sum(0)
    pairs = total * total - (times * times).sum(0)
    return float(np.std(within / pairs - 2 * across / (total * len(reference)), ddof=1))
