"""What an author sends in: the records of a method that is not built in, in one file. Nothing in such a file is trusted. No torch here.

`packing` makes it, `read_submission` checks it, `submitted` reads those that lie beside the published records.
What a file says of itself is only checked for agreement; that its numbers are true is for `verification` to find out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadFileError
from .record_checks import LATENCY_CHECKS, RUN_CHECKS, Check, check_fields, check_private, score_key
from .records import RULES, LatencyRecord, RunRecord, digest, run_id
from .store import read_json
from .tracks.facts import TrackFacts

FORMAT = 1
LEAST_SEEDS = 3
FOLDER = "submissions"  # inside a track's published folder
VERIFIED = ".verified.json"
HOW = ("bit for bit", "same numbers", "within the noise")

_DIGEST: Check = (lambda value: isinstance(value, str) and len(value) == 64, "a sha256")
_FORMAT: Check = (lambda value: value == FORMAT and not isinstance(value, bool), f"{FORMAT}, the only one there is")


def _is_card(value: Any) -> bool:
    return isinstance(value, dict) and RUN_CHECKS["method"][0](value.get("id")) and RUN_CHECKS["method_version"][0](value.get("version"))


def _is_source(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"file", "sha256", "files", "where"}:
        return False
    texts = all(isinstance(value[name], str) and 0 < len(value[name]) < 300 for name in ("file", "where"))
    return texts and RUN_CHECKS["provenance"][0](value["files"]) and value["files"].get(value["file"]) == value["sha256"]


SUBMISSION_CHECKS: dict[str, Check] = {
    "format": _FORMAT,
    "card": (_is_card, "a method's card with its id and version"),
    "track": RUN_CHECKS["track"],
    "budget": (lambda value: value is not None and RUN_CHECKS["budget"][0](value), "a budget"),
    "source": (_is_source, "file, its sha256, files and where they are"),
    "records": (lambda value: isinstance(value, list) and bool(value), "a list of run records"),
    "latencies": (lambda value: isinstance(value, list), "a list of latency records"),
    "created": RUN_CHECKS["created"],
    "digest": _DIGEST,
}
VERIFICATION_CHECKS: dict[str, Check] = {
    "format": _FORMAT,
    "submission": _DIGEST,
    "seed": RUN_CHECKS["seed"],
    "how": (lambda value: value in HOW, "how the rerun agreed"),
    "scores": (lambda value: isinstance(value, list) and bool(value), "a list of compared scores"),
    "runs": (lambda value: isinstance(value, list) and bool(value), "a list of the records of the rerun"),
    "environment": LATENCY_CHECKS["environment"],
    "created": RUN_CHECKS["created"],
}


@dataclass(frozen=True)
class Submission:
    """A submission that agrees with itself. source: {"file", "sha256", "files": name -> sha256, "where": text}."""

    path: Path
    digest: str
    card: dict[str, Any]
    track: str
    budget: dict[str, Any]
    source: dict[str, Any]
    records: tuple[RunRecord, ...]
    latencies: tuple[LatencyRecord, ...]

    @property
    def method(self) -> str:
        return str(self.card["id"])

    @property
    def seeds(self) -> list[int]:
        return sorted({record.seed for record in self.records})

    @property
    def verified_path(self) -> Path:
        return self.path.with_name(self.path.name.removesuffix(".json") + VERIFIED)


def file_name(method: str, facts: TrackFacts, budget: dict[str, Any]) -> str:
    """`<method>-<track>-<budget>.json`: one name for one setting, however its budget was written."""
    named = [name for name, passes in facts.budgets.items() if budget["unit"] == "passes" and float(budget["amount"]) == passes]
    return f"{method}-{facts.name}-{named[0] if named else '{amount:g}{unit}'.format(**budget)}.json"


# ---------------------------------------------------------------------- reading


def read_submission(path: Path) -> Submission:
    """Raises `BadFileError` with one line that begins with the file, `OSError` if it cannot be read."""
    data = read_json(path)
    try:
        return parse(data, path)
    except (RecursionError, ValueError, TypeError, OverflowError) as error:
        raise BadFileError(f"{path}: not a submission ({str(error)[:80]})") from error


def parse(data: object, path: Path) -> Submission:
    """The content of `path`, checked; raises `BadFileError`."""
    checked = check_fields(data, SUBMISSION_CHECKS, str(path))
    check_private(checked, str(path))
    if digest({name: value for name, value in checked.items() if name != "digest"}) != checked["digest"]:
        raise BadFileError(f"{path}: its digest is not that of its content; it was edited after `distillbench submit` wrote it")
    records = tuple(RunRecord.from_json(data, f"{path}: record {place}") for place, data in enumerate(checked["records"], 1))
    latencies = tuple(LatencyRecord.from_json(data, f"{path}: latency {place}") for place, data in enumerate(checked["latencies"], 1))
    found = Submission(
        path=path, digest=checked["digest"], card=checked["card"], track=checked["track"], budget=checked["budget"],
        source=checked["source"], records=records, latencies=latencies,
    )  # fmt: skip
    for record in records:
        _check_record(found, record)
    _check_together(found)
    return found


def _check_record(found: Submission, record: RunRecord) -> None:
    """It must be what the submission says it is of, or a row could pass for another method's, or for the teacher."""
    owed = {
        "kind": "run", "status": "ok", "track": found.track, "budget": found.budget, "method": found.method, "label": found.method,
        "method_version": found.card["version"], "overrides": {}, "rules": RULES, "trained_for": record.steps,
    }  # fmt: skip
    for name, value in owed.items():
        if getattr(record, name) != value:
            raise BadFileError(f"{found.path}: {name} of run {record.id} is {repr(getattr(record, name))[:60]}, it should be {value!r}")
    if record.source_sha256 not in (None, found.source["sha256"]):
        raise BadFileError(f"{found.path}: run {record.id} was made by another file than the one that the submission names")
    if "student" not in record.checksums:
        raise BadFileError(f"{found.path}: run {record.id} has no checksum of its student")


