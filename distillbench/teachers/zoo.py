"""The networks that are shipped, by name: where they lie and how `distillbench zoo train NAME` makes them again. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import unknown

if TYPE_CHECKING:
    from ..diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class ZooEntry:
    """One shipped network. cost: what training it takes, in words.  module: the file beside this one that holds `train`."""

    name: str
    title: str
    cost: str
    module: str

    @property
    def folder(self) -> Path:
        return Path(__file__).parent / "weights" / self.name

    def train(self, folder: Path, progress: Callable[[str], None], **options: Any) -> dict[str, Any]:
        """Train it, write its files into `folder` and return its card. Options: steps, seed."""
        return import_module(f".{self.module}", __package__).train(folder, progress, **options)


ENTRIES = (
    ZooEntry("mixture2d", "MLP fitted to the exact velocity of the 2-D mixture", "about 2 minutes on one core", "mixture2d"),
    ZooEntry("digits", "flow transformer on 4,000 handwritten digits", "at most 30 minutes on two cores", "digits"),
    ZooEntry("digits-classifier", "classifier whose features score digits", "a few minutes on one core", "digits_classifier"),
)
ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in ENTRIES}


def zoo_entry(name: str) -> ZooEntry:
    """The entry of that name; raises UsageError with the nearest names."""
    if name not in ZOO:
        raise unknown("network of the zoo", name, ZOO)
    return ZOO[name]


def zoo_folder(name: str) -> Path:
    """Where the shipped files of `name` lie."""
    return zoo_entry(name).folder


def load_teacher(name: str) -> Denoiser:
    """The shipped teacher, frozen and marked external. Raises BadFileError if its files are damaged."""
    from .files import open_teacher

    return open_teacher(zoo_folder(name))


def zoo_card(name: str) -> dict[str, Any]:
    """The card of a shipped network: where it came from, what it cost, its checksum and its own scores."""
    from .cards import read_card

    return read_card(zoo_folder(name))
