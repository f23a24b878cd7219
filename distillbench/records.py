"""What a run or a latency measurement leaves behind: plain data, one JSON object each. No torch here.

A run's id is the hash of what should determine its result (`run_id`), so that a plan knows what is missing and two
machines agree on what they mean. Whatever else is of interest (environment, provenance, time) rides along outside the id.
`from_json` trusts nothing: types, required and unknown fields, the id itself and private strings are checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__
from .errors import BadFileError
from .record_checks import FILE_CHECKS, RUN_CHECKS, check_fields, check_latency, check_private, check_run, scrub, scrub_words

RULES = 1  # of running and scoring; a change that moves results without a track's or method's version raises it
NOISY = 1.3  # a latency whose p90 is more than this many medians is flagged


def plain(value: Any) -> Any:
    """The same as JSON types: tuples become lists, keys strings, and a non-finite number its name, since JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers_alike(value: Any) -> Any:
    """4e6 and 4000000 are one number and get one hash."""
    if isinstance(value, dict):
        return {key: _numbers_alike(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers_alike(inner) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of plain data: sorted keys, no spaces, numbers by value."""
    text = json.dumps(_numbers_alike(plain(value)), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def run_id(
    *,
    track: str,
    method: str,
    method_version: int,
    source_sha256: str | None,
    config: Mapping[str, Any],
    budget: Mapping[str, Any] | None,
    seed: int,
    threads: int,
    dtype: str,
    device_class: str,
    trained_for: Sequence[int],
    steps: Sequence[int],
    kind: str = "run",
    rules: int = RULES,
    files: Mapping[str, str] | None = None,
) -> str:
    """16 hex digits from what should determine a result. A budget counts by unit and amount, whatever it is called."""
    amount = None if budget is None else [budget["unit"], float(budget["amount"])]
    determinants = {
        "kind": kind, "track": track, "method": method, "version": method_version, "source": source_sha256, "rules": rules,
        "config": scrub(plain(config)), "budget": amount, "seed": seed, "threads": threads, "dtype": dtype,
        "device_class": device_class, "trained_for": list(trained_for), "steps": list(steps),
    } | ({"files": dict(files)} if files else {})  # fmt: skip
    return digest(determinants)[:16]


def now() -> str:
    """The time in UTC, to the second, as records carry it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def environment() -> dict[str, Any]:
    """What surrounds a run, without user, host or path. Asks the packages' metadata, so that torch is not imported."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(), "torch": installed("torch"), "numpy": installed("numpy"), "distillbench": __version__,
        "platform": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(), "processor": _processor(),
    }  # fmt: skip


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The kind of processor, on which the last digits depend: its name, family and model; None elsewhere than on Linux."""
    try:
        lines = (line.partition(":") for line in cpuinfo.read_text().partition("\n\n")[0].splitlines())
    except OSError:
        return None
    found = {name.strip(): value.strip() for name, _, value in lines}
    told = [found["model name"]] if "model name" in found else []
    return " ".join(told + [f"{name} {found[name]}" for name in ("cpu family", "model", "stepping") if name in found]) or None


@dataclass(frozen=True)
class RunRecord:
    """One run, or with kind "reference" one row of the teacher or of truth, or with kind "released" what others trained, scored here.

    label: what a board prints: the method's id and its changed knobs, `dmd2(gan=false)`.
    budget: {"name", "unit": "passes" | "seconds" | "steps", "amount"}, or None where nothing was trained here.
    spent: passes, macs, seconds (by the clock), processor_seconds (not in old records), updates, cycles, images, peak_memory_mb.
    scores: step count as text -> list of score objects (name, identity, value or None with a note saying why, low, high, n,
    higher_is_better, unit, note; `Score.to_json`, with its key if wanted).
    evaluations: step count as text -> network evaluations per sample.
    status: "ok", "skipped: why" or "failed: why".
    files: name -> sha256 of the user's teacher and data, on a track that ships none; part of the id, and written only where there are any.
    source_sha256: of a stranger's file, or of the files of what was released, part of the id; provenance: module -> sha256 of all
    sources, not part of it.
    """

    id: str
    track: str
    method: str
    method_version: int
    label: str
    config: dict[str, Any]
    budget: dict[str, Any] | None
    seed: int
    threads: int
    dtype: str
    device_class: str
    steps: list[int]
    trained_for: list[int]
    data_access: str
    family: str
    status: str
    created: str
    kind: str = "run"
    rules: int = RULES
    source_sha256: str | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    parameters: int | None = None
    tuning: dict[str, float] | None = None
    scores: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evaluations: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def determinants(self) -> dict[str, Any]:
        """The arguments of `run_id` that give this record's id."""
        names = ("track", "method", "method_version", "source_sha256", "config", "budget", "seed", "threads", "dtype")
        more = ("device_class", "trained_for", "steps", "kind", "rules", "files")
        return {name: getattr(self, name) for name in names + more}

    @property
    def setting(self) -> str:
        """A hash shared by the runs that differ only in seed or in which step counts were scored: a board averages over these."""
        return run_id(**{**self.determinants(), "seed": 0, "steps": []})

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_json(self) -> dict[str, Any]:
        data = plain(asdict(self))
        return data if self.files else {name: value for name, value in data.items() if name != "files"}

    def scrubbed(self) -> RunRecord:
        """Without absolute paths anywhere, and without this machine's user and host name in free text."""
        data = scrub(self.to_json())
        data["status"] = scrub_words(data["status"])
        data["environment"] = scrub_words(data["environment"])
        for scores in data["scores"].values():
            for score in scores:
                score["note"] = scrub_words(score["note"])
        return RunRecord(**data)

    @classmethod
    def from_json(cls, data: object, where: str = "record") -> RunRecord:
        """Raises `BadFileError` with one line that begins with `where`."""
        checked = check_fields(data, RUN_CHECKS | FILE_CHECKS if isinstance(data, dict) and "files" in data else RUN_CHECKS, where)
        check_private(checked, where)
        check_run(checked, where)
        record = cls(**checked)
        if record.id != run_id(**record.determinants()):
            raise BadFileError(f"{where}: its id is not the hash of what it says it ran; it was edited or made elsewhere")
        return record


@dataclass(frozen=True)
class LatencyRecord:
    """Seconds per call of one student (subject: its run's id) or of the teacher (subject: "teacher") at one batch size.

    stages: None where samples were timed alone (all records before there were stages). Else the seconds are those of a whole pipeline,
    from prompts to images, and this says how they were spent: label, compiled, compile_seconds (of the first call, None uncompiled),
    peak_memory_mb, evaluations (per sample), seconds (stage -> a number a round; they sum to those above) and macs (stage -> matmul and
    elementwise multiply-adds of one image).
    ratio: to the teacher's latency measured in the same interleaved rounds, {"value", "low", "high"}; None for the teacher.
    reference_steps: the teacher's step count in that ratio.
    flagged: p90 / median > 1.3, too noisy to be quoted. Make one with `measured`, which fills what follows from the seconds.
    """

    id: str
    track: str
    subject: str
    steps: int
    batch: int
    seconds: list[float]
    median: float
    p10: float
    p90: float
    ratio: dict[str, float] | None
    reference_steps: int | None
    flagged: bool
    threads: int
    dtype: str
    device_class: str
    created: str
    environment: dict[str, Any]
    kind: str = "latency"
    stages: dict[str, Any] | None = None

    @classmethod
    def measured(
        cls,
        *,
        track: str,
        subject: str,
        steps: int,
        batch: int,
        seconds: Sequence[float],
        threads: int,
        dtype: str,
        device_class: str,
        ratio: Mapping[str, float] | None = None,
        reference_steps: int | None = None,
        created: str | None = None,
        environment: Mapping[str, Any] | None = None,
        stages: Mapping[str, Any] | None = None,
    ) -> LatencyRecord:
        record = cls(
            id="", track=track, subject=subject, steps=steps, batch=batch, seconds=[float(second) for second in seconds],
            ratio=None if ratio is None else dict(ratio), reference_steps=reference_steps, threads=threads, dtype=dtype,
            device_class=device_class, created=created or now(), environment=dict(environment or {}),
            stages=None if stages is None else plain(stages), **summary(seconds),
        )  # fmt: skip
        return replace(record, id=record.content_id())

    def content_id(self) -> str:
        """A measurement is never repeated exactly, so its id is the hash of all that it holds."""
        return digest({key: value for key, value in self.to_json().items() if key != "id"})[:16]

    def to_json(self) -> dict[str, Any]:
        """Without `stages` where there are none, so that records made before them keep their ids."""
        data = plain(asdict(self))
        return data if self.stages is not None else {name: value for name, value in data.items() if name != "stages"}

    def scrubbed(self) -> LatencyRecord:
        clean = LatencyRecord(**{**scrub(self.to_json()), "environment": scrub_words(scrub(plain(self.environment)))})
        return replace(clean, id=clean.content_id())

    @classmethod
    def from_json(cls, data: object, where: str = "latency record") -> LatencyRecord:
        """Raises `BadFileError` with one line that begins with `where`."""
        checked = check_latency(data, where)
        check_private(checked, where)
        record = cls(**checked)
        if record.id != record.content_id():
            raise BadFileError(f"{where}: its id is not the hash of its content; it was edited")
        if any(getattr(record, name) != value for name, value in summary(record.seconds).items()):
            raise BadFileError(f"{where}: its median, p10, p90 or flag do not follow from its seconds")
        return record


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """median, p10 and p90 by linear interpolation between order statistics, and `flagged`: whether they spread too far to be quoted."""
    if not seconds:
        raise ValueError("a latency needs at least one measurement")
    ordered = sorted(float(second) for second in seconds)

    def quantile(q: float) -> float:
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    median, p90 = quantile(0.5), quantile(0.9)
    return {"median": median, "p10": quantile(0.1), "p90": p90, "flagged": p90 > NOISY * median}
