"""The tracks by name; a track's module, and with it torch, is imported when it is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from .facts import FACTS, facts_of

if TYPE_CHECKING:
    from .base import Track

TRACKS: tuple[str, ...] = tuple(FACTS)
_CLASSES = {"mixture2d": "Mixture2D", "digits": "Digits"}  # in the module of the track's name


def get_track(track: str) -> Track:
    """The track of a name or name@version, one object a process. Raises UsageError with the nearest names."""
    return _made(facts_of(track).name)


@cache
def _made(name: str) -> Track:
    return getattr(import_module(f".{name}", __package__), _CLASSES[name])()
