"""The store: a folder of records, a file each, written atomically, safe for many processes. No torch here.

    records/<id>.json   latency/<id>.json   runs/<id>/ (checkpoints)   students/<id>/   set-aside/ (files that are not trusted)

Nothing is ever deleted and an `ok` record is never overwritten:
- a record whose id is new is added; a `failed` or `skipped` one is replaced by any later attempt at the same id;
- a second `ok` record with the same result (scores, status, checksums) is dropped, since only its seconds can differ;
- a second `ok` record with another result contradicts the first: the first stays, the second goes to set-aside/ and is named;
- a `failed` attempt after an `ok` one is dropped.
A file that is truncated, foreign or hostile is named in `problems` and moved to set-aside/; a read-only store only names it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import BadFileError, UsageError
from .records import LatencyRecord, RunRecord, digest

DEFAULT_FOLDER = ".distillbench"
VARIABLE = "DISTILLBENCH_STORE"
LARGEST = 4 << 20  # bytes of a record file; ours take a few thousand

Record = RunRecord | LatencyRecord


def store_folder(option: str | Path | None = None) -> Path:
    """Where the store is: the option, else $DISTILLBENCH_STORE, else `.distillbench` here."""
    return Path(option or os.environ.get(VARIABLE) or DEFAULT_FOLDER)


class Store:
    """Records under one folder. A folder that does not exist yet is an empty store and is made by the first `add`."""

    def __init__(self, folder: str | Path | None = None, read_only: bool = False):
        self.folder = store_folder(folder)
        self.read_only = read_only
        self.problems: list[str] = []  # one line each: which file was not trusted, why, and where it is now
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"the store {self.folder} is a file; name a folder with --store or {VARIABLE}")

    def run_folder(self, run_id: str) -> Path:
        """Checkpoints and shards of a run. Not made here."""
        return self._inside("runs", run_id)

    def student_folder(self, run_id: str) -> Path:
        """The saved student of a run. Not made here."""
        return self._inside("students", run_id)

    def _inside(self, kind: str, run_id: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{16}", run_id):
            raise UsageError(f"{run_id!r} is not a run's id (16 hex digits); `distillbench board` and `list` show them")
        return self.folder / kind / run_id

    def records(self, track: str | None = None) -> list[RunRecord]:
        """All runs and references (of one track@version), oldest first."""
        found = [record for record in self._read_all("records", RunRecord) if track in (None, record.track)]
        return sorted(found, key=lambda record: (record.created, record.id))

    def latencies(self, track: str | None = None) -> list[LatencyRecord]:
        """All latency measurements (of one track@version), oldest first."""
        found = [record for record in self._read_all("latency", LatencyRecord) if track in (None, record.track)]
        return sorted(found, key=lambda record: (record.created, record.id))

    def get(self, run_id: str) -> RunRecord | None:
        """The record with this id, or None if there is none that can be trusted."""
        path = self._inside("records", run_id).with_suffix(".json")
        return self._read(path, RunRecord) if os.path.lexists(path) else None

    def find(self, prefix: str) -> RunRecord:
        """The one record whose id begins so; raises `UsageError` if there is none or several."""
        hits = [record for record in self.records() if prefix and record.id.startswith(prefix)]
        if len(hits) != 1:
            several = ", ".join(record.id for record in hits[:4])
            raise UsageError(f"{prefix!r} begins {len(hits)} ids: {several}" if hits else f"no run {prefix!r} in {self.folder}")
        return hits[0]

    def add(self, record: Record) -> str:
        """Keep a record; returns "added", "replaced" (an attempt that was not ok), "dropped" (known already) or "set aside"."""
        if self.read_only:
            raise UsageError(f"{self.folder} holds published records and is read-only; name another store with --store")
        record = record.scrubbed()
        type(record).from_json(record.to_json(), f"the new record {record.id}")  # what would be set aside later is refused now
        path = self.folder / ("records" if isinstance(record, RunRecord) else "latency") / f"{record.id}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                return self._place(path, record)
        except OSError as error:
            raise UsageError(f"cannot write to the store {self.folder}: {error.strerror or error}") from error

    def _place(self, path: Path, record: Record) -> str:
        known = self._read(path, type(record)) if os.path.lexists(path) else None
        if known is None or not isinstance(record, RunRecord) or not isinstance(known, RunRecord):
            write_atomically(path, record.to_json())
            return "added"
        if not known.ok:
            write_atomically(path, record.to_json())
            return "replaced"
        if not record.ok or _result(known) == _result(record):
            return "dropped"
        aside = self.folder / "set-aside" / f"{record.id}-{digest(record.to_json())[:8]}.json"
        aside.parent.mkdir(exist_ok=True)
        write_atomically(aside, record.to_json())
        self.problems.append(f"a second result for run {record.id} differs from the first; the first stays, the second is {aside}")
        return "set aside"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time decides which of two records of one id stays. The lock ends with its process."""
        with open(self.folder / ".lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read_all(self, kind: str, record_type: type[Any]) -> list[Any]:
        folder = self.folder / kind
        if not folder.is_dir():
            return []
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # dot files are writes under way
        read = (self._read(folder / name, record_type) for name in names)
        return [record for record in read if record is not None]

    def _read(self, path: Path, record_type: type[Any]) -> Any:
        try:
            return read_record(path, record_type)
        except FileNotFoundError:  # another process has just set it aside
            return None
        except (BadFileError, OSError) as error:
            self._set_aside(path, str(error) if isinstance(error, BadFileError) else f"{path}: {error.strerror}")
            return None

    def _set_aside(self, path: Path, why: str) -> None:
        if self.read_only:
            self.problems.append(f"{why}; not trusted, left where it is")
            return
        folder = self.folder / "set-aside"
        try:
            folder.mkdir(exist_ok=True)
            target = folder / path.name
            if os.path.lexists(target):
                target = folder / f"{path.stem}-{secrets.token_hex(4)}{path.suffix}"
            os.rename(path, target)
        except FileNotFoundError:
            return
        except OSError as error:
            self.problems.append(f"{why}; not trusted, could not be moved to {folder} ({error.strerror})")
            return
        self.problems.append(f"{why}; set aside as {target}")


def _result(record: RunRecord) -> Any:
    """What two runs of one id must agree on: neither time nor machine is in it."""
    return {"scores": record.scores, "evaluations": record.evaluations, "checksums": record.checksums}


def write_atomically(path: Path, data: object) -> None:
    """JSON in full or not at all, also when the machine stops: a temporary file beside it, flushed to disk, then renamed."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, not only the content, survives a power cut
    finally:
        os.close(folder)


def read_json(path: Path) -> Any:
    """The JSON of a plain file of bounded size; raises `BadFileError`, trusting nothing."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise BadFileError(f"{path}: not a plain file")
    if status.st_size > LARGEST:
        raise BadFileError(f"{path}: {status.st_size} bytes, too large for a record")
    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, NaN, twice the same key, a tower of brackets
        raise BadFileError(f"{path}: truncated or not JSON ({str(error)[:80]})") from error


def read_record(path: Path, record_type: type[Any]) -> Any:
    """A `RunRecord` or `LatencyRecord` from a plain file named by its id; raises `BadFileError`, trusting nothing."""
    data = read_json(path)
    try:
        record = record_type.from_json(data, str(path))
    except (RecursionError, ValueError, TypeError, OverflowError) as error:  # 1e999, half a surrogate pair, text that is too deep
        raise BadFileError(f"{path}: not a record ({str(error)[:80]})") from error
    if path.name != f"{record.id}.json":
        raise BadFileError(f"{path}: holds record {record.id}, which is not its name")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("an object with one key twice")
    return data
