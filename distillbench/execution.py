"""`distillbench.run`: the trainings of one method and seed, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .bench import ensure_writable, name_of
from .discovery import find
from .display import Display
from .errors import UsageError
from .jobs import Job, merged, resolve, split
from .records import RunRecord
from .store import Store


def run_here(method: Any, *, track: str, budget: str, seed: int, steps: Sequence[int], settings: Mapping[str, Any] | None,
             store: str | Path | None, resume: bool, show: bool) -> RunRecord:  # fmt: skip
    """See `distillbench.run`."""
    from .runner import execute
    from .training.checkpoint import set_aside

    target = method if isinstance(method, str) else _as_target(method)
    possible = find(target).info.steps
    if not steps or any(n not in possible for n in steps):
        raise UsageError(f"{target} is made for {', '.join(map(str, possible))} steps, not {', '.join(map(str, steps)) or 'none'}")
    told = {name: _as_text(value) for name, value in (settings or {}).items()}
    jobs = [Job(target, track, budget, seed, part, told) for part in split(target, steps)]
    held = Store(store)
    ensure_writable(held)
    records = []
    with Display([name_of(job) for job in jobs]) if show else _Silent() as display:
        for number, job in enumerate(jobs):
            checkpoint = held.run_folder(resolve(job).record.id) / "checkpoint.safetensors"
            if not resume and checkpoint.exists():
                set_aside(checkpoint)
            records.append(execute(job, held, partial(display.update, number)))
            display.update(number, 1.0, records[-1].status)
    return merged(records)


def _as_target(method: Any) -> str:
    found = find(method)
    return found.info.id if found.module else f"{found.path}:{found.class_name}"


def _as_text(value: Any) -> str:
    """A knob's value as `--set` would give it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, number: int, fraction: float, what: str) -> None: ...
