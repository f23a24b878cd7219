"""Whether a submission's numbers are true: the file is checked, and one seed is trained and scored again."""

from __future__ import annotations

import dataclasses
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .agreement import Refused, Verification, compare
from .discovery import Found, discover, find
from .errors import BadFileError, UsageError
from .jobs import Job, Resolved, resolve
from .packing import trainings
from .records import RunRecord, plain
from .store import Store, write_atomically
from .submission import Submission, check_quantities, quantity, read_submission
from .tracks.facts import facts_of


def verify(path: Path, method: str | None = None, seed: int | None = None, store: str | None = None,
           show: Callable[[Sequence[Job]], Any] | None = None) -> Verification:  # fmt: skip
    """Check the file, rerun one seed (drawn at random unless given) in a fresh store, compare, and write `<file>.verified.json`.

    Runs the method's code. show: jobs -> a context manager whose value has `update(number, fraction, what)`.
    Raises `BadFileError` if the file does not agree with itself, the method or the track, `Refused` if the rerun does not agree with it.
    """
    try:
        found = read_submission(path)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror})") from None
    _check_writable(found.verified_path)
    seed = secrets.choice(found.seeds) if seed is None else seed
    if seed not in found.seeds:
        raise UsageError(f"{path} has seeds 0 to {found.seeds[-1]}, not {seed}")
    target = method or found.method
    _check_method(found, _method_of(found, method))
    reported = {tuple(record.steps): record for record in found.records if record.seed == seed}
    jobs = _jobs(found, target, seed, reported)
    for job in jobs:
        _check_determinants(found, resolve(job), reported[job.steps])
    for record in found.records:
        _check_spent(found, record)
    _check_scores(found)
    reruns = _rerun(jobs, store, show)
    verification = compare(found, seed, reruns)
    try:
        write_atomically(found.verified_path, verification.to_json())
    except OSError as error:
        raise UsageError(f"cannot write {found.verified_path} ({error.strerror})") from None
    return verification


# ---------------------------------------------------------------------- the file against the method and the track


def _method_of(found: Submission, method: str | None) -> Found:
    if method is None and found.method not in discover():
        raise UsageError(f"{found.method} is not installed; get {found.source['file']} ({found.source['where']}) and name it with --method")
    return find(method or found.method)


def _check_method(found: Submission, method: Found) -> None:
    if method.source_sha256 != found.source["sha256"]:
        raise BadFileError(
            f"{found.path}: was made with another text of {found.source['file']} (sha256 {found.source['sha256'][:16]}...) than "
            f"{method.path.name} is now ({method.source_sha256[:16]}...)"
        )
    other = sorted(name for name, sha in method.sources().items() if found.source["files"].get(name) != sha)
    if other:
        raise BadFileError(f"{found.path}: was made with other texts beside the method's file: {', '.join(other)[:80]}")
    card = plain(dataclasses.asdict(method.info))
    wrong = sorted(name for name in card.keys() & found.card.keys() if card[name] != found.card[name])
    if wrong:
        raise BadFileError(f"{found.path}: the card is not the method's own: {', '.join(wrong)} differ")


def _jobs(found: Submission, target: str, seed: int, reported: dict[tuple[int, ...], RunRecord]) -> list[Job]:
    """What `bench` would plan for this seed, on the device of the records where there is one."""
    facts, first = facts_of(found.track), found.records[0]
    budget = found.budget["name"] if found.budget["name"] in facts.budgets else f"{found.budget['amount']!r}{found.budget['unit']}"
    if found.budget["unit"] == "seconds":
        raise BadFileError(f"{found.path}: a budget in seconds cannot be repeated on another machine")
    jobs = [
        dataclasses.replace(job, threads=first.threads, dtype=first.dtype, device=_device(first.device_class))
        for job in trainings(target, facts, budget, seed)
    ]
    if {job.steps for job in jobs} != set(reported):
        wanted = " and ".join(",".join(map(str, job.steps)) for job in jobs)
        raise BadFileError(f"{found.path}: seed {seed} was not trained and scored as planned here, for {wanted} steps")
    return jobs


