"""Worker processes that take jobs one after the other. A worker that dies costs its job, never the plan."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .errors import DistillbenchError, UsageError
from .jobs import Job, resolve
from .records import RunRecord
from .store import Store

Event = Callable[[int, float, str], None]  # job number, fraction done, what is going on
PATIENCE = 20.0  # seconds that workers get to save their state after Ctrl-C
SILENCE = 1200.0  # seconds without a word after which a worker counts as hung (a turn's own limit is shorter)


@dataclass
class _Worker:
    process: Any
    link: Connection
    job: int | None = None
    heard: float = 0.0


def run_jobs(jobs: list[Job], store: Store, workers: int, event: Event, log: str | None = None) -> dict[int, RunRecord]:
    """Run all jobs; job number -> record. `event` hears of a job first with fraction 0 when it is given out.

    Raises KeyboardInterrupt after the workers have saved their state. log: one of `logs.LOGS`.
    """
    done: dict[int, RunRecord] = {}
    waiting = list(range(len(jobs)))
    crew = [_start(store.folder, log) for _ in range(min(workers, len(jobs)))]
    try:
        for worker in crew:
            _give(worker, waiting, jobs, event)
        while any(worker.job is not None for worker in crew):
            ready = wait([worker.link for worker in crew if worker.job is not None], timeout=1.0)
            for place, worker in enumerate(crew):
                if worker.job is not None and time.monotonic() - worker.heard > SILENCE:
                    worker.process.kill()  # its link closes, and _listen records why
                if worker.link in ready and not _listen(worker, jobs, store, done, event) and waiting:
                    crew[place] = worker = _start(store.folder, log)
                if worker.job is None and waiting:
                    _give(worker, waiting, jobs, event)
    except KeyboardInterrupt:
        _let_finish(crew)
        raise
    finally:
        for worker in crew:
            worker.link.close()
            worker.process.join(timeout=2.0)
            if worker.process.is_alive():
                worker.process.terminate()
    return done


def _start(folder: Path, log: str | None) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    process = context.Process(target=_work, args=(there, str(folder), log), daemon=True)
    # Ctrl-C reaches every process of the terminal. The worker is born with it blocked and is told to stop by SIGTERM, once: the loop takes
    # a second signal as "at once, without saving".
    resource_tracker.ensure_running()  # start() does this otherwise, and it ends by unblocking
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    there.close()
    return _Worker(process, here)


def _give(worker: _Worker, waiting: list[int], jobs: list[Job], event: Event) -> None:
    if waiting:
        worker.job = waiting.pop(0)
        worker.heard = time.monotonic()
        with suppress(OSError):  # a worker that died since its last word: its link is at its end, and _listen records why
            worker.link.send(jobs[worker.job])
        event(worker.job, 0.0, "starting")


def _listen(worker: _Worker, jobs: list[Job], store: Store, done: dict[int, RunRecord], event: Event) -> bool:
    """Take one message; False if the worker is gone."""
    assert worker.job is not None
    try:
        kind, *rest = worker.link.recv()
    except (EOFError, ConnectionError):
        worker.process.join(timeout=5.0)
        code = worker.process.exitcode
        why = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        record = dataclasses.replace(resolve(jobs[worker.job]).record, status=f"failed: the worker process died ({why}{hint})")
        store.add(record)
        done[worker.job] = record
        event(worker.job, 1.0, record.status)
        worker.job = None
        return False
    worker.heard = time.monotonic()
    if kind == "progress":
        event(worker.job, *rest)
        return True
    if kind == "stopped":
        raise KeyboardInterrupt
    if kind == "error":
        raise DistillbenchError(rest[0])
    stored = store.get(rest[0])
    assert stored is not None
    done[worker.job] = stored
    event(worker.job, 1.0, stored.status)
    worker.job = None
    return True


def _let_finish(crew: list[_Worker]) -> None:
    """Tell the workers to stop, and wait until their state is on disk."""
    end = time.monotonic() + PATIENCE
    for worker in crew:
        if worker.process.is_alive():
            worker.process.terminate()
    for worker in crew:
        worker.process.join(timeout=max(0.1, end - time.monotonic()))


def _work(link: Connection, folder: str, log: str | None) -> None:
    """The worker's life: a job, its progress, its record's id; again."""
    from .training.loop import Interrupted

    store = Store(folder)
    last = 0.0

    def report(fraction: float, what: str) -> None:
        nonlocal last
        if time.monotonic() - last > 0.25:
            last = time.monotonic()
            try:
                link.send(("progress", fraction, what))
            except OSError:  # the parent is dead: stop as if it had asked for it
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        while True:
            link.send(("done", _record_of(link.recv(), store, report, log).id))
    except (EOFError, BrokenPipeError):
        return
    except (Interrupted, KeyboardInterrupt):
        _send(link, ("stopped",))
    except DistillbenchError as error:
        _send(link, ("error", str(error)))


def _record_of(job: Job, store: Store, report: Callable[[float, str], None], log: str | None) -> RunRecord:
    """In a plan, a knob that only `build` can judge costs its job alone."""
    from .runner import execute

    resolved = resolve(job)
    try:
        return execute(job, store, report, log)
    except UsageError as error:
        record = dataclasses.replace(resolved.record, status=f"failed: {error}").scrubbed()
        store.add(record)  # raises where the store cannot be written
        return record


def _send(link: Connection, message: tuple) -> None:
    with suppress(OSError):  # the parent has gone; the state is on disk
        link.send(message)