def _check_together(found: Submission) -> None:
    """One setting, seeds 0 .. n-1, the same step counts in each, and latencies of these runs alone."""
    settings = {run_id(**{**record.determinants(), "seed": 0, "steps": [], "trained_for": []}) for record in found.records}
    if len(settings) > 1:
        raise BadFileError(f"{found.path}: its runs differ in more than their seed (config, threads, dtype or device)")
    if found.seeds != list(range(len(found.seeds))) or len(found.seeds) < LEAST_SEEDS:
        has = ", ".join(map(str, found.seeds))
        raise BadFileError(f"{found.path}: has seeds {has}; it needs {LEAST_SEEDS} or more, from 0 on without a gap")
    parts = {seed: sorted(step for record in found.records if record.seed == seed for step in record.steps) for seed in found.seeds}
    if any(part != parts[0] or len(set(part)) != len(part) for part in parts.values()):
        raise BadFileError(f"{found.path}: its seeds do not have the same step counts, each once")
    steps = {record.id: record.steps for record in found.records}
    for latency in found.latencies:
        if latency.track != found.track or latency.steps not in steps.get(latency.subject, []):
            raise BadFileError(f"{found.path}: latency {latency.id} is of none of its runs")


def verification_of(found: Submission) -> dict[str, Any] | None:
    """The verification beside a submission, None if there is none; raises `BadFileError` if it is malformed or of another content."""
    path = found.verified_path
    try:
        data = check_fields(read_json(path), VERIFICATION_CHECKS, str(path))
        check_private(data, str(path))
    except FileNotFoundError:
        return None
    except (OSError, RecursionError) as error:
        raise BadFileError(f"{path}: cannot be read ({error})") from error
    if data["submission"] != found.digest:
        raise BadFileError(f"{path}: verifies another content than {found.path.name} has now; verify it again")
    return data


# ---------------------------------------------------------------------- for boards


@dataclass
class Submitted:
    """The submissions of a track: those whose rerun agreed, those that only their authors vouch for, and what was left out and why."""

    verified: list[Submission] = dataclasses.field(default_factory=list)
    reported: list[Submission] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def submitted(folder: Path, facts: TrackFacts, trusted: Sequence[RunRecord]) -> Submitted:
    """What lies in `folder`, checked against the trusted records of the board: a score must be the quantity that they have."""
    all_of, held = Submitted(), {record.id for record in trusted}
    known = _quantities(trusted)
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(VERIFIED):
            continue
        try:
            found = read_submission(path)
            _check_place(found, facts)
            check_quantities(found, known)
        except (BadFileError, OSError) as error:
            all_of.problems.append(f"{error}; not shown")
            continue
        known |= _quantities(found.records)
        try:
            verified = verification_of(found) is not None
        except BadFileError as error:
            all_of.problems.append(f"{error}; {found.method} stays self-reported")
            verified = False
        if verified:
            all_of.verified.append(found)
        elif not held.issuperset(record.id for record in found.records):  # else the author's own board: the store has these runs
            all_of.reported.append(found)
    return all_of


def _check_place(found: Submission, facts: TrackFacts) -> None:
    if found.track != facts.id:
        raise BadFileError(f"{found.path}: is of {found.track}, this board is {facts.id}")
    foreign = {score["name"] for record in found.records for scores in record.scores.values() for score in scores} - set(facts.columns)
    if foreign:
        raise BadFileError(f"{found.path}: {', '.join(sorted(foreign))[:80]} is no score of {facts.id}")
    name = file_name(found.method, facts, found.budget)
    if found.path.name != name:
        raise BadFileError(f"{found.path}: a submission is named after what is in it, this one {name}")


def _quantities(records: Iterable[RunRecord]) -> dict[str, Any]:
    return {score["name"]: quantity(score) for record in records for scores in record.scores.values() for score in scores}


def quantity(score: dict[str, Any]) -> tuple[Any, ...]:
    """What a score is a number of, and which way is better."""
    return score_key(score["identity"]), score["higher_is_better"], score["n"]


def check_quantities(found: Submission, known: dict[str, Any], exactly: bool = False) -> None:
    """Raises `BadFileError` unless every score is the quantity that is known under its name (exactly: and none is left out or added)."""
    for record in found.records:
        for steps, scores in record.scores.items():
            names = {score["name"] for score in scores}
            if exactly and names != set(known):
                raise BadFileError(f"{found.path}: seed {record.seed} at {steps} steps has not the track's scores: {_differ(names, known)}")
            for score in scores:
                if known.get(score["name"], quantity(score)) != quantity(score):
                    raise BadFileError(
                        f"{found.path}: {score['name']} of seed {record.seed} at {steps} steps is another quantity than the board's "
                        "(its identity, direction or number of samples differs)"
                    )


def _differ(names: set[str], known: dict[str, Any]) -> str:
    return ", ".join([f"no {name}" for name in sorted(set(known) - names)] + [f"unknown {name}" for name in sorted(names - set(known))])