def _device(device_class: str) -> str:
    if device_class == "cpu":
        return "cpu"
    import torch

    return device_class if device_class == "cuda" and torch.cuda.is_available() else "cpu"


def _check_determinants(found: Submission, resolved: Resolved, record: RunRecord) -> None:
    """The record must be of the run that its method, track and budget say: nobody's knobs but the recipe's."""
    ours = resolved.record.scrubbed()
    names = ("config", "source_sha256", "method_version", "rules", "overrides", "label", "tuning", "data_access", "family", "trained_for")
    for name in names:
        mine, theirs = plain(getattr(ours, name)), getattr(record, name)
        if mine != theirs and name == "config":
            knobs = sorted(knob for knob in mine.keys() | theirs.keys() if mine.get(knob) != theirs.get(knob))
            told = ", ".join(f"{knob} is {theirs.get(knob)!r}, not {mine.get(knob)!r}" for knob in knobs)[:200]
            raise BadFileError(f"{found.path}: run {record.id} has knobs that neither the method's defaults nor its recipe give: {told}")
        if mine != theirs:
            raise BadFileError(f"{found.path}: {name} of run {record.id} is {repr(theirs)[:60]}; the method's own is {repr(mine)[:60]}")
    amounts = [(budget["unit"], float(budget["amount"])) for budget in (ours.budget, record.budget) if budget is not None]
    if amounts[0] != amounts[1]:
        raise BadFileError(f"{found.path}: the budget called {found.budget['name']} is {amounts[1][1]:g} {amounts[1][0]} there")


def _check_spent(found: Submission, record: RunRecord) -> None:
    """A run overruns its budget by less than the cycle that ends it; cycles differ between stages, so two average ones are allowed."""
    assert record.budget is not None
    unit = {"passes": "passes", "steps": "cycles"}[record.budget["unit"]]
    spent, cycles = record.spent.get(unit), record.spent.get("cycles")
    if spent is None or not cycles:
        raise BadFileError(f"{found.path}: run {record.id} does not say what it spent ({unit} and cycles)")
    allowed = record.budget["amount"] + 2 * spent / cycles
    if spent > allowed:
        raise BadFileError(f"{found.path}: run {record.id} spent {spent:.4g} {unit} of a budget of {record.budget['amount']:.4g}")


def _check_scores(found: Submission) -> None:
    from .tracks import get_track

    own = {score.name: quantity(score.to_json()) for score in get_track(found.track).floor()}
    check_quantities(found, own, exactly=True)


# ---------------------------------------------------------------------- the rerun


class _Silent:
    def update(self, number: int, fraction: float, what: str) -> None: ...


@contextmanager
def _silent(jobs: Sequence[Job]) -> Iterator[_Silent]:
    yield _Silent()


def _rerun(jobs: Sequence[Job], store: str | None, show: Callable[[Sequence[Job]], Any] | None) -> list[RunRecord]:
    from .runner import execute

    with tempfile.TemporaryDirectory() as folder:
        fresh = Store(store or folder)
        held = [job for job in jobs if fresh.get(resolve(job).record.id) is not None]
        if held:
            raise UsageError(f"{fresh.folder} has a run of seed {held[0].seed} already, so nothing would be rerun; name a fresh store")
        records = []
        with (show or _silent)(jobs) as display:
            for number, job in enumerate(jobs):
                records.append(execute(job, fresh, partial(display.update, number)))
                display.update(number, 1.0, records[-1].status)
    for record in records:
        if not record.ok:
            raise Refused(f"the rerun of seed {record.seed} is {record.status}")
    return records


def _check_writable(path: Path) -> None:
    """Before anything is trained."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{path.parent} cannot be written ({error.strerror}); {path.name} goes there") from None
