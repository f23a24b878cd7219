"""`distillbench.run`: the trainings of one method and seed, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .bench import ensure_writable, kind_of, name_of
from .config import as_text
from .discovery import find, target_of
from .display import Display
from .errors import UsageError
from .jobs import STEPS, Job, merged, resolve, split
from .logs import check_log, log_known
from .records import RunRecord
from .store import Store


def run_here(method: Any, *, track: str, budget: str, seed: int, steps: Sequence[int] | None, settings: Mapping[str, Any] | None,
             store: str | Path | None, resume: bool, show: bool, log: str | None = None,
             teacher: str | Path | None = None, data: str | Path | None = None, device: str = "cpu") -> RunRecord:  # fmt: skip
    """See `distillbench.run`."""
    jobs = jobs_here(method, track=track, budget=budget, seed=seed, steps=steps, settings=settings, teacher=teacher, data=data,
                     device=device)  # fmt: skip
    return merged(run_jobs_here(jobs, Store(store), resume=resume, show=show, log=log))


def jobs_here(method: Any, *, track: str, budget: str, seed: int, steps: Sequence[int] | None,
              settings: Mapping[str, Any] | None, teacher: str | Path | None = None,
              data: str | Path | None = None, device: str = "cpu") -> list[Job]:  # fmt: skip
    """The trainings that one method needs for these step counts; everything that can be looked up is checked."""
    target = target_of(method)
    possible = find(target).info.steps
    if steps is None:
        steps = [n for n in STEPS if n in possible] or possible[:1]
    if not steps or any(n not in possible for n in steps):
        raise UsageError(f"{target} is made for {', '.join(map(str, possible))} steps, not {', '.join(map(str, steps)) or 'none'}")
    told = {name: as_text(value) for name, value in (settings or {}).items()}
    own, real = (None if path is None else str(path) for path in (teacher, data))
    jobs = [Job(target, track, budget, seed, part, told, device=device, teacher=own, data=real) for part in split(target, steps)]
    for job in jobs:
        resolve(job)
    return jobs


def run_jobs_here(jobs: Sequence[Job], store: Store, *, resume: bool, show: bool, log: str | None = None) -> list[RunRecord]:
    """Their records. Not resumed, a checkpoint is set aside and the training starts afresh; one that is in the store is not run again."""
    from .runner import execute
    from .training.checkpoint import set_aside

    check_log(log)
    ensure_writable(store)
    records = []
    with Display([name_of(job) for job in jobs], kinds=[kind_of(job) for job in jobs]) if show else _Silent() as display:
        for number, job in enumerate(jobs):
            display.update(number, 0.0, "starting")
            checkpoint = store.run_folder(resolve(job).record.id) / "checkpoint.safetensors"
            if not resume and checkpoint.exists():
                set_aside(checkpoint)
            records.append(execute(job, store, partial(display.update, number), log))
            display.update(number, 1.0, records[-1].status)
    log_known(log, store, records)
    return records


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None: ...

    def update(self, number: int, fraction: float, what: str) -> None: ...
