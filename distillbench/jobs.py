"""Jobs: what a plan is made of. Plain data, so that the same plan goes to local processes now and to a cluster later."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .budget import parse_budget
from .config import load_recipe, make_config
from .discovery import Found, find, harness_sha256
from .errors import UsageError
from .records import RunRecord, environment, now, run_id
from .tracks import get_track
from .tracks.facts import EXTERNAL, TrackFacts, facts_of

TEACHER, TRUTH = "teacher", "truth"
STEPS = (1, 2, 4)  # trained for and scored unless told otherwise, so that plans share their runs


@dataclass(frozen=True)
class Job:
    """One training with its scoring, or one row of references (target "teacher" or "truth").

    steps: step counts that are scored.  settings: knobs as text, as `--set` gives them.
    teacher, data: paths, for a track of the user's own files; records hold the checksums of what lies there instead.
    """

    target: str
    track: str
    budget: str = "S"
    seed: int = 0
    steps: tuple[int, ...] = STEPS
    settings: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    teacher: str | None = None
    data: str | None = None

    @property
    def is_reference(self) -> bool:
        return self.target in (TEACHER, TRUTH)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "steps": list(self.steps)}


@dataclass(frozen=True)
class Resolved:
    """A job whose names have been looked up: the method's class is loaded, its knobs are known, and so is its id."""

    job: Job
    facts: TrackFacts
    record: RunRecord  # without a result yet
    found: Found | None = None
    method_class: Any = None
    config: Any = None


def resolve(job: Job) -> Resolved:
    """Look everything up; raises `UsageError` for an unknown name, knob or budget."""
    facts = facts_of(job.track)
    if not job.steps or any(n < 1 for n in job.steps):
        raise UsageError(f"step counts are whole numbers from 1, not {', '.join(map(str, job.steps)) or 'none'}")
    if not isinstance(job.seed, int) or job.seed < 0:
        raise UsageError(f"a seed is a whole number from 0, not {job.seed!r}")
    if job.is_reference:
        config = {"solver": facts.solver} if job.target == TEACHER else {}
        return Resolved(job, facts, _record(job, facts, method=job.target, version=0, label=job.target, config=config, budget=None))
    found = find(job.target)
    budget = parse_budget(job.budget, facts.budgets)
    method_class = found.load()
    recipe = load_recipe(found.path.parent, facts.name, found.info.id)
    config = make_config(method_class.Config, found.info.id, recipe.values, job.settings)
    tuned = make_config(method_class.Config, found.info.id, recipe.values)
    overrides = {name: value for name, value in dataclasses.asdict(config).items() if value != getattr(tuned, name)}
    record = _record(
        job, facts, method=found.info.id, version=found.info.version, label=label_of(found.info.id, overrides),
        config=dataclasses.asdict(config), budget={"name": budget.name, "unit": budget.unit, "amount": budget.amount},
        overrides=overrides, source=None if found.module else found.source_sha256, trained_for=job.steps,
        data_access=found.info.data_access, family=found.info.family, tuning={"trials": recipe.trials, "passes": recipe.passes},
        provenance={"distillbench": harness_sha256(), **found.sources()},
    )  # fmt: skip
    return Resolved(job, facts, record, found, method_class, config)


def label_of(method: str, overrides: Mapping[str, Any]) -> str:
    """What the board prints: the method's id and the knobs that differ from the track's recipe."""
    told = ",".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in sorted(overrides.items()))
    return f"{method}({told.replace(' ', '')})" if told else method


def _record(job: Job, facts: TrackFacts, *, method: str, version: int, label: str, config: dict[str, Any], budget: dict[str, Any] | None,
            overrides: dict[str, Any] | None = None, source: str | None = None, trained_for: Sequence[int] = (), data_access: str = "none",
            family: str = "", tuning: dict[str, float] | None = None, provenance: dict[str, str] | None = None) -> RunRecord:  # fmt: skip
    draft = RunRecord(
        id="", track=facts.id, method=method, method_version=version, label=label, config=config, budget=budget, seed=job.seed,
        threads=job.threads, dtype=job.dtype, device_class=job.device.partition(":")[0], steps=list(job.steps),
        trained_for=list(trained_for), data_access=data_access, family=family, status="failed: not finished", created=now(),
        kind="reference" if job.is_reference else "run", source_sha256=source, provenance=provenance or {}, overrides=overrides or {},
        tuning=tuning, environment=environment(),
        files=get_track(job.track, job.teacher, job.data).checksums() if facts.name in EXTERNAL or job.teacher or job.data else {},
    )  # fmt: skip
    return dataclasses.replace(draft, id=run_id(**draft.determinants()))


def split(target: str, steps: Sequence[int]) -> list[tuple[int, ...]]:
    """The trainings that a method needs for these step counts: one for all, or one for each."""
    if find(target).info.per_step:
        return [(n,) for n in steps]
    return [tuple(steps)]


def plan(
    track: str,
    methods: Iterable[str],
    *,
    budget: str,
    seeds: Iterable[int],
    steps: Sequence[int],
    reference_steps: Sequence[int],
    settings: Mapping[str, str] | None = None,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    teacher: str | None = None,
    data: str | None = None,
) -> list[Job]:
    """References first, then every method, seed by seed, so that an early stop leaves whole seeds."""
    common: dict[str, Any] = {"track": track, "threads": threads, "device": device, "dtype": dtype, "teacher": teacher, "data": data}
    jobs = [Job(TEACHER, steps=tuple(reference_steps), **common), Job(TRUTH, steps=(1,), **common)]
    chosen = list(methods)
    for seed in seeds:
        for target in chosen:
            possible = tuple(n for n in steps if n in find(target).info.steps)
            if not possible:
                raise UsageError(
                    f"{target} is made for {', '.join(map(str, find(target).info.steps))} steps, not {', '.join(map(str, steps))}"
                )
            for part in split(target, possible):
                jobs.append(Job(target, budget=budget, seed=seed, steps=part, settings=dict(settings or {}), **common))
    return jobs


def merged(records: Sequence[RunRecord]) -> RunRecord:
    """Several trainings of one method and seed seen as one record (a student per step count); not stored."""
    first = records[0]
    if len(records) == 1:
        return first
    spent = {name: sum(r.spent.get(name, 0) for r in records) for name in first.spent}
    spent["peak_memory_mb"] = max(r.spent.get("peak_memory_mb", 0) for r in records)
    bad = [r.status for r in records if not r.ok]
    return dataclasses.replace(
        first,
        steps=[n for r in records for n in r.steps],
        trained_for=[n for r in records for n in r.trained_for],
        spent=spent,
        scores={k: v for r in records for k, v in r.scores.items()},
        evaluations={k: v for r in records for k, v in r.evaluations.items()},
        checksums={f"{name}-{'-'.join(map(str, r.steps))}": value for r in records for name, value in r.checksums.items()},
        status=bad[0] if bad else "ok",
    )
