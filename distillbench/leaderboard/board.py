"""Rows of a leaderboard: runs that differ only in their seed become one row for each step count. A view of records, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UsageError
from ..record_checks import score_key
from ..records import LatencyRecord, RunRecord
from ..statistics import Interval, mean_interval, paired_difference
from ..tracks.facts import TrackFacts, facts_of
from .labels import distinct_labels, trainings

NOT_RUN = "not run"
SELF_REPORTED = "self-reported"
RELEASED = "released"


@dataclass(frozen=True)
class Cell:
    """A score of a row. `value` None: `note` says why. sampling_only: one seed, the interval is that of sampling alone.

    by_seed: training seed -> value, from which pairs are made.
    """

    name: str
    key: str
    identity: dict[str, Any]
    value: float | None
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool | None
    note: str = ""
    sampling_only: bool = False
    by_seed: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One method in one setting under one budget at one step count; or, not ranked, a reference (teacher, truth) or a released model."""

    kind: str
    label: str
    method: str
    steps: int
    evaluations: int | None
    status: str
    cells: dict[str, Cell]
    config: dict[str, Any]
    budget: dict[str, Any] | None
    data_access: str
    family: str
    trained_for: tuple[int, ...]
    trainings: int  # k students were trained for this label, each under the whole budget
    spent: dict[str, float]  # mean over seeds; peak_memory_mb: largest; see `_spent` for shown_seconds
    parameters: int | None
    seeds: tuple[int, ...]  # scored
    attempted: int  # seeds, the failed and skipped ones included
    tuning: dict[str, float] | None
    run_ids: tuple[str, ...]
    latency: dict[int, LatencyRecord]  # by batch size
    rank: int | None = None
    tied: bool = False  # another row has the same rank
    self_reported: bool = False  # nobody but its author has run it

    @property
    def competes(self) -> bool:
        """Whether it is ranked, marked and concluded about: a method's row that more than its author vouches for."""
        return self.kind == "run" and not self.self_reported

    @property
    def is_truth(self) -> bool:
        return self.kind == "reference" and self.method == "truth"

    def value(self, name: str) -> float | None:
        return self.cells[name].value if name in self.cells else None

    def why_empty(self, name: str) -> str:
        """What an empty cell says."""
        if name in self.cells and self.cells[name].note:
            return self.cells[name].note
        return NOT_RUN if self.status == "ok" else self.status


@dataclass(frozen=True)
class Board:
    """One track's rows in order: by budget, by evaluations, by the main score. `columns` are score names.

    stages: the latest measurement of each whole pipeline, by stages; not of rows alone, for a pipeline may be timed and not scored.
    """

    facts: TrackFacts
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    stages: tuple[LatencyRecord, ...] = ()

    @classmethod
    def from_records(
        cls, records: Iterable[RunRecord], latencies: Iterable[LatencyRecord] = (), track: TrackFacts | str = "mixture2d", *,
        reported: Iterable[RunRecord] = (), reported_latencies: Iterable[LatencyRecord] = (),
    ) -> Board:  # fmt: skip
        """Records of other tracks or versions are left out. Raises `UsageError` if one score name stands for two identities.

        reported: what nobody but its author has run; it never shares a row, or a latency, with the others.
        """
        facts = facts_of(track) if isinstance(track, str) else track
        latencies = list(latencies)
        mine = [record for record in records if record.track == facts.id]
        sent = [record for record in reported if record.track == facts.id]
        refuse_two_identities([*mine, *sent])
        rows = _rows(mine, [record for record in latencies if record.track == facts.id])
        sent_rows = _rows(sent, [record for record in reported_latencies if record.track == facts.id])
        rows += [replace(row, label=f"{row.label} ({SELF_REPORTED})", self_reported=True) for row in sent_rows]
        present = {name for row in rows for name in row.cells}
        columns = [name for name in facts.columns if name in present]
        return cls(facts, tuple(_ranked(rows, facts)), tuple(columns + sorted(present - set(columns))), latest_stages(latencies, facts.id))

    @property
    def budgets(self) -> list[dict[str, Any]]:
        """The budgets of the ranked rows, smallest first within a unit."""
        found = {_budget_key(row.budget): row.budget for row in self.rows if row.budget is not None}
        return [found[key] for key in sorted(found)]

    def under(self, budget: Mapping[str, Any] | None) -> list[Row]:
        """The rows of one budget among the references, by evaluations and main score, truth last."""
        wanted = [row for row in self.rows if row.budget is None or _budget_key(row.budget) == _budget_key(budget)]
        return sorted(wanted, key=lambda row: _place(row, self.facts))

    def sections(self) -> list[dict[str, Any] | None]:
        """The budgets to print, one table each; a lone None where only references or nothing at all is there."""
        return list(self.budgets) or [None]

    def higher_is_better(self, name: str) -> bool | None:
        return next((row.cells[name].higher_is_better for row in self.rows if name in row.cells), None)


