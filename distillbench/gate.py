"""The gate: is a technique worse than a baseline on the same seeds? Better, not worse, worse or undecided, with the reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from .bench import run_plan, still_missing
from .budget import parse_budget
from .closing import told
from .config import as_text, load_recipe
from .discovery import Found, discover, find
from .errors import UsageError
from .jobs import STEPS, Job, resolve, split
from .listing import board_of
from .published import published_store
from .records import RunRecord
from .statistics import Interval, mean_interval, paired_difference
from .store import Store
from .tracks.facts import TrackFacts, facts_of

BETTER, NOT_WORSE, WORSE, UNDECIDED = "better", "not worse", "worse", "undecided"
EXIT = {BETTER: 0, NOT_WORSE: 0, WORSE: 1, UNDECIDED: 3}


@dataclass(frozen=True)
class Margin:
    """The difference that may be tolerated: absolute in the score's unit, or a share of the baseline's mean."""

    amount: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Margin:
        """From "0.02" or "5%"."""
        number = text.strip()
        try:
            amount = float(number.removesuffix("%"))
        except ValueError:
            amount = -1.0
        if not 0 <= amount < float("inf"):
            raise UsageError(f"--margin {text!r} is neither a number from 0 in the score's unit nor a share such as 5%")
        return cls(amount / 100, True) if number.endswith("%") else cls(amount, False)

    def of(self, baseline: float) -> float:
        return self.amount * abs(baseline) if self.relative else self.amount


@dataclass(frozen=True)
class AtSteps:
    """One step count: by how much the target is better than the baseline (above 0: better), and what that says.

    advantage: the 95 % paired interval.  joint: the same with Bonferroni's correction over the step counts compared.
    """

    steps: int
    target: float
    baseline: float
    advantage: Interval
    joint: Interval
    margin: float

    @property
    def verdict(self) -> str:
        if self.joint.high < -self.margin:
            return WORSE
        if self.joint.low > 0:
            return BETTER
        return NOT_WORSE if self.advantage.low >= -self.margin else UNDECIDED


@dataclass(frozen=True)
class Gate:
    """The outcome. `reasons` is one paragraph for a person; `exit_code` is 0, 1 or 3."""

    status: str
    reasons: str
    comparisons: tuple[AtSteps, ...]

    @property
    def exit_code(self) -> int:
        return EXIT[self.status]


def compare(target: Mapping[int, Mapping[int, float]], baseline: Mapping[int, Mapping[int, float]], *, higher_is_better: bool,
            margin: Margin) -> tuple[AtSteps, ...]:  # fmt: skip
    """steps -> seed -> score of both, compared at every step count that both have, over the seeds that both have."""
    shared = sorted(target.keys() & baseline.keys())
    sign = 1.0 if higher_is_better else -1.0
    found = []
    for steps in shared:
        ours, theirs = ({seed: sign * value for seed, value in side[steps].items()} for side in (target, baseline))
        advantage, joint = paired_difference(ours, theirs), paired_difference(ours, theirs, level=1 - 0.05 / len(shared))
        if advantage is None or joint is None:
            continue
        seeds = sorted(ours.keys() & theirs.keys())
        means = [mean_interval([side[steps][seed] for seed in seeds]).value for side in (target, baseline)]
        found.append(AtSteps(steps, means[0], means[1], advantage, joint, margin.of(means[1])))
    return tuple(found)


def conclude(comparisons: Sequence[AtSteps]) -> str:
    """Worse if any step count is; not worse only if every one is at least that; better if one is and none is undecided."""
    said = [comparison.verdict for comparison in comparisons]
    if WORSE in said:
        return WORSE
    if UNDECIDED in said or not said:
        return UNDECIDED
    return BETTER if BETTER in said else NOT_WORSE


def gate(target: str, against: str | None = None, *, track: str = "mixture2d", budget: str = "S", seeds: int = 5, margin: str = "5%",
         store: Store, workers: int = 2, log: str | None = None) -> Gate:  # fmt: skip
    """Train target and baseline on the same seeds, as far as the store lacks them, and compare the track's main score."""
    facts, limit = facts_of(track), Margin.parse(margin)
    if seeds < 2:
        raise UsageError(f"a gate compares seeds; {seeds} is too few, take --seeds 2 or more (5 is usual)")
    parse_budget(budget, facts.budgets)
    ours = find(target)
    against = against or default_baseline(ours, facts)
    theirs = find(against)
    steps = tuple(n for n in STEPS if n in ours.info.steps and n in theirs.info.steps)
    if not steps:
        raise UsageError(f"{target} and {against} have no step count of {', '.join(map(str, STEPS))} in common, so nothing can be compared")
    sides = []
    for name, settings in ((target, inherited(ours, theirs, facts)), (against, {})):
        sides.append([Job(name, facts.name, budget, seed, part, settings) for seed in range(seeds) for part in split(name, steps)])
    jobs = [job for side in sides for job in side]
    _refuse_old_code(ours, sides[0], store)
    with told(store, jobs, log):
        run_plan(jobs, store, workers, Console(stderr=True), log)
    missing = {resolve(job).record.id for job in still_missing(jobs, store)}
    records = [[_stored(store, job) for job in side] for side in sides]
    names = _names(ours, theirs)
    for name, side in zip(names, records, strict=True):
        bad = next((record for record in side if not record.ok), None)
        if bad is not None:
            status = WORSE if name == names[0] and bad.id in missing else UNDECIDED
            return Gate(status, f"{status.upper()}: {name}, seed {bad.seed}, {bad.status}. Nothing was compared.", ())
    scores = [_scores(side, facts.main) for side in records]
    higher = next(score["higher_is_better"] for record in records[0] for score in _all(record) if score["name"] == facts.main)
    comparisons = compare(*scores, higher_is_better=higher, margin=limit)
    return Gate(conclude(comparisons), _paragraph(names, facts, budget, seeds, comparisons, limit), comparisons)


