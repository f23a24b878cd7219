"""What a published protocol takes of its images: `Distance` to real ones, `Agreement` with captions, each with its resize before.

The numbers themselves are `metrics.published`'s; here stands what is done to the images first, which is half of a protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.image_folder import set_sha256
from ..metrics.extractors import Extractor, embedded_extractor
from ..metrics.feature_cache import features_of_folder
from ..metrics.published import not_run
from ..metrics.published.clip import ClipScore
from ..metrics.published.hps import HpsScore
from ..metrics.published.inception import MODES, Inception, fid_score
from ..metrics.score import Score
from ..published_weights import weights_folder
from ..randomness import generator_for

if TYPE_CHECKING:
    from .published import PublishedTrack

EMBEDDED = "embedded"
RESAMPLES = 16
FEATURES = "features"  # folder beside the published weights: what was seen of reference images


@dataclass(frozen=True)
class Distance:
    """Fréchet distance to the reference. network: a mode of FID, or "embedded" for the features that need no published weights.

    size: the side to which images are brought before by PIL's Lanczos filter, real ones after a centre crop to a square.
    crop: the side of the patch that is cut from the middle instead, at the image's own scale.  Neither: as they are.
    """

    column: str
    network: str
    size: int | None = None
    crop: int | None = None

    @property
    def weights(self) -> str | None:
        """The name of its published weights."""
        return None if self.network == EMBEDDED else MODES[self.network][0]

    def load(self, device: str) -> Extractor:
        return embedded_extractor() if self.network == EMBEDDED else Inception(self.network, device=device)

    def look(self, extractor: Extractor, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Features (k, d) of images uint8 (k, 3, h, w)."""
        return extractor(brought(images, self.size, self.crop))

    def not_run(self, n: int) -> Score:
        return dataclasses.replace(not_run(f"fid/{self.network}-inception2015@299", n, higher_is_better=False), name=self.column)

    def reference(self, extractor: Extractor, track: PublishedTrack) -> tuple[Tensor, str, tuple[str, ...]]:
        """Features of all real images, the sha256 of the set, and how they were read."""
        images = track.reference(resize=self.size, crop=self.crop, kernel="bicubic" if self.crop else "lanczos")
        found = features_of_folder(images, extractor, weights_folder() / FEATURES)
        images.require()
        return found.features, set_sha256(found.sha256), images.reading

    def score(self, extractor: Extractor, features: Tensor, track: PublishedTrack, how: str) -> Score:
        real, sha256, reading = self.reference(extractor, track)
        found = fid_score(extractor, features, real, reference_sha256=sha256, seeds=track.evaluation_seeds(),
                          prompts_sha256=track.prompts_sha256(), resamples=RESAMPLES)  # fmt: skip
        return self._named(found, extractor, (how, *bringing(self.size, self.crop)), reading)

    def floor(self, extractor: Extractor | None, track: PublishedTrack) -> Score:
        if extractor is None:
            return self.not_run(track.definition.n)
        real, sha256, reading = self.reference(extractor, track)
        one, other = real[torch.randperm(len(real), generator=generator_for(0, "published/halves", len(real)))].chunk(2)
        found = fid_score(extractor, one, other, reference_sha256=sha256, resamples=RESAMPLES)
        return dataclasses.replace(self._named(found, extractor, reading, reading), note=f"two halves of the {len(real)} real images")

    def _named(self, score: Score, extractor: Extractor, generated: tuple[str, ...], real: tuple[str, ...]) -> Score:
        metric = f"{'fd' if self.network == EMBEDDED else 'fid'}/{extractor.name}"
        steps = [*(f"generated: {step}" for step in generated), *(f"real: {step}" for step in real), *extractor.preprocessing]
        return dataclasses.replace(score, name=self.column, identity={**score.identity, "metric": metric, "preprocessing": steps})


@dataclass(frozen=True)
class Agreement:
    """Cosine of image and caption. network: a key of `CLIPS`, or hps-v2.0, hps-v2.1.  prefix: put before every caption.

    size: as in `Distance`.
    """

    column: str
    network: str
    size: int | None = None
    prefix: str = ""

    @property
    def weights(self) -> str:
        return self.network

    def load(self, device: str) -> ClipScore:
        if self.network.startswith("hps-"):
            return HpsScore(self.network.removeprefix("hps-"), device=device)
        return ClipScore(self.network, device=device)

    def look(self, scorer: ClipScore, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines (k,)."""
        return torch.from_numpy(scorer.cosines(brought(images, self.size), self.said(captions)))

    def said(self, captions: Sequence[str]) -> list[str]:
        return [self.prefix + caption for caption in captions]

    def not_run(self, n: int) -> Score:
        return dataclasses.replace(not_run(self.network, n, higher_is_better=True), name=self.column)

    def score(self, scorer: ClipScore, cosines: Tensor, track: PublishedTrack, how: str) -> Score:
        found = scorer.score(cosines, self.said(track.prompts()), seeds=track.evaluation_seeds(), prompts_sha256=track.prompts_sha256())
        what = {**found.identity, "preprocessing": [how, *bringing(self.size), *scorer.preprocessing]}
        if self.prefix:
            what["estimator"] = f"{what['estimator']}; captions begin with {self.prefix!r}"
        return dataclasses.replace(found, name=self.column, identity=what)

    def floor(self, scorer: Any, track: PublishedTrack) -> Score:
        return dataclasses.replace(self.not_run(track.definition.n), note="not run: the reference images are not paired with the captions")


def brought(images: Tensor, size: int | None = None, crop: int | None = None) -> Tensor:
    """Square images uint8 (n, 3, h, h) resized by PIL's Lanczos filter, or cut, as `ImageFolder` does it with files."""
    h, w = images.shape[2:]
    if crop is not None and crop < min(h, w):
        top, left = (h - crop) // 2, (w - crop) // 2
        return images[:, :, top : top + crop, left : left + crop].contiguous()
    side = size or crop
    if side is None or (h, w) == (side, side):
        return images
    kernel = Image.Resampling.BICUBIC if crop else Image.Resampling.LANCZOS
    done = [np.asarray(Image.fromarray(image).resize((side, side), kernel)) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).contiguous()


def bringing(size: int | None, crop: int | None = None) -> tuple[str, ...]:
    """`brought` in words."""
    if crop is not None:
        return (f"centre {crop} x {crop}; a smaller image whole, PIL bicubic, antialiased, to that, uint8",)
    return () if size is None else (f"PIL lanczos, antialiased, to {size} x {size}, uint8",)
