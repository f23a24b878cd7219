"""The summaries beyond the mean: that they are the statistics of the records, and what a lone row says."""

from __future__ import annotations

import numpy as np
import pytest

from distillbench.leaderboard import Board
from distillbench.listing import board_of
from distillbench.published import published_store
from distillbench.report import robust
from distillbench.statistics import interquartile_mean, probability_of_improvement


@pytest.fixture(scope="module", params=["mixture2d", "digits"])
def board_and_records(request):
    store = published_store(request.param)
    return board_of(request.param, store), {record.id: record for record in store.records()}


def test_they_are_those_of_the_records(board_and_records):
    board, records = board_and_records
    found = robust.summaries(board, records)
    rows = [row for row in board.rows if row.competes and len(row.seeds) >= 2]
    assert [(one.label, one.evaluations, one.n) for one in found] == [(row.label, row.evaluations, len(row.seeds)) for row in rows]
    for one, row in zip(found, rows, strict=True):
        values = list(row.cells[board.facts.main].by_seed.values())
        assert one.nested.value == pytest.approx(np.mean(values))
        assert one.nested.low < one.nested.value < one.nested.high
        assert one.interquartile.value == pytest.approx(interquartile_mean(values))
        assert f"{one.interquartile.value:.{one.places}f} [" in one.text(one.interquartile)


def test_odds_are_against_the_best_other_method_of_its_budget(board_and_records):
    board, records = board_and_records
    small = {id: record for id, record in records.items() if record.budget is None or record.budget["name"] == "S"}
    board = Board.from_records(small.values(), (), board.facts)
    name, sign = board.facts.main, -1 if board.higher_is_better(board.facts.main) is False else 1
    ranked = [row for row in board.rows if row.competes]
    found = robust.summaries(board, records)
    assert len(found) == len(ranked)
    for one, row in zip(found, ranked, strict=True):
        rivals = [other for other in ranked if other.evaluations == row.evaluations and other is not row]
        best = max(rivals, key=lambda other: sign * other.value(name))
        ours, theirs = ([sign * value for value in each.cells[name].by_seed.values()] for each in (row, best))
        assert (one.other, one.odds) == (best.label, probability_of_improvement(ours, theirs))


def test_a_method_alone_has_no_odds_and_one_seed_no_row(board_and_records):
    board, records = board_and_records
    label = next(row.label for row in board.rows if row.competes)
    alone = Board(board.facts, tuple(row for row in board.rows if row.label == label), board.columns)
    assert {one.odds_text for one in robust.summaries(alone, records)} == {"no other method"}
    first = {id: record for id, record in records.items() if record.seed == 0}
    single = Board.from_records(first.values(), (), board.facts)
    assert robust.summaries(single, first) == []