def refuse_two_identities(records: Sequence[RunRecord]) -> None:
    """A name is one quantity: two identities under it are never ranked, averaged or printed together."""
    seen: dict[str, tuple[str, dict[str, Any], str]] = {}
    for record in records:
        for score in (score for scores in record.scores.values() for score in scores if score["value"] is not None):
            key = score_key(score["identity"])
            known_key, known, known_in = seen.setdefault(score["name"], (key, score["identity"], record.id))
            if key != known_key:
                differs = sorted(name for name in known.keys() | score["identity"].keys() if known.get(name) != score["identity"].get(name))
                told = "; ".join(f"{name} is {_short(known.get(name))} and {_short(score['identity'].get(name))}" for name in differs[:3])
                both = f"{known_key} (run {known_in}) and {key} (run {record.id})"
                raise UsageError(
                    f"{score['name']} has two identities on {record.track}, {both}: {told}. They are different quantities "
                    "and are not ranked together; keep the runs in two stores (--store)"
                )


def _rows(records: Sequence[RunRecord], latencies: Sequence[LatencyRecord]) -> list[Row]:
    """One a setting and step count, in no order."""
    settings: dict[str, list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: (record.created, record.id)):
        settings.setdefault(record.setting, []).append(record)
    groups = [group for records_of_one in settings.values() for group in _by_steps(records_of_one)]
    labels = distinct_labels(groups)
    counts = trainings(records, labels)
    return [_row(steps, group, labels[group[0].setting], counts[group[0].setting], latencies) for steps, group in groups]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _by_steps(records: Sequence[RunRecord]) -> list[tuple[int, list[RunRecord]]]:
    """For each step count the records that were to score it, one a seed: an ok one first, then the latest."""
    groups = []
    for steps in sorted({step for record in records for step in record.steps}):
        best: dict[int, RunRecord] = {}
        for record in records:
            if steps in record.steps and (record.ok or record.seed not in best or not best[record.seed].ok):
                best[record.seed] = record
        groups.append((steps, [best[seed] for seed in sorted(best)]))
    return groups


def _row(steps: int, group: list[RunRecord], label: str, count: int, latencies: Sequence[LatencyRecord]) -> Row:
    first, done = group[0], [record for record in group if record.ok]
    names = list(dict.fromkeys(score["name"] for record in done for score in record.scores[str(steps)]))
    if len(done) == len(group):
        status = "ok"
    else:
        why = next(record.status for record in group if not record.ok)
        status = why if not done else f"{len(done)} of {len(group)} seeds; {why}"
    return Row(
        kind=first.kind, label=f"{label} ({RELEASED})" if first.kind == RELEASED else label, method=first.method, steps=steps,
        status=status, config=first.config, budget=first.budget,
        evaluations=next((record.evaluations[str(steps)] for record in done), None),
        cells={name: _cell(name, steps, done) for name in names},
        data_access=first.data_access, family=first.family, trained_for=tuple(first.trained_for), trainings=count,
        spent=_spent(done or group),
        parameters=next((record.parameters for record in done if record.parameters is not None), None),
        seeds=tuple(record.seed for record in done), attempted=len(group), tuning=first.tuning,
        run_ids=tuple(record.id for record in group), latency=_latency(first, steps, {record.id for record in done}, latencies),
    )  # fmt: skip


def _spent(records: Sequence[RunRecord]) -> dict[str, float]:
    """Means of what each record holds. shown_seconds, made here, is what a table's column "seconds" shows: of a run on the processor its
    processor seconds, where its record has them, because a busy machine stretches the clock's; else the clock's."""
    amounts: dict[str, list[float]] = {}
    for record in records:
        shown = record.spent.get("processor_seconds") if record.device_class == "cpu" else None
        shown = record.spent.get("seconds") if shown is None else shown
        for name, amount in [*record.spent.items(), *([] if shown is None else [("shown_seconds", shown)])]:
            amounts.setdefault(name, []).append(amount)
    return {name: max(values) if name == "peak_memory_mb" else sum(values) / len(values) for name, values in amounts.items()}


