"""The tracks by name; a track's module, and with it torch, is imported when it is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from .facts import FACTS, facts_of

if TYPE_CHECKING:
    from .base import Track

TRACKS: tuple[str, ...] = tuple(FACTS)
_CLASSES = {
    "mixture2d": ("mixture2d", "Mixture2D"),
    "digits": ("digits", "Digits"),
    "mixture2d-validation": ("validation", "Mixture2DValidation"),
    "digits-validation": ("validation", "DigitsValidation"),
}


def get_track(track: str) -> Track:
    """The track of a name or name@version, one object a process. Raises UsageError with the nearest names."""
    return _made(facts_of(track).name)


@cache
def _made(name: str) -> Track:
    module, class_name = _CLASSES[name]
    return getattr(import_module(f".{module}", __package__), class_name)()
