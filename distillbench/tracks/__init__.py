"""The tracks by name; a track's module, and with it torch, is imported when it is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import UsageError
from .facts import EXTERNAL, FACTS, facts_of

if TYPE_CHECKING:
    from .base import Track

TRACKS: tuple[str, ...] = tuple(FACTS)
_CLASSES = {
    "mixture2d": ("mixture2d", "Mixture2D"),
    "digits": ("digits", "Digits"),
    "mixture2d-validation": ("validation", "Mixture2DValidation"),
    "digits-validation": ("validation", "DigitsValidation"),
}
_BY_NAME = {"shapes": ("shapes", "shapes_track")}  # of a name's first word: the function that makes the track of that name


def get_track(track: str, teacher: str | None = None, data: str | None = None) -> Track:
    """The track of a name or name@version, one object a process. Raises UsageError with the nearest names.

    teacher, data: paths, for a track of `EXTERNAL` alone; what lacks one says so when it is needed.
    """
    name = facts_of(track).name
    if name not in EXTERNAL and (teacher or data):
        raise UsageError(f"{name} ships its teacher and data: leave --teacher and --data out (they are for {', '.join(EXTERNAL)})")
    return _made(name, teacher, data)


@cache
def _made(name: str, teacher: str | None, data: str | None) -> Track:
    if name in EXTERNAL:
        return _given(name, teacher, data)
    if name in _CLASSES:
        module, class_name = _CLASSES[name]
        return getattr(import_module(f".{module}", __package__), class_name)()
    module, maker = _BY_NAME[name.partition("-")[0]]
    return getattr(import_module(f".{module}", __package__), maker)(name)


def _given(name: str, teacher: str | None, data: str | None) -> Track:
    """A track of the user's own files: `emoji`, or the protocol that the module of its name defines."""
    if name == "emoji":
        from .emoji import Emoji

        return Emoji(EXTERNAL[name], teacher, data)
    from .published import PublishedTrack

    definition = import_module(f".{name.replace('-', '_')}", __package__).DEFINITION
    return PublishedTrack(EXTERNAL[name], definition, teacher, data)