def _cell(name: str, steps: int, records: Sequence[RunRecord]) -> Cell:
    scores = {record.seed: score for record in records for score in record.scores[str(steps)] if score["name"] == name}
    first = next(iter(scores.values()))
    cell = Cell(name, score_key(first["identity"]), first["identity"], None, None, None, first["n"], first["higher_is_better"])
    by_seed = {seed: float(score["value"]) for seed, score in scores.items() if score["value"] is not None}
    if not by_seed:
        return replace(cell, note=first["note"])
    if len(by_seed) == 1:
        only = next(score for score in scores.values() if score["value"] is not None)
        return replace(cell, value=only["value"], low=only["low"], high=only["high"], sampling_only=True, by_seed=by_seed)
    mean = mean_interval(list(by_seed.values()))
    return replace(cell, value=mean.value, low=mean.low, high=mean.high, by_seed=by_seed)


def _latency(first: RunRecord, steps: int, ids: set[str], latencies: Sequence[LatencyRecord]) -> dict[int, LatencyRecord]:
    """The latest measurement for each batch size of one of these runs, or of the teacher."""
    subjects = {"teacher"} if first.kind == "reference" and first.method == "teacher" else ids
    mine = [record for record in latencies if record.subject in subjects and record.steps == steps and record.stages is None]
    return {record.batch: record for record in sorted(mine, key=lambda record: record.created)}


def latest_stages(latencies: Iterable[LatencyRecord], track: str) -> tuple[LatencyRecord, ...]:
    """The latest record by stages of each subject, step count, batch, compilation, device and thread count; the teacher last."""
    found: dict[tuple[Any, ...], LatencyRecord] = {}
    for record in sorted(latencies, key=lambda record: record.created):
        if record.track == track and record.stages is not None:
            compiled = record.stages["compiled"]
            key = (record.batch, compiled, record.subject == "teacher", record.steps, record.stages["label"], record.subject)
            found[(*key, record.device_class, record.threads, record.dtype)] = record
    return tuple(found[key] for key in sorted(found))


def _budget_key(budget: Mapping[str, Any] | None) -> tuple[str, float]:
    return ("", 0.0) if budget is None else (budget["unit"], float(budget["amount"]))


def _place(row: Row, facts: TrackFacts) -> tuple[Any, ...]:
    cell = row.cells.get(facts.main)
    value = None if cell is None else cell.value
    signed = 0.0 if value is None or cell is None else (-value if cell.higher_is_better else value)
    return (row.is_truth, row.evaluations or row.steps, value is None, signed, row.label)


def advantage(higher_is_better: bool | None, name: str, a: Row, b: Row) -> Interval | None:
    """By how much a is better than b on a score (above 0: better), over their shared seeds; None if they share none."""
    sign = -1.0 if higher_is_better is False else 1.0
    ours = {seed: sign * value for seed, value in a.cells[name].by_seed.items()}
    return paired_difference(ours, {seed: sign * value for seed, value in b.cells[name].by_seed.items()})


def _ranked(rows: list[Row], facts: TrackFacts) -> list[Row]:
    """In order; a method's rank is one more than the number of methods that beat it within budget and evaluations.

    To beat is to have a 95 % paired interval above 0. With one seed nothing beats anything, and all share the first place.
    """
    ordered = sorted(rows, key=lambda row: (_budget_key(row.budget), *_place(row, facts)))
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in ordered:
        if row.competes and row.value(facts.main) is not None:
            groups.setdefault((_budget_key(row.budget), row.evaluations), []).append(row)
    ranks: dict[int, int] = {}
    for group in groups.values():
        ranks |= {id(row): 1 + sum(_beats(other, row, facts.main) for other in group if other is not row) for row in group}
    held = [[ranks[id(row)] for row in group] for group in groups.values()]
    shared = {id(row): places.count(ranks[id(row)]) > 1 for group, places in zip(groups.values(), held, strict=True) for row in group}
    return [replace(row, rank=ranks.get(id(row)), tied=shared.get(id(row), False)) for row in ordered]


def _beats(a: Row, b: Row, name: str) -> bool:
    found = advantage(a.cells[name].higher_is_better, name, a, b)
    return found is not None and found.n >= 2 and found.sign > 0
