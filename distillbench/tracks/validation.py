"""What tuning is judged on: the teacher, data and conditions of a track, but noise and a reference that no board uses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ..conditions import Conditions
from ..data import mixture
from ..data.digits import CLASSES, digits_sha256, load_digits
from ..metrics.arrays import Array, as_float64
from ..metrics.digits import evaluation_labels
from ..metrics.frechet import frechet_distance
from ..metrics.score import Score, identity
from ..randomness import generator_for
from ..teachers.digits_classifier import classifier_sha256, features_of
from .digits import EXTRACTOR, Digits
from .facts import VALIDATION, TrackFacts
from .mixture2d import Mixture2D, N, sliced_to, truth_sample

FIRST_SEED = 3_000_000
REFERENCE_PER_CLASS = 100


class Mixture2DValidation(Mixture2D):
    """`sliced-w2` to another fixed sample of the mixture, from other noise."""

    facts: ClassVar[TrackFacts] = VALIDATION["mixture2d-validation"]

    def evaluation(self) -> tuple[Conditions, Sequence[int]]:
        return super().evaluation()[0], range(FIRST_SEED, FIRST_SEED + N)

    def score(self, x: Tensor) -> list[Score]:
        reference = truth_sample("validation")
        value = sliced_to(as_float64(reference))(as_float64(x, "samples").reshape(mixture.CLASSES, -1, 2))
        what = identity(
            "sliced-w2/mixture2d-validation", estimator="sliced W2", n_generated=N, n_reference=N,
            reference_sha256=hashlib.sha256(reference.numpy().tobytes()).hexdigest(), seeds=range(FIRST_SEED, FIRST_SEED + N),
        )  # fmt: skip
        return [Score("sliced-w2", what, value, None, None, N, False)]


class DigitsValidation(Digits):
    """`fd` to 1,000 of the training images, 100 of each class, from other noise: of 5,000 images no third set can be spared."""

    facts: ClassVar[TrackFacts] = VALIDATION["digits-validation"]

    def evaluation(self) -> tuple[Conditions, Sequence[int]]:
        return super().evaluation()[0], range(FIRST_SEED, FIRST_SEED + self.evaluations)

    def score(self, x: Tensor) -> list[Score]:
        features = as_float64(features_of(x.float().cpu().clamp(-1, 1)), "features of samples")
        what = identity(
            f"fd/{EXTRACTOR}-validation", estimator="Fréchet distance to training images", extractor=EXTRACTOR,
            weights_sha256=classifier_sha256(), n_generated=self.evaluations, n_reference=len(_training_features()),
            reference_sha256=f"{digits_sha256()} train", prompts_sha256=hashlib.sha256(evaluation_labels().numpy().tobytes()).hexdigest(),
            seeds=range(FIRST_SEED, FIRST_SEED + self.evaluations),
        )  # fmt: skip
        return [Score("fd", what, frechet_distance(features, _training_features()), None, None, self.evaluations, False)]


@cache
def _training_features() -> Array:
    train = load_digits("train")
    order = torch.randperm(len(train), generator=generator_for(0, "digits/validation", 0))
    rows = torch.cat([order[train.labels[order] == label][:REFERENCE_PER_CLASS] for label in range(CLASSES)])
    return as_float64(features_of(train.images[rows]))
