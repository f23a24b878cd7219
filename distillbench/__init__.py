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


def run(method: Any, *, track: str, budget: str = "S", seed: int = 0, steps: Sequence[int] | None = None,
        settings: Mapping[str, Any] | None = None, store: str | Path | None = None, resume: bool = True,
        show: bool = False, log: str | None = None, teacher: str | Path | None = None,
        data: str | Path | None = None, device: str = "cpu") -> RunRecord:  # fmt: skip
    """Train `method` on `track` within `budget`, score it, and return its record; a run that is in the store is not run again.

    method: an id, `path.py`, `path.py:Class` or a class.  steps: None means 1, 2 and 4, of those that the method is made for.
    settings: knobs by name.  show: progress on stderr.
    log: "tensorboard" for event files.  teacher, data: paths, for a track that ships none.  device: "cpu", "cuda" or "cuda:1".
    A method that trains a student per step count is trained once for each of `steps`; the record then shows them together.
    Raises `UsageError` for wrong input; a method that fails gives a record whose status says why.
    """
    from .execution import run_here

    return run_here(method, track=track, budget=budget, seed=seed, steps=steps, settings=settings, store=store, resume=resume,
                    show=show, log=log, teacher=teacher, data=data, device=device)  # fmt: skip
