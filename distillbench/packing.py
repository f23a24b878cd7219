"""An author's records packed into one file: complete, unchanged since they were scored, no seed chosen or left out. No torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .budget import parse_budget
from .discovery import Found, find
from .errors import BadFileError, UsageError
from .jobs import STEPS, Job, plan, resolve
from .records import RunRecord, digest, now, plain
from .store import Store, write_atomically
from .submission import FORMAT, LEAST_SEEDS, file_name, parse
from .tracks.facts import TrackFacts, facts_of

BUILT_IN = "distillbench_methods"  # the package whose methods are published from the harness's own runs
IN_PULL_REQUEST = "in the pull request"


def pack(target: str, track: str, budget: str, store: Store, where: str | None = None) -> tuple[str, dict[str, Any]]:
    """The file's name and its content. Raises `UsageError` with what is missing, and the command that makes it."""
    found, facts = find(target), facts_of(track)
    if (found.module or "").partition(".")[0] == BUILT_IN:
        raise UsageError(f"{found.info.id} comes with distillbench and is published from its own runs; submit a method of yours")
    if parse_budget(budget, facts.budgets).unit == "seconds":
        raise UsageError(f"budget {budget!r}: what fits into seconds differs between machines, so no one can rerun it; use passes or steps")
    records = _complete(target, found, facts, budget, store)
    for record in records:
        _check_student(record, store)
    ids = {record.id for record in records}
    assert records[0].budget is not None
    content = plain({
        "format": FORMAT, "card": dataclasses.asdict(found.info), "track": facts.id, "budget": records[0].budget,
        "source": {"file": found.path.name, "sha256": found.source_sha256, "files": found.sources(), "where": where or IN_PULL_REQUEST},
        "records": [record.to_json() for record in records],
        "latencies": [latency.to_json() for latency in store.latencies(facts.id) if latency.subject in ids], "created": now(),
    })  # fmt: skip
    content["digest"] = digest(content)
    try:
        parse(content, Path(found.path.name))  # what a reader would refuse is refused now
    except BadFileError as error:
        raise UsageError(f"this cannot be submitted: {error}") from None
    return file_name(found.info.id, facts, records[0].budget), content


def write_submission(folder: Path, name: str, content: dict[str, Any]) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    except OSError as error:
        raise UsageError(f"cannot write {folder / name} ({error.strerror}); name another folder with --out") from None
    return folder / name


def trainings(target: str, facts: TrackFacts, budget: str, seed: int) -> list[Job]:
    """The trainings of one seed as `bench` plans them."""
    jobs = plan(facts.name, [target], budget=budget, seeds=[seed], steps=STEPS, reference_steps=(1,))
    return [job for job in jobs if not job.is_reference]


def _complete(target: str, found: Found, facts: TrackFacts, budget: str, store: Store) -> list[RunRecord]:
    """The ok records of seeds 0 .. n-1, n the highest that was run; leaving one out would be choosing among results."""
    held = {record.id: record for record in store.records(facts.id)}
    others = any(record.method == found.info.id for record in held.values())
    settings = {resolve(job).record.setting for job in trainings(target, facts, budget, 0)}
    tried = [record.seed for record in held.values() if record.setting in settings]
    records, missing = [], {}
    for seed in range(max([LEAST_SEEDS - 1, *tried]) + 1):
        for job in trainings(target, facts, budget, seed):
            record = held.get(resolve(job).record.id)
            if record is not None and record.ok:
                records.append(record)
            else:
                missing[seed] = "not run" if record is None else record.status
    if missing:
        seeds = max([LEAST_SEEDS, *(seed + 1 for seed in tried)])
        why = ", ".join(f"seed {seed} {reason}" for seed, reason in missing.items())
        hint = f" (there are runs in other settings, or of another text of {found.path.name})" if others and not tried else ""
        raise UsageError(
            f"{found.info.id} under budget {budget} on {facts.id} is not complete in {store.folder}: {why}{hint}. At least {LEAST_SEEDS} "
            f"seeds from 0 on are needed, type: distillbench bench {facts.name} --methods {target} --budget {budget} --seeds {seeds} "
            f"--store {store.folder}"
        )
    for record in records:
        for name, sha in found.sources().items():
            if record.provenance.get(name) != sha:
                raise UsageError(f"{name} is not the text that made run {record.id} (seed {record.seed}); run it again in another store")
    return records


def _check_student(record: RunRecord, store: Store) -> None:
    from .runner import checksum

    folder = store.student_folder(record.id)
    if not folder.is_dir():
        raise UsageError(f"the student of seed {record.seed} is not in the store any more ({folder}); run it again in another store")
    if checksum(folder) != record.checksums.get("student"):
        raise UsageError(f"the student of seed {record.seed} is not the one that was scored: {folder} has another checksum than its record")
