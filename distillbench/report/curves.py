"""What the figures show, as plain numbers taken from a board: quality against passes, quality against latency and its front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..leaderboard import Board, Row
from ..leaderboard.texts import budget_name
from ..statistics import NORMAL_95

SECOND = {"mixture2d": "sliced-w2"}  # a distance between distributions beside the main score, where that is a rate
MOST_PANELS = 4
RESAMPLES = 2000


@dataclass(frozen=True)
class Mark:
    """A score of one row. x: teacher passes.  low, high: 95 %, over seeds, or over samples where there is a single seed."""

    x: float
    budget: str
    value: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Panel:
    """One score at one number of evaluations: a line of marks for each method, and the levels of the references that were scored."""

    score: str
    higher_is_better: bool
    evaluations: int
    lines: dict[str, tuple[Mark, ...]]
    teacher: float | None  # at as many evaluations
    full: float | None  # the teacher at its most evaluations
    truth: float | None


@dataclass(frozen=True)
class Place:
    """One row in the plane of latency (seconds for a batch) and main score. share: of the resamples in which it is on the front."""

    label: str
    method: bool  # or the teacher
    evaluations: int
    median: float
    p10: float
    p90: float
    value: float
    low: float
    high: float
    on_front: bool = False
    share: float = 0.0


def scores_shown(board: Board) -> list[str]:
    names = [board.facts.main, SECOND.get(board.facts.name)]
    return [name for name in names if name is not None and name in board.columns]


def most_evaluations(board: Board) -> int:
    """Of the teacher, as scored; 0 if it was not."""
    return max((row.evaluations or 0 for row in board.rows if row.method == "teacher" and row.kind == "reference"), default=0)


def panels(board: Board) -> list[list[Panel]]:
    """A row of panels for each score shown, one panel for each number of evaluations at which a method was scored under passes."""
    rows = [row for row in board.rows if row.competes and row.budget is not None and row.budget["unit"] == "passes" and row.seeds]
    evaluations = sorted({row.evaluations for row in rows if row.evaluations is not None})[:MOST_PANELS]
    return [[_panel(board, rows, name, n) for n in evaluations] for name in scores_shown(board) if evaluations]


def _panel(board: Board, rows: Sequence[Row], name: str, evaluations: int) -> Panel:
    lines: dict[str, list[Mark]] = {}
    for row in rows:
        mark = _mark(row, name, board) if row.evaluations == evaluations else None
        if mark is not None:
            lines.setdefault(row.label, []).append(mark)
    references = [row for row in board.rows if row.kind == "reference"]
    teacher = {row.evaluations: row.value(name) for row in references if row.method == "teacher"}
    return Panel(
        name, board.higher_is_better(name) is not False, evaluations,
        {label: tuple(sorted(marks, key=lambda mark: mark.x)) for label, marks in sorted(lines.items())},
        teacher.get(evaluations), teacher.get(most_evaluations(board)), next((row.value(name) for row in references if row.is_truth), None),
    )  # fmt: skip


def _mark(row: Row, name: str, board: Board) -> Mark | None:
    cell = row.cells.get(name)
    if cell is None or cell.value is None or row.budget is None:
        return None
    low, high = (cell.value if edge is None else edge for edge in (cell.low, cell.high))
    return Mark(float(row.budget["amount"]), budget_name(row.budget, board.facts), cell.value, low, high, len(cell.by_seed))


def places(board: Board, budget: Mapping[str, Any] | None, rng: np.random.Generator) -> list[Place]:
    """The rows of a budget that have a latency at the track's batch and a main score, with how often each is on the Pareto front."""
    name, batch = board.facts.main, board.facts.latency_batch
    rows = [
        row
        for row in board.under(budget)
        if row.value(name) is not None and batch in row.latency and (row.competes or row.method == "teacher")
    ]
    if not rows:
        return []
    sign = -1.0 if board.higher_is_better(name) is False else 1.0
    quality = sign * _resampled_scores(rows, name, rng)
    seconds = np.stack([_resampled_medians(row.latency[batch].seconds, rng) for row in rows], axis=1)
    shares = on_front(seconds, quality).mean(0)
    medians = np.array([[row.latency[batch].median for row in rows]])
    fronts = on_front(medians, np.array([[sign * row.cells[name].value for row in rows]]))[0]  # type: ignore[operator]
    return [
        replace(_place(row, name, batch), on_front=bool(front), share=float(share))
        for row, front, share in zip(rows, fronts, shares, strict=True)
    ]


def _place(row: Row, name: str, batch: int) -> Place:
    cell, latency = row.cells[name], row.latency[batch]
    assert cell.value is not None
    low, high = (cell.value if edge is None else edge for edge in (cell.low, cell.high))
    return Place(
        row.label, row.kind == "run", row.evaluations or row.steps, latency.median, latency.p10, latency.p90, cell.value, low, high
    )


def on_front(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Which of n points are on the front in each of k resamples, (k, n) booleans: no other point costs no more and is no worse,
    and one of the two strictly. cost, quality: (k, n)."""
    no_dearer = cost[:, :, None] <= cost[:, None, :]
    no_worse = quality[:, :, None] >= quality[:, None, :]
    strictly = (cost[:, :, None] < cost[:, None, :]) | (quality[:, :, None] > quality[:, None, :])
    return np.logical_not((no_dearer & no_worse & strictly).any(1))


def _resampled_scores(rows: Sequence[Row], name: str, rng: np.random.Generator) -> np.ndarray:
    """Means (k, n) over resampled training seeds: one draw of seeds for all rows, because the rows share them. A row with one seed
    moves by its sampling noise instead."""
    seeds = sorted({seed for row in rows for seed in row.cells[name].by_seed})
    weights = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), RESAMPLES).astype(float)
    columns = []
    for row in rows:
        cell = row.cells[name]
        assert cell.value is not None
        if len(cell.by_seed) == 1:
            deviation = 0.0 if cell.low is None or cell.high is None else (cell.high - cell.low) / (2 * NORMAL_95)
            columns.append(cell.value + deviation * rng.standard_normal(RESAMPLES))
            continue
        mine = weights[:, [seeds.index(seed) for seed in cell.by_seed]]
        total = mine.sum(1)
        mean = mine @ np.array(list(cell.by_seed.values())) / np.maximum(total, 1)
        columns.append(np.where(total > 0, mean, cell.value))  # a draw that met none of the row's seeds says nothing of it
    return np.stack(columns, axis=1)


def _resampled_medians(seconds: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    values = np.asarray(seconds)
    return np.asarray(np.median(values[rng.integers(len(values), size=(RESAMPLES, len(values)))], axis=1))
