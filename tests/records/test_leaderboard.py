"""Boards are views of records: grouped, ordered and written right, and never across two identities."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pandas
import pytest

from distillbench.errors import UsageError
from distillbench.leaderboard import FORMATS, Board, render, verdict
from distillbench.records import LatencyRecord, RunRecord
from distillbench.statistics import mean_interval
from distillbench.tracks.facts import FACTS, facts_of


@pytest.fixture
def board(board_records: Callable[..., Any]) -> Board:
    return Board.from_records(*board_records(), "mixture2d")


def of(records: list[RunRecord], latencies: list[LatencyRecord] | None = None, track: str = "mixture2d") -> Board:
    return Board.from_records(records, latencies or [], track)


def in_mode(scored: Any, *values: float) -> dict[int, list[dict[str, Any]]]:
    return {step: [scored("in-mode", value)] for step, value in zip((1, 2, 4), values, strict=False)}


def test_rows_are_ordered_by_evaluations_then_main_score_truth_last(board: Board) -> None:
    rows = board.under(board.budgets[0])
    places = [row.evaluations or row.steps for row in rows if not row.is_truth]
    assert places == sorted(places)
    assert rows[-1].is_truth
    for evaluations in (1, 2, 4):
        values = [row.value("in-mode") for row in rows if row.evaluations == evaluations and row.value("in-mode") is not None]
        assert values == sorted(values, reverse=True)
        assert [row.rank for row in rows if row.evaluations == evaluations and row.kind == "run"] == [1, 2, 3]
    assert all(row.rank is None for row in rows if row.kind == "reference" or row.status != "ok")


def test_a_distance_is_ordered_the_other_way(board_records: Any) -> None:
    rows = Board.from_records(*board_records("digits"), "digits@1").rows
    values = [row.value("fd") for row in rows if row.evaluations == 1 and row.kind == "run" and row.value("fd") is not None]
    assert values == sorted(values)
    assert len(values) == 3


def test_with_one_seed_all_share_the_first_rank(run: Any, scored: Any) -> None:
    values = {"cd": 0.7, "dmd2": 0.8, "ctm": 0.8, "tract": 0.6}
    board = of([run(name, scores=in_mode(scored, value)) for name, value in values.items()])
    assert {row.label: row.rank for row in board.rows} == dict.fromkeys(values, 1)
    assert [row.label for row in board.rows] == ["ctm", "dmd2", "cd", "tract"], "the order is that of the means all the same"
    for form in ("terminal", "markdown", "latex"):
        assert render(board, form).count("1=") == 4


def test_a_rank_counts_the_methods_that_beat_it(run: Any, scored: Any) -> None:
    noise = [0.01, -0.01, 0.005, -0.005]
    values = {
        "dmd2": [0.9 + e for e in noise],
        "cd": [0.9 - e for e in noise],
        "tract": [0.5 + e for e in noise],
        "ctm": [0.4, 0.6, 0.2, 0.7],
    }
    board = of([run(name, seed=seed, scores=in_mode(scored, v)) for name, vs in values.items() for seed, v in enumerate(vs)])
    ranks = {row.label: (row.rank, row.tied) for row in board.rows}
    assert ranks == {"dmd2": (1, True), "cd": (1, True), "tract": (3, True), "ctm": (3, True)}


def test_seeds_are_averaged_with_their_t_interval(run: Any, scored: Any) -> None:
    values = [0.70, 0.74, 0.71, 0.80]
    board = of([run(seed=seed, scores=in_mode(scored, value)) for seed, value in enumerate(values)])
    (row,) = board.rows
    cell, expected = row.cells["in-mode"], mean_interval(values)
    assert (cell.value, cell.low, cell.high) == (expected.value, expected.low, expected.high)
    assert cell.by_seed == dict(enumerate(values))
    assert not cell.sampling_only
    assert row.seeds == (0, 1, 2, 3)


def test_one_seed_shows_the_sampling_interval_and_says_so(run: Any) -> None:
    cell = of([run()]).rows[0].cells["in-mode"]
    assert cell.sampling_only
    assert (cell.low, cell.high) == pytest.approx((0.69, 0.71))
    text = render(of([run()]))
    assert "0.700 ±0.010*" in text
    assert "nothing is decided" in text


def test_two_identities_of_one_name_are_refused(run: Any, scored: Any) -> None:
    fewer = run("dmd2", scores={1: [scored("in-mode", 0.9, n=1000)]})
    with pytest.raises(UsageError, match=r"in-mode has two identities.*n_generated is (8192 and 1000|1000 and 8192)"):
        of([run(), fewer])
    references = run("teacher", kind="reference", budget=None, scores={1: [scored("in-mode", 0.9, n=1000)]})
    with pytest.raises(UsageError, match="two identities"):
        of([run(), references])


def test_other_tracks_and_versions_are_left_out(run: Any) -> None:
    assert of([run(track="mixture2d@2"), run(track="digits@1")]).rows == ()


def test_settings_that_differ_are_not_averaged_and_are_told_apart(run: Any, scored: Any) -> None:
    older = run(scores=in_mode(scored, 0.5))
    newer = run(scores=in_mode(scored, 0.9), method_version=2)
    gpu = run("dmd2", scores=in_mode(scored, 0.5), device_class="cuda")
    cpu = run("dmd2", scores=in_mode(scored, 0.5))
    labels = {row.label for row in of([older, newer, gpu, cpu]).rows}
    assert labels == {"cd@1", "cd@2", "dmd2 cpu", "dmd2 cuda"}


def test_a_student_per_step_count_is_marked(run: Any, scored: Any) -> None:
    records = [run("pd", scores={step: [scored("in-mode", 0.8)]}) for step in (1, 2, 4)]
    board = of([*records, run("cd")])
    assert {row.label: row.trainings for row in board.rows} == {"pd": 3, "cd": 1}
    assert "1 (3 x S)" in render(board, "markdown")
    overlapping = of([run("cd"), run("cd", scores=in_mode(scored, 0.5))])
    assert {row.trainings for row in overlapping.rows} == {1}
    assert {"cd for 1", "cd for 1,2,4"} == {row.label for row in overlapping.rows}


def test_budgets_stand_apart(run: Any) -> None:
    medium = {"name": "M", "unit": "passes", "amount": 1.6e7}
    sixty = {"name": "60s", "unit": "seconds", "amount": 60.0}
    board = of([run(), run(budget=medium), run(budget=sixty)])
    assert [row.rank for row in board.rows] == [1] * 9
    text = render(board)
    assert "budget S = 4M passes" in text
    assert "budget M = 16M passes" in text
    assert "budget 60 seconds" in text


def test_failed_seeds_are_not_hidden(run: Any, scored: Any) -> None:
    good = [run(seed=seed, scores=in_mode(scored, 0.7 + seed / 100)) for seed in range(3)]
    board = of([*good, run(seed=3, scores={}, steps=[1], status="failed: the loss is NaN", trained_for=[1])])
    (row,) = board.rows
    assert row.status == "3 of 4 seeds; failed: the loss is NaN"
    assert (row.seeds, row.attempted) == ((0, 1, 2), 4)
    assert "3 of 4" in render(board)
    assert "the loss is NaN" in render(board)


def test_every_empty_cell_says_why(run: Any, scored: Any) -> None:
    weights = run("dmd2", scores={1: [scored("in-mode", 0.9), scored("coverage", None, note="not run: weights missing")]})
    skipped = run("hyper_sd", scores={}, steps=[1], status="skipped: needs taps", spent={})
    for format in FORMATS:
        text = render(of([weights, skipped, run("cd", scores=in_mode(scored, 0.8))]), format)
        assert "weights missing" in text, format
        assert "skipped: needs taps" in text, format
    markdown = render(of([weights, skipped]), "markdown")
    assert not re.search(r"\| *\|", markdown)
    assert "nan" not in markdown.lower().replace("gaussian", "")


def paired(run: Any, scored: Any, name: str, values: list[float]) -> list[RunRecord]:
    return [run(name, seed=seed, scores=in_mode(scored, value)) for seed, value in enumerate(values)]


def said(board: Board) -> str:
    return verdict(board, board.under(board.budgets[0]))


def test_the_verdict_pairs_seeds(run: Any, scored: Any) -> None:
    noise = [0.00, 0.10, -0.08, 0.05, -0.02, 0.07, -0.09, 0.03]
    cd = paired(run, scored, "cd", [0.6 + wide for wide in noise])
    better = paired(run, scored, "dmd2", [0.62 + wide + 0.001 * (-1) ** i for i, wide in enumerate(noise)])
    assert "at 1 evaluation dmd2 beats cd" in said(of(cd + better))  # unpaired, the noise would hide it
    shuffled = paired(run, scored, "dmd2", [0.62 + wide for wide in reversed(noise)])
    assert "at 1 evaluation dmd2 and cd are tied" in said(of(cd + shuffled))


def test_the_verdict_names_the_teacher_and_missing_pairs(run: Any, scored: Any) -> None:
    teacher = run("teacher", kind="reference", budget=None, scores=in_mode(scored, 0.5))
    cd = paired(run, scored, "cd", [0.60, 0.61, 0.62])
    worse = paired(run, scored, "tract", [0.40, 0.41, 0.42])
    text = said(of([teacher, *cd, *worse]))
    assert "cd beats the teacher at 1 evaluation" in text
    assert "tract loses to the teacher at 1 evaluation" in text
    lone = said(of([*cd, run("tract", seed=9, scores=in_mode(scored, 0.4))]))
    assert "undecided (fewer than 2 shared seeds)" in lone


def test_the_verdict_of_one_seed_decides_nothing(run: Any, scored: Any) -> None:
    text = said(of([run("cd", scores=in_mode(scored, 0.5, 0.9)), run("dmd2", scores=in_mode(scored, 0.8, 0.85))]))
    assert "nothing is decided" in text
    assert "dmd2 at 1 evaluation" in text
    assert "cd at 2 evaluations" in text
    assert "beats" not in text


def test_a_lower_distance_wins_the_verdict(run: Any, scored: Any) -> None:
    low = [run("cd", seed=seed, track="digits@1", scores={1: [scored("fd", 1.0 + seed / 10)]}) for seed in range(4)]
    high = [run("dmd2", seed=seed, track="digits@1", scores={1: [scored("fd", 2.0 + seed / 11)]}) for seed in range(4)]
    assert "cd beats dmd2" in said(of(low + high, track="digits"))


@pytest.mark.parametrize("track", sorted(FACTS))
@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("seeds", [1, 8])
def test_the_terminal_board_keeps_its_width(board_records: Any, track: str, width: int, seeds: int) -> None:
    board = Board.from_records(*board_records(track, seeds), track)
    text = render(board, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text
    for row in board.rows:
        for name, cell in row.cells.items():
            assert cell.value is None or re.search(rf"(?<![\d.]){cell.value:.3f}\b", text), name
    assert "\x1b[1m" in render(board, width=width, color=True)


def test_long_labels_fold_and_keep_every_letter(run: Any, scored: Any) -> None:
    label = "dmd2(" + ",".join(f"knob_{i}={i}" for i in range(8)) + ")"
    text = render(of([run("dmd2", label=label, scores=in_mode(scored, 0.9))]), width=100)
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"knob_{i}" in text.replace("\n", "") for i in range(8))


def test_an_empty_board_says_what_to_type() -> None:
    assert "distillbench bench mixture2d" in render(of([]))
    assert json.loads(render(of([]), "json")) == []
    for format in FORMATS:
        assert isinstance(render(of([]), format), str)


def test_json_parses_back_to_the_rows(board: Board) -> None:
    rows = json.loads(render(board, "json"))
    assert len(rows) == len(board.rows)
    needed = {"method", "steps", "evaluations", "status", "passes", "seconds", "seeds", "scores"}
    for parsed, row in zip(rows, board.rows, strict=True):
        assert needed <= set(parsed)
        assert (parsed["method"], parsed["steps"], parsed["seeds"]) == (row.label, row.steps, len(row.seeds))
        values = {score["name"]: score["value"] for score in parsed["scores"].values()}
        assert values == {name: cell.value for name, cell in row.cells.items()}
        assert all({"value", "low", "high", "n"} <= set(score) for score in parsed["scores"].values())
        assert all(identity.endswith(row.cells[score["name"]].key) for identity, score in parsed["scores"].items())


def test_csv_parses_back_to_the_numbers(board: Board) -> None:
    text = render(board, "csv")
    frame = pandas.read_csv(io.StringIO(text))
    assert len(frame) == len(board.rows)
    assert list(frame["method"]) == [row.label for row in board.rows]
    for name in board.columns:
        for parsed, row in zip(frame[name], board.rows, strict=True):
            value = row.value(name)
            assert math.isnan(parsed) if value is None else parsed == value
    widths = {len(line) for line in csv.reader(io.StringIO(text))}
    assert len(widths) == 1


def test_markdown_has_a_line_for_each_row(board: Board) -> None:
    lines = [line for line in render(board, "markdown").splitlines() if line.startswith("|")]
    assert len(lines) == len(board.rows) + 2
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert sum("**" in line for line in lines) >= 3


def test_latex_is_a_booktabs_table(board: Board) -> None:
    text = render(board, "latex")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(rows) == len(board.rows)
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns[1]) - 1}
    first = next(line for line in rows if line.startswith("1 & dmd2 & 1"))
    assert r"\textbf{0.9" in first
    assert r"\underline{0.8" in next(line for line in rows if line.startswith("2 & dmd2(gan=false) & 1"))
    assert r"hyper\_sd" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_latencies_find_their_rows(board: Board) -> None:
    row = next(row for row in board.rows if row.label == "dmd2" and row.steps == 2)
    assert {batch: record.steps for batch, record in row.latency.items()} == {1: 2, 256: 2}
    assert "0.0400 [0.0385, 0.0417]" in render(board)
    assert "teacher at 50" in render(board)


def test_unknown_formats_and_tracks_name_the_near_ones(board: Board) -> None:
    with pytest.raises(UsageError, match="did you mean latex"):
        render(board, "latx")
    with pytest.raises(UsageError, match="did you mean mixture2d"):
        facts_of("mixture")
    with pytest.raises(UsageError, match="digits@1"):
        facts_of("digits@2")


def test_seconds_are_the_processors_where_a_record_has_them(run):
    def board(*records):
        return Board.from_records(records, [], FACTS["mixture2d"])

    busy = {"passes": 1.0, "seconds": 70.0, "processor_seconds": 20.0}
    both = board(run(spent=busy), run(seed=1, spent=busy | {"processor_seconds": 22.0}))
    told = "seconds: processor seconds"
    row = json.loads(render(both, "json"))[0]
    assert (row["seconds"], row["processor_seconds"]) == (70.0, 21.0)
    assert next(csv.DictReader(io.StringIO(render(both, "csv"))))["seconds"] == "21.0"
    assert "| 21 |" in render(both, "markdown")
    assert told in render(both, "markdown")
    old = board(run(spent={"passes": 1.0, "seconds": 70.0}))
    assert "| 70 |" in render(old, "markdown")
    assert told not in render(old, "markdown")
    elsewhere = board(run(spent=busy, device_class="cuda"))
    assert "| 70 |" in render(elsewhere, "markdown")