def default_baseline(target: Found, facts: TrackFacts) -> str:
    """For a file the installed method of the same id, whose changed copy it must be; else the best other method of the published board."""
    if target.module is None and target.info.id in discover():
        return target.info.id
    board = board_of(facts.name, published_store(facts.name))
    others = [row.method for row in board.rows if row.competes and row.method in discover() and row.method != target.info.id]
    if not others:
        raise UsageError(f"there is no published method on {facts.name} to compare with; name a baseline with --against")
    return others[0]


def _refuse_old_code(target: Found, jobs: Sequence[Job], store: Store) -> None:
    """An installed method's runs are known by its version, so that of a file edited since the store would answer with the old code."""
    now = target.source_sha256
    for job in jobs if target.module else ():
        record = store.get(resolve(job).record.id)
        if record is not None and record.ok and record.provenance.get(target.path.name, now) != now:
            raise UsageError(
                f"{target.path.name} was edited since {store.folder} got its runs of {target.info.id} {target.info.version}: "
                "raise the version in its info, name the file instead of the id, or take another --store"
            )


def inherited(target: Found, baseline: Found, facts: TrackFacts) -> dict[str, str]:
    """The baseline's tuned knobs for a target of the same id, or of a class that extends it, without a recipe of its own.

    So that a changed copy of a method is compared at the same knobs, and the change alone makes the difference.
    """
    recipe = load_recipe(baseline.path.parent, facts.name, baseline.info.id)
    if target.path == baseline.path or load_recipe(target.path.parent, facts.name, target.info.id).values:
        return {}
    target_class, baseline_class = target.load(), baseline.load()
    if target.info.id != baseline.info.id and not issubclass(target_class, baseline_class):
        return {}
    knobs = {field.name for field in dataclasses.fields(target_class.Config)}
    return {name: as_text(value) for name, value in recipe.values.items() if name in knobs}


def _stored(store: Store, job: Job) -> RunRecord:
    record = store.get(resolve(job).record.id)
    assert record is not None, "run_plan leaves a record of every job"
    return record


def _all(record: RunRecord) -> list[dict]:
    return [score for scores in record.scores.values() for score in scores]


def _scores(records: Sequence[RunRecord], name: str) -> dict[int, dict[int, float]]:
    """steps -> seed -> value."""
    found: dict[int, dict[int, float]] = {}
    for record in records:
        for steps, scores in record.scores.items():
            for score in scores:
                if score["name"] == name and score["value"] is not None:
                    found.setdefault(int(steps), {})[record.seed] = float(score["value"])
    return found


def _names(target: Found, baseline: Found) -> tuple[str, str]:
    """What the two are called: their ids, and where these are the same, where each comes from."""
    if target.info.id != baseline.info.id:
        return target.info.id, baseline.info.id
    first, second = ("installed" if found.module else found.path.name for found in (target, baseline))
    if first == second:
        first, second = (f"{found.path.parent.name}/{found.path.name}" for found in (target, baseline))
    return f"{target.info.id} ({first})", f"{baseline.info.id} ({second})"


def _paragraph(names: tuple[str, str], facts: TrackFacts, budget: str, seeds: int, comparisons: Sequence[AtSteps],
               margin: Margin) -> str:  # fmt: skip
    status = conclude(comparisons)
    allowed = f"{100 * margin.amount:g} % of the baseline" if margin.relative else f"{margin.amount:g}"
    parts = [
        f"at {c.steps} step{'s' if c.steps > 1 else ''} {c.target:.4g} against {c.baseline:.4g}, better by {c.advantage.value:+.3g} "
        f"[{c.advantage.low:+.3g}, {c.advantage.high:+.3g}], {c.verdict}"
        for c in comparisons
    ]
    advice = " More seeds or a wider margin would decide it." if status == UNDECIDED else ""
    return (
        f"{status.upper()}: {names[0]} against {names[1]} on {facts.id} under budget {budget}, {facts.main} over {seeds} shared seeds, "
        f"margin {allowed}, 95 % paired intervals: {'; '.join(parts)}.{advice}"
    )
