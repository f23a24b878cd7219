"""A board as a table for a page: every cell with the text that is read and the number by which its column is sorted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..leaderboard import Board, Row, texts, verdict
from ..listing import metric_rows
from ..records import RunRecord

if TYPE_CHECKING:  # claims.py loads tracks, and with them torch
    from ..claims import Decision


@dataclass(frozen=True)
class Link:
    run_id: str
    text: str
    about: str
    ok: bool


@dataclass(frozen=True)
class Datum:
    """order: what the column is sorted by; None, an empty cell, always goes last.  mark: best, second, or empty."""

    text: str
    order: float | str | None = None
    mark: str = ""
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Column:
    """about: what the header means, in full."""

    name: str
    about: str
    numeric: bool
    cells: tuple[Datum, ...]


@dataclass(frozen=True)
class Table:
    """One budget of a board. kinds: of each row, `run` or `reference`.  breaks: whether the evaluations change at a row."""

    title: str
    about: str
    columns: tuple[Column, ...]
    kinds: tuple[str, ...]
    breaks: tuple[bool, ...]
    reasons: tuple[str, ...]
    verdict: str

    @property
    def lines(self) -> list[tuple[Datum, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


def tables(board: Board, records: Mapping[str, RunRecord], keep: Callable[[Row], bool] = lambda row: True) -> list[Table]:
    """A table for each budget, of the rows to keep."""
    found = []
    for budget in board.sections():
        rows = [row for row in board.under(budget) if keep(row)]
        if not any(row.kind == "run" for row in rows) and board.budgets:
            continue
        title, about = texts.heading(board, rows, budget)
        groups = texts.groups(rows)
        found.append(Table(
            title.partition(":")[0], about, tuple(_columns(board, rows, records)), tuple(row.kind for row in rows),
            tuple(i > 0 and groups[i] != groups[i - 1] for i in range(len(rows))), tuple(texts.reasons(rows)), verdict(board, rows),
        ))  # fmt: skip
    return found


def _columns(board: Board, rows: Sequence[Row], records: Mapping[str, RunRecord]) -> list[Column]:
    facts, places, marks = board.facts, texts.places_by_column(board), texts.marks(board, rows)
    meanings = {row["name"]: row["meaning"] for row in metric_rows() if row["track"] == facts.id}
    columns: list[Column] = []

    def column(name: str, about: str, text: Callable[[Row], str], order: Callable[[Row], float | str | None], numeric: bool = True) -> None:
        columns.append(Column(name, about, numeric, tuple(Datum(texts.one_line(text(row)), order(row)) for row in rows)))

    def spent(name: str) -> Callable[[Row], float | None]:
        shown = "shown_seconds" if name == "seconds" else name
        return lambda row: row.spent.get(shown) if row.kind == "run" else None

    column("#", "rank by the main score among the methods with as many evaluations", texts.rank_text,
           lambda r: r.rank)  # fmt: skip
    column("method", "method, with the knobs that differ from the track's recipe", lambda r: r.label, lambda r: r.label, numeric=False)
    column("evaluations", "network evaluations that one sample costs", texts.evaluations_text,
           lambda r: None if r.is_truth else r.evaluations or r.steps)  # fmt: skip
    for name in board.columns:
        better = {True: "higher is better", False: "lower is better", None: "neither high nor low is better"}[board.higher_is_better(name)]
        about = "; ".join(part for part in (meanings.get(name, ""), better) if part)
        cells = tuple(
            Datum(
                texts.score_text(row, name, places[name]) or texts.one_line(row.why_empty(name)), row.value(name), marks.get((i, name), "")
            )
            for i, row in enumerate(rows)
        )
        columns.append(Column(name + texts.direction_text(board, name), about, True, cells))
    batch = facts.latency_batch
    column(f"time for {batch}", f"median milliseconds to sample a batch of {batch}; ~: too noisy to quote",
           lambda r: texts.DASH if r.is_truth else texts.latency_text(r.latency.get(batch)),
           lambda r: r.latency[batch].median if batch in r.latency else None)  # fmt: skip
    base = texts.ratio_base(board)
    column(f"ratio to {base}", f"that time over that of the {base} evaluations, measured in the same rounds, with its 95 % interval",
           lambda r: texts.DASH if r.is_truth else texts.ratio_text(r.latency.get(batch)),
           lambda r: (r.latency[batch].ratio or {}).get("value") if batch in r.latency else None)  # fmt: skip
    column("trained for", "step counts of one training; 3 x S: a student was trained for each step count, each under the whole budget",
           lambda r: texts.trained_for_text(r, facts), lambda r: ",".join(map(str, r.trained_for)) or None, numeric=False)  # fmt: skip
    column("data", "what the training saw besides the teacher", lambda r: r.data_access or texts.DASH, lambda r: r.data_access or None,
           numeric=False)  # fmt: skip
    column("passes", "teacher passes spent on one training, mean over seeds", lambda r: texts.spent_text(r, "passes"), spent("passes"))
    column("seconds", "seconds of one training, mean over seeds (of the processor where known)", lambda r: texts.spent_text(r, "seconds"),
           spent("seconds"))  # fmt: skip
    column("parameters", "of the student that is sampled", texts.parameters_text, lambda r: None if r.is_truth else r.parameters)
    column("trials", "tuning trials behind the recipe, and the passes they cost", texts.trials_text,
           lambda r: None if r.kind != "run" else (r.tuning or {}).get("trials", 0))  # fmt: skip
    columns.append(Column("runs, by seed", "the runs behind the row, one for each training seed", True,
                          tuple(Datum("", len(row.seeds), "", _links(row, records)) for row in rows)))  # fmt: skip
    return columns


def _links(row: Row, records: Mapping[str, RunRecord]) -> tuple[Link, ...]:
    found = [records[run_id] for run_id in row.run_ids]
    return tuple(
        Link(record.id, str(record.seed) if row.kind == "run" else "run",
             f"{row.label}, {row.steps} steps, seed {record.seed}" + ("" if record.ok else f": {record.status}"), record.ok)
        for record in found
    )  # fmt: skip


SYMBOLS = {"reproduced": "✓", "not reproduced": "✗", "undecided": "?", "not run": "–"}


def claim_groups(decisions: Sequence[Decision]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Decisions as text, by method, in the order in which they come."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in decisions:
        effect = one.effect
        groups.setdefault(one.method, []).append({
            "text": one.claim.text, "better": one.claim.better, "worse": one.claim.worse, "metric": one.claim.metric, "track": one.track,
            "steps": one.claim.steps, "margin": one.claim.margin, "verdict": one.verdict, "symbol": SYMBOLS[one.verdict],
            "kind": one.verdict.replace(" ", "-"), "n": one.n, "why": texts.one_line(one.why),
            "effect": "–" if effect is None else f"{effect.value:+.3g}",
            "interval": "–" if effect is None or effect.n < 2 else f"[{effect.low:+.3g}, {effect.high:+.3g}]",
            "p": _p(one.p), "p_adjusted": _p(one.p_adjusted),
        })  # fmt: skip
    return list(groups.items())


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.01 else f"{value:.3f}"
