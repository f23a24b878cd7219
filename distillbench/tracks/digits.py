"""The track `digits@1`: real handwriting, 28x28, by class; 4,000 images to train on, 1,000 held out to score against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..api import Source
from ..conditions import Conditions
from ..data.digits import CLASSES, SHAPE, Digits, DigitsSource, digits_sha256, label_conditions, load_digits
from ..diffusion.denoiser import Denoiser
from ..errors import UsageError
from ..metrics.diversity import group_diversity, nearest_distance
from ..metrics.frechet import frechet_distance
from ..metrics.prdc import prdc
from ..metrics.score import Score, bootstrap, identity
from ..randomness import generator_for
from ..teachers.digits import load_reference_features, reference_sha256
from ..teachers.digits_classifier import classifier_sha256, features_of, labels_of
from ..teachers.zoo import load_teacher
from .base import Track
from .facts import FACTS, TrackFacts

PER_CLASS = 200
FIRST_SEED = 1_000_000
RESAMPLES = 16
EXTRACTOR = "digits-cnn64@28"
PREPROCESSING = ("clip to [-1, 1]",)


class DigitsTrack(Track):
    """2,000 samples, 200 of each class, against 1,000 held-out images on the 64 features of a classifier trained for this."""

    facts: ClassVar[TrackFacts] = FACTS["digits"]
    provides: ClassVar[frozenset[str]] = frozenset({"labels", "real data"})
    shape: ClassVar[tuple[int, ...]] = SHAPE
    batch_size: ClassVar[int] = 64
    evaluations: ClassVar[int] = PER_CLASS * CLASSES

    def teacher(self) -> Denoiser:
        return _teacher()

    def source(self) -> Source:
        return DigitsSource(load_digits("train"))

    def catalog(self) -> Conditions:
        return label_conditions(torch.arange(CLASSES))

    def evaluation(self) -> tuple[Conditions, Sequence[int]]:
        return label_conditions(_asked()), range(FIRST_SEED, FIRST_SEED + self.evaluations)

    def score(self, x: Tensor) -> list[Score]:
        if tuple(x.shape) != (self.evaluations, *self.shape):
            raise UsageError(f"digits are scored on samples of shape {(self.evaluations, *self.shape)}, not {tuple(x.shape)}")
        return self._scores(x, _asked(), "samples of evaluation()")

    def floor(self) -> list[Score]:
        """2,000 training images, 200 of each class, in place of samples; `nearest` alone is that of the held-out images, so 1.

        There are no 3,000 images to hold out. Training images are as fresh to the held-out set as a perfect sample would be, but the
        classifier was fitted to them: the floor of label-agreement is a little high, that of fd a little off.
        """
        train = load_digits("train")
        scores = self._scores(train.images[_floor_rows(train)], _asked(), "training images")
        return [self._held_out_nearest(score) if score.name == "nearest" else score for score in scores]
