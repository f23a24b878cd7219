"""The protocols by which papers score, each a `Definition`: coco-sd15, coco-sdxl, mjhq-sana, cifar10. docs/tracks.md has the layout.

    DATA/prompts.txt              the evaluation captions, one a line, at least n (or `meta_data.json`, as MJHQ-30K has it)
    DATA/reference/               the real images that samples are held against, subfolders included
    DATA/training/captions.txt    captions to train on, one a line; those of the images, in the order of their names, where there are any
    DATA/training/images/         real images to train on; without them a method that needs real data is skipped

Images are made, decoded, looked at and dropped a chunk at a time. Features of the reference are kept beside the published weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..api import Source
from ..conditions import Conditions
from ..data.image_folder import ImageFolder, set_sha256
from ..errors import BadFileError, UsageError
from ..metrics.score import Score
from ..networks.files import sha256_file
from ..published_weights import WeightsMissing
from .facts import TrackFacts
from .given import GivenSource, GivenTrack, Prompts
from .measures import Agreement, Distance
from .text_to_image import AS_IMAGES

REFERENCE, CAPTIONS, IMAGES = "reference", "training/captions.txt", "training/images"


@dataclass(frozen=True)
class Definition:
    """One published protocol. n: images that are made, one of each caption.  side: of the teacher's square images, in pixels.

    pipelines: the classes of diffusers that its teacher may have.  teacher: where one is to be had, in words.  data: the same for the data.
    prompts: the file of captions under the data, "" for a teacher without.  prompts_sha256: of that file where its true checksum is known;
    None: that of the file in use, which is part of every score's identity either way.
    guidance: scale of the teacher's samples.  measures: what is taken, in the order of the columns.
    parameters: of the teacher's network, for the memory that `doctor` estimates.  chunk: images at a time.
    sources: where each of this is from, a line each.
    """

    n: int
    side: int
    pipelines: tuple[str, ...]
    teacher: str
    data: str
    prompts: str
    guidance: float
    measures: tuple[Distance | Agreement, ...]
    parameters: float
    chunk: int
    sources: tuple[str, ...]
    prompts_sha256: str | None = None
    batch_size: int = 16


class PublishedTrack(GivenTrack):
    """The track of a definition."""

    per_prompt: ClassVar[int] = 1

    def __init__(self, facts: TrackFacts, definition: Definition, teacher: str | Path | None = None, data: str | Path | None = None):
        super().__init__(facts, teacher, data)
        self.definition = definition
        self.guidance = definition.guidance  # type: ignore[misc]
        self.batch_size = definition.batch_size  # type: ignore[misc]
        self.evaluations = definition.n  # type: ignore[misc]
        self.chunk = self.at_once = definition.chunk  # type: ignore[misc]
        self._networks: dict[tuple[str, str], Any] = {}

    @property
    def teacher_help(self) -> str:
        return self.definition.teacher

    @property
    def data_help(self) -> str:
        return self.definition.data

    @property
    def pipelines(self) -> tuple[str, ...]:
        return self.definition.pipelines

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.definition.side, self.definition.side)

    @property
    def has_text(self) -> bool:
        return bool(self.definition.prompts)

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(({"text"} if self.has_text else set()) | ({"real data"} if self._training_images else set()))

    # ------------------------------------------------------------------ data

    @cached_property
    def _prompts(self) -> list[str]:
        if not self.has_text:
            return []
        path = self.data_path / self.definition.prompts
        captions = read_captions(path, self.data_help)
        if len(captions) < self.definition.n:
            raise UsageError(f"{path}: {len(captions)} captions, and {self.facts.name} is scored on {self.definition.n}: {self.data_help}")
        if self.definition.prompts_sha256 not in (None, sha256_file(path)):
            raise BadFileError(f"{path}: not the captions of {self.facts.name}, by its checksum: {self.data_help}")
        return captions[: self.definition.n]

    def prompts(self) -> list[str]:
        return self._prompts

    def prompts_sha256(self) -> str | None:  # type: ignore[override]
        return super().prompts_sha256() if self.has_text else None

    def reference(self, **reading: Any) -> ImageFolder:
        """The real images, read as `ImageFolder` is told."""
        folder = self.data_path / REFERENCE
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of real images; {self.facts.name} needs {self.data_help}")
        return ImageFolder(folder, **reading)

    def reference_images(self) -> Tensor:
        raise UsageError(f"the reference of {self.facts.name} is read as a stream: see `reference`")

    @cached_property
    def _training_images(self) -> ImageFolder | None:
        if not self.has_text:
            return self.reference(resize=self.definition.side)
        folder = self.data_path / IMAGES
        return ImageFolder(folder, resize=self.definition.side) if folder.is_dir() else None

    @cached_property
    def _source(self) -> Source:
        images = self._training_images
        if not self.has_text:
            return GivenSource(self, images, None)
        path = self.data_path / CAPTIONS
        captions = read_captions(path, self.data_help)
        if images is not None and len(images.names) != len(captions):
            raise UsageError(f"{path}: {len(captions)} captions for {len(images.names)} images in {IMAGES}; give one line for each")
        return GivenSource(self, images, captions)

    def source(self) -> Source:
        return self._source

    @cached_property
    def _data_checksums(self) -> dict[str, str]:
        """Captions and reference images by content; training images, of which there may be millions, by name and size."""
        reference = self.reference(resize=self.definition.side)
        found = {"reference": set_sha256([sha256_file(reference.folder / name) for name in reference.names])}
        if self.has_text:
            self.prompts()
            found["prompts"] = sha256_file(self.data_path / self.definition.prompts)
            if (self.data_path / CAPTIONS).is_file():
                images = self._training_images
                sizes = [] if images is None else [f"{name} {(images.folder / name).stat().st_size}" for name in images.names]
                told = "\n".join([sha256_file(self.data_path / CAPTIONS), *sizes])
                found["training"] = hashlib.sha256(told.encode()).hexdigest()
        return found

    def data_checksums(self) -> dict[str, str]:
        return self._data_checksums

    # ------------------------------------------------------------------ samples

    def evaluation_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.definition.n)

    @cached_property
    def _evaluation(self) -> Conditions:
        return Prompts(self.prompts(), self.opened().conditions) if self.has_text else Conditions.none(self.definition.n)

    def truth(self) -> Tensor:
        """None: real images that are nobody's caption would be shown under captions of others."""
        return torch.empty(0, *self.shape)

    # ------------------------------------------------------------------ scores

    def network(self, measure: Distance | Agreement) -> Any:
        """The network of a measure, loaded once, or None where its weights are missing."""
        device = str(self.device()) if "_opened" in vars(self) else "cpu"
        key = (measure.network, device)
        if key not in self._networks:
            try:
                self._networks[key] = measure.load(device)
            except WeightsMissing:
                return None
        return self._networks[key]

    def look(self, images: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        found = {}
        for measure in self.definition.measures:
            network = self.network(measure)
            if network is not None:
                captions = [self.prompts()[row] for row in rows] if self.has_text else []
                found[measure.column] = measure.look(network, images, captions)
        return found

    def scores_of(self, looked: Mapping[str, Tensor], how: str = AS_IMAGES) -> list[Score]:
        return [
            measure.score(self.network(measure), looked[measure.column], self, how)
            if measure.column in looked
            else measure.not_run(self.definition.n)
            for measure in self.definition.measures
        ]

    def score(self, x: Tensor) -> list[Score]:
        """Says on its first score how many captions the teacher's text encoder cut."""
        first, *rest = super().score(x)
        return [dataclasses.replace(first, note=first.note or self._cut_note), *rest]

    @cached_property
    def _cut_note(self) -> str:
        cut = len(self.opened().too_long(self.prompts()))
        return f"{cut} of {self.definition.n} captions are longer than the text encoder takes and were cut" if cut else ""

    def floor(self) -> list[Score]:
        """Distances between two halves of the reference; agreement with captions is not taken of it."""
        found = [measure.floor(self.network(measure), self) for measure in self.definition.measures]
        return self.ordered(found)


def read_captions(path: Path, needs: str) -> list[str]:
    """One a line; or, from a .json as MJHQ-30K has it, the `prompt` of each entry in its order."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{path}: no such file, or not a text; needed is {needs}") from None
    if path.suffix == ".json":
        try:
            return [str(entry["prompt"]) for entry in json.loads(text).values()]
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
            raise UsageError(f"{path}: not an object of entries with a prompt; needed is {needs}") from None
    captions = text.split("\n")
    captions = captions[:-1] if captions[-1] == "" else captions
    empty = [number for number, caption in enumerate(captions, start=1) if not caption.strip()]
    if empty:
        raise UsageError(f"{path}: line {empty[0]} is empty; write one caption a line")
    return [caption.rstrip("\r") for caption in captions]
