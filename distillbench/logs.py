"""Event files for TensorBoard, on request (`--log tensorboard`). They take nothing from a run and add nothing to its record. No torch here.

STORE/logs/<run id>/<label, budget, steps, seed>/events.out.tfevents.*     one file a run; x is teacher passes

loss/<turn>/<term>      the points of the loss curves that the run keeps anyway
progress, spent/...     fraction of the budget, seconds, processor seconds, updates, cycles, images at these points
score/<name>/<n>-step   what the finished student scored

A resumed run writes its file anew: the losses that its checkpoint knows, what else was written before it, and then goes on. So no step is
there twice, and a board that is open follows, because the new file begins with the mark that makes it forget the old one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UsageError, unknown
from .records import RunRecord
from .store import Store

LOGS = ("tensorboard",)
SPENT = ("seconds", "processor_seconds", "updates", "cycles", "images")
Point = tuple[int, str, float]  # x, tag, value


def check_log(log: str | None) -> None:
    """Raises `UsageError` for a log that is not known or whose package is not installed."""
    if log is None:
        return
    if log not in LOGS:
        raise unknown("log", log, LOGS)
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--log tensorboard needs a package that is not installed: pip install distillbench[tensorboard]")


def logs_folder(store: Store, run_id: str = "") -> Path:
    """Where the event files are: of all runs, or of one."""
    return store.folder / "logs" / run_id


def name_in_log(record: RunRecord) -> str:
    """What a board calls a run: `cd(lr=0.01)_S_1,2,4-step_seed_0`."""
    budget = record.budget or {"name": "no budget"}
    words = f"{record.label} {budget['name']} {','.join(map(str, record.steps))}-step seed {record.seed}"
    return re.sub(r"[^\w.,()=@+-]", "_", words)[-150:]


class EventLog:
    """The event file of one training; with log None it does nothing. A log that cannot be written is given up, and the run goes on."""

    def __init__(self, log: str | None, store: Store, record: RunRecord):
        self.folder = None if log is None else logs_folder(store, record.id) / name_in_log(record)
        self._file: _EventFile | None = None
        self._losses = 0  # that many points are written
        self._at = -1  # x of the last of the other points

    def training(self, fraction: float, spent: Mapping[str, float], losses: Sequence[Mapping[str, Any]]) -> None:
        """Where a training stands; called as often as one likes, writes when there are losses that are not written yet, and at the end.

        spent: passes and those of `SPENT`.  losses: points of all turns, from the beginning of the training.
        """
        if self.folder is None or (self._losses == len(losses) and fraction < 1.0):
            return
        now = round(spent["passes"])
        points = _loss_points(losses[self._losses :])
        if now > self._at:
            points += [(now, "progress", fraction), *((now, f"spent/{name}", spent[name]) for name in SPENT if name in spent)]
        self._losses, self._at = len(losses), now
        self._write(points, now)

    def finished(self, record: RunRecord) -> None:
        """The scores, after the last call of `training`."""
        self._write(_score_points(record), round(record.spent["passes"]))

    def close(self) -> None:
        """Nothing is written after this."""
        if self._file is not None:
            self._file.close()
        self.folder = self._file = None

    def _write(self, points: list[Point], now: int) -> None:
        if self.folder is None:
            return
        try:
            if self._file is None:
                self._file = _EventFile(self.folder, now)
            self._file.write(points)
        except OSError:
            self.folder = None


def log_known(log: str | None, store: Store, records: Iterable[RunRecord]) -> None:
    """Event files of trainings that were in the store before, made from what it keeps of them; those that have one are left alone."""
    for record in records if log is not None else ():
        if not record.ok or record.kind != "run" or any(logs_folder(store, record.id).glob("*/events*")):
            continue
        losses = []
        with suppress(OSError, ValueError):  # a student's folder may be gone, the record is not
            losses = json.loads((store.student_folder(record.id) / "losses.json").read_text())
        events = EventLog(log, store, record)
        events.training(1.0, record.spent, losses)
        events.finished(record)
        events.close()


def _loss_points(losses: Sequence[Mapping[str, Any]]) -> list[Point]:
    return [(round(point["passes"]), f"loss/{_tag(point['turn'])}/{_tag(term)}", float(value))
            for point in losses for term, value in point.items() if term not in ("passes", "turn")]  # fmt: skip


def _score_points(record: RunRecord) -> list[Point]:
    now = round(record.spent["passes"])
    return [(now, f"score/{_tag(score['name'])}/{steps}-step", score["value"])
            for steps, scores in record.scores.items() for score in scores if score["value"] is not None]  # fmt: skip


def _tag(word: str) -> str:
    return re.sub(r"[\s/]+", "_", word)


class _EventFile:
    """One file of length-framed events. tensorboard's own writer would put the host's name in the file's, and write late from a thread."""

    def __init__(self, folder: Path, now: int):
        """Takes over from earlier files of the folder what is neither a loss nor as late as x = `now`, and removes them."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(folder.glob("events.out.tfevents.*"))
        held = {(event.step, event.summary.value[0].tag): event for path in earlier for event in _scalars(path)}
        kept = [event for (x, tag), event in held.items() if x < now and not tag.startswith("loss/")]
        self._file = open(folder / f"events.out.tfevents.{time.time_ns():020d}", "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        start = Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START))
        for event in (Event(wall_time=time.time(), file_version="brain.Event:2"), start, *kept):
            self._records.write(event.SerializeToString())
        self._records.flush()
        for path in earlier:
            os.remove(path)

    def close(self) -> None:
        self._file.close()

    def write(self, points: Iterable[Point]) -> None:
        """Append; on disk at once, so that a killed run loses nothing."""
        for x, tag, value in points:
            event = self._event(wall_time=time.time(), step=x)
            event.summary.value.add(tag=tag, simple_value=value)
            self._records.write(event.SerializeToString())
        self._records.flush()


def _scalars(path: Path) -> list[Any]:
    """The events of a file that carry a number; of a file that ends in mid-event, those before."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    events = [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
    return [event for event in events if event.summary.value]
