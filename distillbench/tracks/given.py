"""What tracks have in common whose teacher and data lie on the user's disk and are named by `--teacher PATH` and `--data PATH`.

Paths stay here: records hold checksums of what was found at them.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..api import Source
from ..conditions import Conditions
from ..data.image_folder import ImageFolder
from ..errors import UsageError
from ..networks.files import sha256_file
from .facts import TrackFacts
from .text_to_image import PipelineTrack

if TYPE_CHECKING:
    from ..teachers.diffusers import DiffusersTeacher

# What follows a file's name up to its first dot, in the folder of a pipeline: no code, no weights in other precisions, no pickles.
READ = ("json", "txt", "model", "safetensors", "safetensors.index.json")


class GivenTrack(PipelineTrack):
    """A track of a teacher and data that are given. Both may be None: what needs them then says so in one line."""

    def __init__(self, facts: TrackFacts, teacher: str | Path | None = None, data: str | Path | None = None):
        self.facts = facts  # type: ignore[misc]
        self._teacher = None if teacher is None else Path(teacher)
        self._data = None if data is None else Path(data)

    @property
    @abstractmethod
    def teacher_help(self) -> str:
        """How a user comes by a teacher, a phrase."""

    @property
    @abstractmethod
    def data_help(self) -> str:
        """How a user comes by the data, a phrase."""

    @property
    @abstractmethod
    def pipelines(self) -> tuple[str, ...]:
        """Classes of diffusers that may be the teacher."""

    @abstractmethod
    def data_checksums(self) -> dict[str, str]:
        """What of the data determines a result: its name -> sha256."""

    @property
    def teacher_path(self) -> Path:
        if self._teacher is None:
            raise UsageError(f"{self.facts.name} needs --teacher PATH: {self.teacher_help}")
        return self._teacher

    @property
    def data_path(self) -> Path:
        if self._data is None:
            raise UsageError(f"{self.facts.name} needs --data PATH: {self.data_help}")
        if not self._data.exists():
            raise UsageError(f"--data {self._data}: not there; {self.facts.name} needs {self.data_help}")
        return self._data

    def teacher_class(self) -> str:
        """The class that the teacher's folder names; raises UsageError for one that this track does not take. Nothing is loaded."""
        path = self.teacher_path / "model_index.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
        except (OSError, ValueError, RecursionError, TypeError, KeyError):
            raise UsageError(f"--teacher {self.teacher_path}: no pipeline folder, its model_index.json is missing or no index") from None
        if found not in self.pipelines:
            raise UsageError(f"--teacher {self.teacher_path}: a {found}; {self.facts.name} takes {' or '.join(self.pipelines)}")
        return str(found)

    def checksums(self) -> dict[str, str]:
        self.teacher_class()
        return {"teacher": teacher_sha256(self.teacher_path), **self.data_checksums()}

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.opened().shape

    @cached_property
    def _opened(self) -> DiffusersTeacher:
        from ..teachers.diffusers import open_pipeline

        self.teacher_class()
        opened = open_pipeline(self.teacher_path)
        if opened.image_size != self.image_size:
            made, wanted = (" x ".join(map(str, size)) for size in (opened.image_size, self.image_size))
            raise UsageError(f"--teacher {self.teacher_path}: makes images of {made} pixels, {self.facts.name} is about {wanted}")
        return opened

    def opened(self) -> DiffusersTeacher:
        return self._opened

    def device(self) -> torch.device:
        """Where the teacher's network is."""
        return next(iter(self.opened().denoiser.network.state_dict().values())).device

    def decode(self, x: Tensor) -> Tensor:
        opened = self.opened().to(self.device())  # the autoencoder follows the network
        return torch.cat([opened.decode(part.to(self.device())).cpu() for part in x.split(self.chunk)])

    def encode(self, images: Tensor) -> Tensor:
        """Latents, on the CPU, of images uint8 (n, 3, h, w)."""
        opened = self.opened().to(self.device())
        return torch.cat([opened.encode(part.to(self.device()).float() / 255).cpu() for part in images.split(self.chunk)])


class Prompts(Conditions):
    """Conditions that are embedded when some of them are picked: all embeddings at once would take tens of gigabytes."""

    def __init__(self, prompts: Sequence[str], embed: Callable[[Sequence[str]], Conditions]):
        super().__init__({"prompt": list(prompts)}, {"prompt": ""})
        self._embed = embed

    def __getitem__(self, index: Any) -> Conditions:
        return self._embed(super().__getitem__(index).field("prompt"))


class GivenSource(Source):
    """Images of a folder, read when they are drawn, and captions; drawn with replacement.

    images: None without real data.  captions: that of each image, or captions alone; None where the teacher takes none.
    """

    def __init__(self, track: GivenTrack, images: ImageFolder | None, captions: Sequence[str] | None):
        self._track, self._images, self._captions = track, images, captions
        self._size = len(captions) if captions is not None else len(images.names) if images is not None else 0

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        if self._images is None:
            raise UsageError(f"{self._track.facts.name}: the data have no training images to draw: {self._track.data_help}")
        rows = torch.randint(self._size, (n,), generator=generator).tolist()
        images = torch.stack([self._images.read(self._images.names[row]) for row in rows])
        return self._track.encode(images), self._conditions(rows)

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return self._conditions(torch.randint(self._size, (n,), generator=generator).tolist())

    def _conditions(self, rows: list[int]) -> Conditions:
        if self._captions is None:
            return Conditions.none(len(rows))
        found = self._track.opened().conditions([self._captions[row] for row in rows])
        plain = {name: value for name, value in found.fields.items() if isinstance(value, Tensor)}
        return Conditions(plain, {name: found.nulls[name] for name in plain})


@cache
def teacher_sha256(folder: Path) -> str:
    """Of the files that a pipeline is loaded from, their names included; taken once a process, since it may be gigabytes."""
    found = [file for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*/*")) if file.is_file()]
    read = [file for file in found if file.name.partition(".")[2] in READ]
    told = "\n".join(f"{file.relative_to(folder).as_posix()} {sha256_file(file)}" for file in read)
    return hashlib.sha256(told.encode()).hexdigest()
