"""The track `emoji@1`: Google's emoji at 64x64, with names that the teacher was not trained on as captions.

Of the 1,906 drawings one in four is held out: their names are the captions, four samples of each, and their drawings the reference. The
category of a sample is read by least squares on the embedded features, fitted to the training drawings: nothing to ship.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..api import Source
from ..conditions import Conditions
from ..data.emoji import FETCH, SIDE, EmojiSet, load_emoji
from ..metrics.arrays import Array, as_float64
from ..metrics.categories import RIDGE, CategoryReader
from ..metrics.extractors import to_uint8
from ..metrics.images import image_scores, seen_features
from ..metrics.score import Score, bootstrap, identity
from .given import GivenTrack
from .text_to_image import AS_IMAGES


class EmojiSource(Source):
    """Latents of the training drawings and their embedded names, drawn with replacement."""

    def __init__(self, track: Emoji):
        self._track = track
        drawings = track.drawings(held_out=False)
        found = track.opened().conditions(drawings.captions)
        plain = {name: value for name, value in found.fields.items() if isinstance(value, Tensor)}
        self._embedded = Conditions(plain, {name: found.nulls[name] for name in plain})

    @cached_property
    def latents(self) -> Tensor:
        return self._track.encode(self._track.drawings(held_out=False).images)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        rows = torch.randint(len(self._embedded), (n,), generator=generator)
        return self.latents[rows], self._embedded[rows]

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return self._embedded[torch.randint(len(self._embedded), (n,), generator=generator)]


class Emoji(GivenTrack):
    """Held against the held-out drawings themselves."""

    batch_size: ClassVar[int] = 64
    teacher_help = "a pipeline folder; without one, the shipped"
    data_help = f"the package of the drawings, its .tgz or folder: {FETCH}"
    pipelines = ("StableDiffusionPipeline", "SanaPipeline")
    image_size = (SIDE, SIDE)

    def drawings(self, held_out: bool) -> EmojiSet:
        return load_emoji(self.data_path).split(held_out)

    @cached_property
    def teacher_path(self) -> Path:  # type: ignore[override]
        """The shipped pipeline, unless another is given."""
        from ..teachers.shapes_pipelines import shipped_pipeline

        return self._teacher or shipped_pipeline("emoji")

    def data_checksums(self) -> dict[str, str]:
        return {"drawings": load_emoji(self.data_path).sha256}

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return self.per_prompt * len(self.prompts())

    @cached_property
    def guidance(self) -> float:  # type: ignore[override]
        return self.opened().guidance

    @cached_property
    def _source(self) -> Source:
        return EmojiSource(self)

    def source(self) -> Source:
        return self._source

    def prompts(self) -> list[str]:
        return list(self.drawings(held_out=True).captions)

    def reference_images(self) -> Tensor:
        return self.drawings(held_out=True).images

    def truth(self) -> Tensor:
        """As latents: the held-out drawings through the autoencoder, in the order of the captions."""
        return self.encode(self.reference_images()).repeat_interleave(self.per_prompt, 0)

    # ------------------------------------------------------------------ scores

    @cached_property
    def _reader(self) -> CategoryReader:
        train = self.drawings(held_out=False)
        return CategoryReader(as_float64(self.extractor(train.images)), train.labels.numpy(), len(train.categories))

    def read_categories(self, features: Tensor) -> Array:
        """The category (n,) that each row of features shows, a place in `EmojiSet.categories`."""
        return self._reader.read(as_float64(features))

    def agreement(self, features: Tensor, labels: Tensor, how: str) -> Score:
        """The share of rows whose category is that of their caption; the interval over captions, `per_prompt` rows each."""
        right = (self.read_categories(features) == labels.numpy()).astype(np.float64)
        what = identity(
            "label-agreement/emoji", estimator=f"ridge regression ({RIDGE:g}) on training drawings, share of right categories",
            extractor=self.extractor.name, weights_sha256=self.extractor.weights_sha256,
            preprocessing=(how, *self.extractor.preprocessing), n_generated=len(right),
            reference_sha256=f"{load_emoji(self.data_path).sha256} train", prompts_sha256=self.prompts_sha256(),
            seeds=self.evaluation_seeds(),
        )  # fmt: skip
        score = Score("label-agreement", what, float(right.mean()), None, None, len(right), True)
        by_caption = right.reshape(len(self.prompts()), -1)
        return score.with_interval(bootstrap(lambda drawn: float(drawn.mean()), [by_caption], seed=0))

    def scores_of(self, looked: Mapping[str, Tensor], how: str = AS_IMAGES) -> list[Score]:
        labels = self.drawings(held_out=True).labels.repeat_interleave(self.per_prompt)
        return [*super().scores_of(looked, how), self.agreement(looked["features"], labels, how)]

    def floor(self) -> list[Score]:
        """The training drawings against the held-out ones, and the categories read in the held-out ones, all through the autoencoder."""
        train, held_out = (self._through(self.drawings(side).images) for side in (False, True))
        found = image_scores(seen_features(train), self._reference, self.extractor, image_steps=(AS_IMAGES,))
        found.append(self.agreement(held_out, self.drawings(held_out=True).labels, AS_IMAGES))
        note = "real drawings through the teacher's autoencoder"
        return self.ordered([dataclasses.replace(score, note=score.note or note) for score in found])

    def _through(self, images: Tensor) -> Tensor:
        """Features of images after the autoencoder, uint8 again."""
        return torch.cat([self.extractor(to_uint8(self.decode(self.encode(part)))) for part in images.split(self.chunk)])
