"""The track `digits@1`: real handwriting, 28x28, by class; 4,000 images to train on, 1,000 held out to score against."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..api import Source
from ..conditions import Conditions
from ..data.digits import CLASSES, SHAPE, DigitsSource, digits_sha256, label_conditions, load_digits
from ..diffusion.denoiser import Denoiser
from ..errors import UsageError
from ..metrics.arrays import Array, as_float64
from ..metrics.digits import PARTS, deviations, evaluation_labels, evaluation_seeds, held_out, see, values
from ..metrics.score import Score, identity
from ..randomness import generator_for
from ..teachers.digits import reference_features, reference_sha256
from ..teachers.digits_classifier import classifier_sha256
from ..teachers.zoo import load_teacher, zoo_folder
from .base import Track
from .facts import FACTS, TrackFacts

EXTRACTOR = "digits-cnn64@28"
# name -> how it is estimated, on what, which way is better, unit
SCORES: dict[str, tuple[str, str, bool | None, str]] = {
    "fd": ("Fréchet distance to the reference", "features", False, "squared feature units"),
    "fd-inf": (
        f"Fréchet distance to the reference, intercept of the least-squares line in 1/n through the mean distances of {PARTS} equal parts "
        "in order, classes balanced",
        "features",
        False,
        "squared feature units",
    ),
    "precision": ("share of samples in a reference ball, k = 3", "features", True, ""),
    "recall": ("share of references in a sample's ball, k = 3", "features", True, ""),
    "density": ("reference balls around a sample, k = 5, over k", "features", True, ""),
    "coverage": ("share of reference balls that hold a sample, k = 5", "features", True, ""),
    "label-agreement": ("share of samples in which the classifier sees the label asked for", "logits", True, ""),
    "diversity": ("mean Euclidean distance within a class, over that of the reference", "features", None, "of real digits"),
    "nearest": ("median distance to the nearest training image, over the reference's", "pixels, root mean square", None, "of real digits"),
    "fidelity-fd": ("Fréchet distance to the teacher's 50-step samples", "features", False, "squared feature units"),
}


class Digits(Track):
    """2,000 samples, 200 of each class, against 1,000 held-out images on the 64 features of a classifier trained apart."""

    facts: ClassVar[TrackFacts] = FACTS["digits"]
    provides: ClassVar[frozenset[str]] = frozenset({"labels", "real data"})
    shape: ClassVar[tuple[int, ...]] = SHAPE
    batch_size: ClassVar[int] = 64
    evaluations: ClassVar[int] = len(evaluation_seeds())

    def teacher(self) -> Denoiser:
        return _teacher()

    def source(self) -> Source:
        return DigitsSource(load_digits("train"))

    def catalog(self) -> Conditions:
        return label_conditions(torch.arange(CLASSES))

    def evaluation(self) -> tuple[Conditions, Sequence[int]]:
        return label_conditions(evaluation_labels()), evaluation_seeds()

    def score(self, x: Tensor) -> list[Score]:
        """Scores of samples (2000, 1, 28, 28), which are clipped to [-1, 1]; about a second on one thread."""
        if tuple(x.shape) != (self.evaluations, *self.shape):
            raise UsageError(f"digits are scored on samples of shape {(self.evaluations, *self.shape)}, not {tuple(x.shape)}")
        seen, own = see(x, evaluation_labels()), _teacher_features()
        found = values(seen, own)
        moved = deviations(seen, found, own)
        return [self._score(name, found[name]).with_interval(moved[name]) for name in self.facts.columns]

    def floor(self) -> list[Score]:
        """2,000 training images, 200 of each class, in the place of samples; `nearest` is that of the held-out images, 1 by definition.

        Of 5,000 images no 3,000 can be held out. To the reference, training images are what a perfect student's samples would be, but
        the classifier was fitted to them: label-agreement is up to 2 % too high, and the features are a little too well separated.
        """
        note = "training images in the place of samples"
        scores = [dataclasses.replace(score, note=note) for score in self.score(self.truth())]
        nearest = dataclasses.replace(self._score("nearest", 1.0), n=len(held_out().nearest), note="held-out images, 1 by definition")
        return [nearest if score.name == "nearest" else score for score in scores]

    def truth(self) -> Tensor:
        train = load_digits("train")
        order = torch.randperm(len(train), generator=generator_for(0, "digits/floor", 0))
        per_class = self.evaluations // CLASSES
        rows = torch.stack([order[train.labels[order] == label][:per_class] for label in range(CLASSES)], 1).flatten()
        return train.images[rows]

    def _score(self, name: str, value: float) -> Score:
        estimator, domain, higher, unit = SCORES[name]
        return Score(name, _identity(name, estimator, domain), value, None, None, self.evaluations, higher, unit)


def _identity(name: str, estimator: str, domain: str) -> dict[str, Any]:
    on_features = domain != SCORES["nearest"][1]
    reference = {"nearest": f"{digits_sha256()} train, held-out", "fidelity-fd": reference_sha256(zoo_folder("digits")),
                 "label-agreement": None}.get(name, f"{digits_sha256()} held-out")  # fmt: skip
    sizes = {"fidelity-fd": len(_teacher_features()), "label-agreement": None, "nearest": len(load_digits("train"))}
    return identity(
        f"{name}/{EXTRACTOR}" if on_features else f"{name}/pixels@28",
        estimator=estimator,
        extractor=f"{EXTRACTOR}, {domain}" if on_features else domain,
        weights_sha256=classifier_sha256() if on_features else None,
        preprocessing=("clip to [-1, 1]",),
        dtype="features float32, statistics float64",
        n_generated=Digits.evaluations,
        n_reference=sizes.get(name, len(load_digits("held-out"))),
        reference_sha256=reference,
        prompts_sha256=hashlib.sha256(evaluation_labels().numpy().astype("<i8").tobytes()).hexdigest(),
        seeds=evaluation_seeds(),
    )


@cache
def _teacher() -> Denoiser:
    return load_teacher("digits")


@cache
def _teacher_features() -> Array:
    return as_float64(reference_features(zoo_folder("digits")))
