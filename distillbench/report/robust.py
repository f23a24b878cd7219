"""The main score of each row beyond its mean and t interval: with sampling noise, without extreme seeds, and as odds of one training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..leaderboard import Board, Row
from ..leaderboard.texts import budget_name, places_by_column
from ..records import RunRecord
from ..statistics import Interval, SeedScore, interquartile_mean_interval, nested_bootstrap, probability_of_improvement

ABOUT = (
    "The mean of few trainings can hang on one of them, so here is the main score seen in three more ways. Seeds and samples: the 95 % "
    "interval of the mean when training seeds are resampled and the sampling noise, which all seeds share, is drawn anew (bootstrap). "
    "Interquartile mean: the mean without the lowest and the highest quarter of the seeds, with its bootstrap interval. Odds: the "
    "probability that one training of this method scores better than one training of the method named, the best other one with as many "
    "evaluations; 50 % is a draw."
)


@dataclass(frozen=True)
class Summary:
    """One row of a board with at least two seeds. odds: against `other`, or None where a row has no rival."""

    budget: str
    label: str
    evaluations: int
    n: int
    nested: Interval
    interquartile: Interval
    odds: Interval | None
    other: str
    places: int

    def text(self, interval: Interval) -> str:
        return f"{interval.value:.{self.places}f} [{interval.low:.{self.places}f}, {interval.high:.{self.places}f}]"

    @property
    def odds_text(self) -> str:
        if self.odds is None:
            return "no other method"
        return f"{100 * self.odds.value:.0f} % [{100 * self.odds.low:.0f}, {100 * self.odds.high:.0f}] over {self.other}"


def summaries(board: Board, records: Mapping[str, RunRecord]) -> list[Summary]:
    """Of all ranked rows with two seeds or more, in the board's order. The resampling is the same at each call."""
    name, rng = board.facts.main, np.random.default_rng(0)
    rows = [row for row in board.rows if row.competes and name in row.cells and len(row.cells[name].by_seed) >= 2]
    sign = -1.0 if board.higher_is_better(name) is False else 1.0
    found = []
    for row in rows:
        scores = _seed_scores(row, name, records)
        rival = next(
            (other for other in rows if other is not row and (other.budget, other.evaluations) == (row.budget, row.evaluations)), None
        )
        odds = None
        if rival is not None:
            ours, others = ([sign * value for value in each.cells[name].by_seed.values()] for each in (row, rival))
            odds = probability_of_improvement(ours, others)
        values = [score.value for score in scores]
        found.append(Summary(
            budget_name(row.budget, board.facts), row.label, row.evaluations or row.steps, len(scores), nested_bootstrap(scores, rng=rng),
            interquartile_mean_interval(values, rng=rng), odds, rival.label if rival else "", places_by_column(board)[name],
        ))  # fmt: skip
    return found


def _seed_scores(row: Row, name: str, records: Mapping[str, RunRecord]) -> Sequence[SeedScore]:
    """The row's scores with their sampling noise, as the records hold it."""
    found = []
    for run_id in row.run_ids:
        for score in records[run_id].scores.get(str(row.steps), []):
            if score["name"] == name and score["value"] is not None:
                found.append(SeedScore.from_bounds(records[run_id].seed, score["value"], score["low"], score["high"]))
    return found
