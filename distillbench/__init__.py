"""distillbench: a benchmark suite for diffusion distillation.

record = distillbench.run("cd", track="mixture2d", budget="S")
record.scores["1"]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .records import RunRecord

__version__ = "0.1.0"
__all__ = ["__version__", "run"]


def run(method: Any, *, track: str, budget: str = "S", seed: int = 0, steps: Sequence[int] = (1, 2, 4),
        settings: Mapping[str, Any] | None = None, store: str | Path | None = None, resume: bool = True,
        show: bool = False, log: str | None = None) -> RunRecord:  # fmt: skip
    """Train `method` on `track` within `budget`, score it, and return its record; a run that is in the store is not run again.

    method: an id, `path.py`, `path.py:Class` or a class.  settings: knobs by name.  show: progress on stderr.
    log: "tensorboard" for event files.
    A method that trains a student per step count is trained once for each of `steps`; the record then shows them together.
    Raises `UsageError` for wrong input; a method that fails gives a record whose status says why.
    """
    from .execution import run_here

    return run_here(method, track=track, budget=budget, seed=seed, steps=steps, settings=settings, store=store, resume=resume,
                    show=show, log=log)  # fmt: skip
