"""What a command says when it ends, well or not: which records it wrote, where all is, and how to see it. On stderr. No torch here."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import DistillbenchError, UsageError
from .jobs import Job, resolve
from .logs import logs_folder
from .records import RunRecord
from .store import Store, store_folder


@contextmanager
def told(store: Store, jobs: Sequence[Job], log: str | None = None, *, board_shown: bool = False) -> Iterator[None]:
    """Around the running of `jobs`: says where things are after success, failure and Ctrl-C; not after wrong input, which wrote nothing.

    board_shown: the command prints the board itself when it succeeds.
    """
    ids = [resolve(job).record.id for job in jobs]
    before = {run_id: store.get(run_id) for run_id in ids}

    def tell(stopped: bool, board: bool) -> None:
        after = {run_id: store.get(run_id) for run_id in ids}
        written = [record for run_id, record in after.items() if record is not None and record != before[run_id]]
        left = [run_id for run_id, record in after.items() if record is None or not record.ok] if stopped else None
        track = jobs[0].track.partition("@")[0] if board and (written or stopped) else None
        for line in lines(store, written, left, log, track):
            print(line, file=sys.stderr)

    try:
        yield
    except UsageError:
        raise
    except (KeyboardInterrupt, DistillbenchError):  # the loop's Interrupted too
        tell(stopped=True, board=True)
        raise
    except SystemExit:
        tell(stopped=False, board=not board_shown)
        raise
    tell(stopped=False, board=not board_shown)


def lines(store: Store, written: Sequence[RunRecord], left: Sequence[str] | None, log: str | None, track: str | None) -> list[str]:
    """The lines. left: ids of the runs that a stopped command leaves undone, else None; track: whose board to name."""
    said = []
    option = store_option(store)
    if written:
        kinds = Counter(record.status.partition(":")[0] for record in written)
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        last = next((record for record in reversed(written) if record.kind == "run"), written[-1])
        said.append(f"{_counted(len(written), 'record')} written to {store.folder / 'records'} ({counts})")
        said.append(f"{'The last one' if len(written) > 1 else 'It'} in full: distillbench show {last.id[:8]}{option}")
        if any(record.ok and record.kind == "run" for record in written):
            said.append(f"Students with samples and loss curves: {store.folder / 'students'}")
        if kinds["failed"]:
            said.append("The same command tries again what failed; with DISTILLBENCH_DEBUG=1 it prints the traceback.")
    if left is not None:
        kept = sum((store.run_folder(run_id) / "checkpoint.safetensors").exists() for run_id in left)
        said += [] if written else ["No record was written."]
        said.append(f"{_counted(len(left), 'job')} left to do, {kept} of them with a checkpoint in {store.folder / 'runs'}")
    if log is not None:
        said.append(f"Event files: {logs_folder(store)}; to see them: {log} --logdir {shlex.quote(str(logs_folder(store)))}")
    if track is not None:
        said.append(f"The board: distillbench board {track}{option}")
    return said


def store_option(store: Store) -> str:
    """What a command needs to look into this store: ` --store DIR`, or nothing where it is the one it looks into anyway."""
    return "" if store.folder == store_folder() else f" --store {shlex.quote(str(store.folder))}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
