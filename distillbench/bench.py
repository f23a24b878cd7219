"""`bench`: what is missing of a plan is run, latency is measured, and a board is made of the records."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence

from rich.console import Console

from .budget import parse_budget
from .discovery import discover, find
from .display import Display
from .errors import UsageError
from .jobs import STEPS, TEACHER, Job, plan, resolve
from .logs import check_log, log_known
from .pool import run_jobs
from .records import RunRecord
from .remaining import Kind
from .store import VARIABLE, Store
from .tracks.facts import facts_of

SHORT_LIST = {"digits": ("cd", "dmd2")}  # what `bench digits` runs when none are named: minutes; other tracks run every method


def default_methods(track: str) -> list[str]:
    """The methods of a bench that names none: all of them, or the track's short list, where they are for its domain."""
    return [name for name in SHORT_LIST.get(facts_of(track).name, tuple(discover())) if name in discover()]


def make_plan(track: str, methods: Sequence[str], *, budget: str, seeds: int, steps: Sequence[int] = STEPS,
              settings: Mapping[str, str] | None = None, teacher: str | None = None, data: str | None = None,
              device: str = "cpu") -> list[Job]:  # fmt: skip
    """Every job of the plan, done or not; names, knobs and budget are checked here."""
    from .tracks import get_track

    parse_budget(budget, facts_of(track).budgets)
    jobs = plan(facts_of(track).name, methods, budget=budget, seeds=range(seeds), steps=steps,
                reference_steps=get_track(track).reference_steps, settings=settings, teacher=teacher, data=data, device=device)  # fmt: skip
    for job in jobs:
        resolve(job)
    return jobs


def still_missing(jobs: Sequence[Job], store: Store) -> list[Job]:
    """The jobs without a record, and those that failed."""
    known = {record.id: record for record in store.records()}

    def settled(job: Job) -> bool:
        record = known.get(resolve(job).record.id)
        return record is not None and (record.ok or record.status.startswith("skipped"))

    return [job for job in jobs if not settled(job)]


def name_of(job: Job) -> str:
    if job.is_reference:
        return job.target
    info = find(job.target).info
    steps = f" {job.steps[0]}-step" if len(job.steps) == 1 and info.per_step else ""
    return f"{info.id}{steps} {job.budget} seed {job.seed}"


def kind_of(job: Job) -> Kind:
    """What the display's estimates go by."""
    track = facts_of(job.track)
    return Kind(job.target, track.id, 0.0 if job.is_reference else parse_budget(job.budget, track.budgets).amount)


def ensure_writable(store: Store) -> None:
    """Raises `UsageError` before anything is trained for a store that cannot keep it."""
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.folder):
            pass
    except OSError as error:
        raise UsageError(
            f"the store {store.folder} cannot be written ({error.strerror}); name another with --store or {VARIABLE}"
        ) from None


def run_plan(jobs: Sequence[Job], store: Store, workers: int, console: Console, log: str | None = None) -> list[RunRecord]:
    """Run what is missing of a plan, with a live display; returns the records of what was run. log: one of `logs.LOGS`.

    `closing.told` around it says where things are when it ends.
    """
    check_log(log)
    todo = still_missing(jobs, store)
    if log is not None:
        log_known(log, store, [record for job in jobs if job not in todo and (record := store.get(resolve(job).record.id)) is not None])
    if not todo:
        console.print(f"Nothing to run: all {len(jobs)} jobs of this plan are in {store.folder}.", markup=False, soft_wrap=True)
        return []
    ensure_writable(store)
    trainings = [job for job in todo if not job.is_reference]
    console.print(_arithmetic(trainings, len(jobs) - len(todo), workers), markup=False, soft_wrap=True)
    with Display([name_of(job) for job in todo], workers, console, [kind_of(job) for job in todo]) as display:
        done = run_jobs(todo, store, workers, display.update, log)
    return [done[number] for number in sorted(done)]


def _arithmetic(trainings: Sequence[Job], known: int, workers: int) -> str:
    """budget -> passes, before anything starts."""
    if not trainings:
        return "Only references are missing."
    facts = facts_of(trainings[0].track)
    budget = parse_budget(trainings[0].budget, facts.budgets)
    each = f"{budget.amount:.3g} teacher passes" if budget.unit == "passes" else f"{budget.amount:g} {budget.unit}"
    kept = f" ({known} jobs are already in the store)" if known else ""
    return f"{facts.id}: {len(trainings)} trainings x {each} on {workers} worker{'s' if workers > 1 else ''}{kept}"


def measure_missing(track: str, store: Store, console: Console, jobs: Sequence[Job] = ()) -> None:
    """Latency of every student of seed 0 that has none yet, beside the teacher, serially. `jobs`: where a stranger's files are."""
    facts = facts_of(track)
    timed = {(record.subject, record.steps) for record in store.latencies(facts.id) if record.stages is None}
    wanted = [
        (record, steps)
        for record in store.records(facts.id)
        if record.ok and record.kind == "run" and record.seed == 0 and store.student_folder(record.id).is_dir()
        for steps in record.steps
        if (record.id, steps) not in timed
    ]
    if not wanted and (TEACHER, max(_steps(track))) in timed:
        return
    from .latency import measure
    from .tracks import get_track

    targets = {resolve(job).record.id: job.target for job in jobs if not job.is_reference}
    students = {}
    for record, steps in wanted:
        if record.source_sha256 is not None and record.id not in targets:
            continue  # of a file that this plan does not name
        try:
            method_class = find(targets.get(record.id, record.method)).load()
            students[record.id, steps] = method_class.student_type.load(store.student_folder(record.id))
        except Exception as error:  # a damaged folder, or a class that cannot load: the row stays without latency
            console.print(f"no latency for {record.label}: {type(error).__name__}: {error}", markup=False)
    if not students and (TEACHER, max(_steps(track))) in timed:
        return
    with Display([f"latency, {len(students)} students and the teacher"]) as display:
        shown = get_track(track, jobs[0].teacher, jobs[0].data) if jobs else get_track(track)
        where = jobs[0].device if jobs else "cpu"
        for latency in measure(shown, students, device=where, say=lambda done: display.update(0, done, "rounds" if done < 1 else "ok")):
            store.add(latency)


def _steps(track: str) -> tuple[int, ...]:
    from .tracks import get_track

    return get_track(track).reference_steps
