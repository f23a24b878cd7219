"""Published records: read-only, shipped with the package, shown only when asked for."""

from __future__ import annotations

from pathlib import Path

from .store import Store
from .tracks.facts import FACTS, facts_of

_HERE = Path(__file__).parent


def published_folder(track: str) -> Path:
    """The folder of a track's published records: inside an installed package, or `leaderboards/` of a checkout."""
    facts = facts_of(track)
    folder = facts.home
    installed = _HERE / "published" / folder
    return installed if installed.is_dir() else _HERE.parent / "leaderboards" / folder


def published_store(track: str) -> Store:
    return Store(published_folder(track), read_only=True)


def published_evidence() -> list[Store]:
    """What published claims stand on: the boards' records, and beside them the ablations, which no board shows."""
    return [Store(folder, read_only=True) for name in FACTS for folder in (published_folder(name), published_folder(name) / "claims")]
