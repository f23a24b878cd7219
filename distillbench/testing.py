"""For the tests of methods kept elsewhere: `assert_no_regression` in pytest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .discovery import target_of
from .gate import UNDECIDED, WORSE, Gate, gate
from .store import Store


def assert_no_regression(target: Any, against: str | None = None, *, track: str = "mixture2d", budget: str = "S", seeds: int = 5,
                         margin: str = "5%", store: str | Path | None = None, workers: int = 2,
                         allow_undecided: bool = False) -> Gate:  # fmt: skip
    """Train both on the same seeds and raise `AssertionError`, with the reasons, if target is worse by more than the margin, or undecided.

    target: an id, `path.py`, `path.py:Class` or a class.  Other arguments as of `distillbench gate`. Returns the outcome.
    Runs that the store holds are not run again, so a test that keeps its store (or caches it in CI) is fast the second time.
    """
    outcome = gate(target_of(target), against, track=track, budget=budget, seeds=seeds, margin=margin, store=Store(store), workers=workers)
    bad = (WORSE,) if allow_undecided else (WORSE, UNDECIDED)
    if outcome.status in bad:
        raise AssertionError(outcome.reasons)
    return outcome
