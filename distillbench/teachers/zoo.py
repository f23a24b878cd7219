"""The networks that are shipped, by name: where they lie and how `distillbench zoo train NAME` makes them again. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, unknown

if TYPE_CHECKING:
    from ..diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class ZooEntry:
    """One shipped network. cost: what training it takes, in words.  module: the file beside this one.  function: what trains it there."""

    name: str
    title: str
    cost: str
    module: str
    function: str = "train"
    needs_data: str = ""  # the command that gets data which are not shipped

    @property
    def folder(self) -> Path:
        return Path(__file__).parent / "weights" / self.name

    def train(self, folder: Path, progress: Callable[[str], None], **options: Any) -> dict[str, Any]:
        """Train it, write its files into `folder` and return its card. Options: steps, seed."""
        return getattr(import_module(f".{self.module}", __package__), self.function)(folder, progress, **options)

    def on(self, data: str | None) -> dict[str, Path]:
        """The option `data` of `train`; raises UsageError where it is missing or not taken."""
        if bool(self.needs_data) != (data is not None):
            why = f"needs --data PATH: {self.needs_data}" if self.needs_data else "is trained on what is shipped: leave --data out"
            raise UsageError(f"{self.name} {why}")
        return {} if data is None else {"data": Path(data)}


ENTRIES = (
    ZooEntry("mixture2d", "MLP fitted to the exact velocity of the 2-D mixture", "about 2 minutes on one core", "mixture2d"),
    ZooEntry("digits", "flow transformer on 4,000 handwritten digits", "at most 30 minutes on two cores", "digits"),
    ZooEntry("shapes-sd", "captioned scenes in Stable Diffusion's format", "about 95 minutes on one core", "shapes_pipelines", "train_sd"),
    ZooEntry("shapes-sana", "captioned scenes in SANA's format", "about 95 minutes on one core", "shapes_pipelines", "train_sana"),
    ZooEntry("digits-classifier", "classifier whose features score digits", "a few minutes on one core", "digits_classifier"),
    ZooEntry("clip-shapes", "small CLIP on the pictures and captions of shapes", "at most 6 minutes on one core", "clip_shapes"),
    ZooEntry(
        "emoji", "emoji at 64x64 in Stable Diffusion's format", "about 90 minutes on one core", "emoji",
        needs_data="npm pack emoji-datasource-google@16.0.0",
    ),
)  # fmt: skip
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
