"""The numbers behind the figures: the front and its uncertainty against what can be worked out by hand."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from math import comb
from statistics import NormalDist

import numpy as np
import pytest

from distillbench.leaderboard import Board
from distillbench.records import LatencyRecord
from distillbench.report import curves, runs
from distillbench.report.look import FAINT, ON_DARK, PAGE, darkened, styles
from distillbench.tracks.facts import FACTS
from records.conftest import make_board_records, make_run, score

FACTS_2D = FACTS["mixture2d"]


def front_of(cost: list[float], quality: list[float]) -> list[bool]:
    return curves.on_front(np.array([cost]), np.array([quality]))[0].tolist()


def test_the_front_is_what_nothing_beats():
    assert front_of([1, 2, 3, 4], [0.5, 0.7, 0.6, 0.9]) == [True, True, False, True]
    assert front_of([1, 1], [0.5, 0.6]) == [False, True], "the same time, better"
    assert front_of([2, 1], [0.5, 0.5]) == [False, True], "as good, faster"
    assert front_of([1, 1], [0.5, 0.5]) == [True, True], "twins do not beat each other"


def timed(subject: str, seconds: list[float], steps: int = 1) -> LatencyRecord:
    return LatencyRecord.measured(track=FACTS_2D.id, subject=subject, steps=steps, batch=FACTS_2D.latency_batch, seconds=seconds, threads=1,
                                  dtype="float32", device_class="cpu")  # fmt: skip


def duel(ours: list[float], theirs: list[float], our_seconds: list[float], their_seconds: list[float]) -> dict[str, curves.Place]:
    """Two methods at one evaluation: what the front says of them."""
    records = [make_run("cd", seed=i, scores={1: [score("in-mode", v)]}) for i, v in enumerate(ours)]
    records += [make_run("dmd2", seed=i, scores={1: [score("in-mode", v)]}) for i, v in enumerate(theirs)]
    latencies = [timed(records[0].id, our_seconds), timed(records[len(ours)].id, their_seconds)]
    board = Board.from_records(records, latencies, FACTS_2D)
    return {place.label: place for place in curves.places(board, board.budgets[0], np.random.default_rng(0))}


def test_a_sure_place_on_the_front_is_there_in_every_resample():
    found = duel([0.9, 0.91, 0.92], [0.5, 0.51, 0.52], [1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    assert (found["cd"].share, found["cd"].on_front) == (1.0, True)
    assert (found["dmd2"].share, found["dmd2"].on_front) == (0.0, False)


def test_seeds_are_drawn_together_because_methods_share_them():
    """dmd2 is slower and always 0.01 better on the same seed; drawn apart, the seeds' own scatter would hide that."""
    scatter = [0.5, 0.6, 0.7, 0.8]
    found = duel(scatter, [value + 0.01 for value in scatter], [1.0] * 5, [2.0] * 5)
    assert found["cd"].share == found["dmd2"].share == 1.0


def test_the_share_is_how_often_the_resampled_median_is_faster():
    """Equal scores; dmd2's time is 1 in all rounds, cd's is 0 or 2 by halves: the front holds the faster one alone."""
    found = duel([0.5, 0.5], [0.5, 0.5], [0.001, 0.001, 0.001, 2.0, 2.0], [1.0] * 5)
    below = sum(_binomial(5, k, 0.6) for k in (3, 4, 5))  # the median of five draws is fast if three or more are
    error = (below * (1 - below) / curves.RESAMPLES) ** 0.5
    assert found["cd"].share == pytest.approx(below, abs=5 * error)
    assert found["cd"].share + found["dmd2"].share == pytest.approx(1.0)


def _binomial(n: int, k: int, p: float) -> float:
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def test_one_seed_moves_by_its_sampling_noise():
    """Scores 0.5 and 0.51 with intervals of +-0.01 each; the slower one stays on the front only where it comes out better."""
    found = duel([0.5], [0.51], [1.0] * 5, [2.0] * 5)
    expected = NormalDist(0.01, 2**0.5 * 0.01 / 1.96).cdf(0)
    error = (expected * (1 - expected) / curves.RESAMPLES) ** 0.5
    assert 1 - found["dmd2"].share == pytest.approx(expected, abs=5 * error)


def test_panels_hold_every_method_at_every_budget_and_the_references():
    records, latencies = make_board_records("mixture2d", 3)
    more = [dataclasses.replace(one, budget={"name": "M", "unit": "passes", "amount": 1.6e7}) for one in records if one.method == "cd"]
    more = [
        make_run("cd", seed=one.seed, scores={int(n): s for n, s in one.scores.items()}, config=one.config, budget=one.budget)
        for one in more
    ]
    board = Board.from_records([*records, *more], latencies, FACTS_2D)
    table = curves.panels(board)
    assert [[(p.score, p.evaluations) for p in line] for line in table] == [
        [(name, n) for n in (1, 2, 4)] for name in ("in-mode", "sliced-w2")
    ]
    first = table[0][0]
    assert [(mark.x, mark.budget, mark.seeds) for mark in first.lines["cd"]] == [(4e6, "S", 3), (1.6e7, "M", 3)]
    assert [mark.budget for mark in first.lines["dmd2"]] == ["S"]
    by_place = {(row.method, row.evaluations): row.value("in-mode") for row in board.rows if row.kind == "reference"}
    assert (first.teacher, first.full, first.truth) == (by_place["teacher", 1], by_place["teacher", 50], by_place["truth", 0])


def test_a_method_keeps_its_look_and_no_two_share_one():
    labels = [f"m{i}" for i in range(20)]
    looks = styles(labels)
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(labels)


def test_the_dark_picture_differs_in_colours_alone():
    assert len(set(ON_DARK.values())) == len(ON_DARK)
    assert darkened(f'<path style="fill: {PAGE}; stroke: {FAINT}"/>') == f'<path style="fill: {ON_DARK[PAGE]}; stroke: {ON_DARK[FAINT]}"/>'


def test_losses_become_lines_of_bounded_length():
    losses = [
        {"passes": float(i + 1), "turn": "student", "loss": 10.0 ** -(i / 500), "gan": (-1.0) ** i, "bad": "nan"} for i in range(1000)
    ]
    charts = {chart.title: chart for chart in runs.charts(losses)}
    assert set(charts) == {"student: loss", "student: gan"}
    points = [tuple(map(float, pair.split(","))) for pair in charts["student: loss"].points.split()]
    assert len(points) == runs.MOST_POINTS
    assert charts["student: loss"].log
    assert points[0][1] == 0.0
    assert points[-1][1] == runs.HEIGHT
    slope = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert slope == pytest.approx([slope[0]] * len(slope), rel=0.2), "an exponential is a line on a logarithmic axis"
    assert not charts["student: gan"].log
