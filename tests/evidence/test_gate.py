"""The gate's rule on numbers, and on real trainings: a sign error, a halved rate that does not matter, a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import method_files
from distillbench import testing
from distillbench.config import load_recipe
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.gate import BETTER, EXIT, NOT_WORSE, UNDECIDED, WORSE, Margin, compare, conclude, default_baseline, gate, inherited
from distillbench.listing import board_of
from distillbench.published import published_store
from distillbench.statistics import paired_difference
from distillbench.store import Store
from distillbench.tracks.facts import facts_of

NOISE = {0: 0.01, 1: -0.01, 2: 0.02, 3: -0.015, 4: 0.0}
NONE = Margin(0.0, False)


def around(mean: float, scale: float = 1.0) -> dict[int, float]:
    return {seed: mean + scale * e for seed, e in NOISE.items()}


def said(target, baseline, margin="5%", higher=True) -> str:
    return conclude(compare({1: target}, {1: baseline}, higher_is_better=higher, margin=Margin.parse(margin)))


def test_the_four_outcomes():
    assert said(around(0.9), around(0.8, 0.2)) == BETTER
    assert said(around(0.8), around(0.8)) == NOT_WORSE, "a copy of itself"
    assert said(around(0.7), around(0.8, 0.2)) == WORSE
    assert said(around(0.78, 3), around(0.8, -3)) == UNDECIDED
    assert {EXIT[BETTER], EXIT[NOT_WORSE]} == {0}
    assert (EXIT[WORSE], EXIT[UNDECIDED]) == (1, 3)


def test_of_a_distance_the_smaller_is_better():
    assert said(around(0.1), around(0.3, 0.2), higher=False) == BETTER
    assert said(around(0.3), around(0.1, 0.2), higher=False) == WORSE


def test_the_margin_is_what_may_be_lost():
    lost = around(0.77)
    assert said(lost, around(0.8), margin="0.05") == NOT_WORSE
    assert said(lost, around(0.8), margin="0.01") == WORSE
    assert Margin.parse("5%").of(-0.8) == pytest.approx(0.04)
    assert Margin.parse("0.02").of(0.8) == 0.02


@pytest.mark.parametrize("text", ["", "five", "-1", "-3%", "nan", "inf%"])
def test_a_margin_that_is_none(text):
    with pytest.raises(UsageError, match="--margin"):
        Margin.parse(text)


def test_intervals_are_the_paired_ones_and_joint_ones_are_wider():
    a, b = around(0.9), around(0.8, 0.3)
    one, two = compare({1: a, 2: a, 4: a}, {1: b, 2: b}, higher_is_better=True, margin=NONE)
    assert (one.steps, two.steps) == (1, 2), "only step counts that both have"
    assert one.advantage == paired_difference(a, b)
    assert one.joint == paired_difference(a, b, level=0.975)
    assert one.joint.low < one.advantage.low < one.advantage.high < one.joint.high


def test_one_bad_step_count_is_enough_and_every_one_must_be_settled():
    good, bad, unclear = around(0.9), around(0.6), around(0.78, 3)
    base, other = around(0.8, 0.2), around(0.8, -3)
    assert conclude(compare({1: good, 2: bad}, {1: base, 2: base}, higher_is_better=True, margin=NONE)) == WORSE
    assert conclude(compare({1: good, 2: unclear}, {1: base, 2: other}, higher_is_better=True, margin=NONE)) == UNDECIDED
    assert conclude(()) == UNDECIDED


# ---------------------------------------------------------------------- real trainings

BUDGET, MARGIN = "1.5e6passes", "10%"
SOURCE = find("dmd2").path
# One step, without the GAN: seconds a training. At these rates the student stands on a plateau: half the rate is as good.
QUICK = (
    ("steps=(1, 2, 4),", "steps=(1,),"),
    ("gan: bool = knob(True,", "gan: bool = knob(False,"),
    ("lr: float = knob(1e-4,", "lr: float = knob(4e-3,"),
    ("batch_size: int | None = knob(None,", "batch_size: int | None = knob(128,"),
)


def copy_of_dmd2(folder: Path, *changes: tuple[str, str]) -> str:
    """dmd2's own file with changes."""
    text = SOURCE.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dmd2.py"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> tuple[str, Store]:
    """The unchanged method and one store for all, so that it is trained once."""
    folder = tmp_path_factory.mktemp("gate")
    return copy_of_dmd2(folder / "unchanged", *QUICK), Store(folder / "store")


CASES = {  # expected, seeds, what is changed into what
    "a sign error in one term": (WORSE, 3, "c.lambda_dm * matching", "-c.lambda_dm * matching"),
    "a halved learning rate that does not matter": (NOT_WORSE, 8, "moved(rate * c.lr)", "moved(0.5 * rate * c.lr)"),
    "a copy of itself": (NOT_WORSE, 3, "Improved Distribution Matching Distillation, DMD2.", "A copy of DMD2."),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_changed_copy_of_dmd2(case, baseline, tmp_path):
    expected, seeds, *change = CASES[case]
    unchanged, store = baseline
    outcome = gate(
        copy_of_dmd2(tmp_path / "changed", *QUICK, tuple(change)), unchanged, budget=BUDGET, seeds=seeds, margin=MARGIN, store=store
    )
    assert outcome.status in ((expected,) if expected == WORSE else (expected, BETTER)), outcome.reasons
    assert outcome.exit_code == EXIT[expected]
    assert outcome.reasons.startswith(f"{outcome.status.upper()}: dmd2 (changed/dmd2.py) against dmd2 (unchanged/dmd2.py) on mixture2d@1")
    if case == "a copy of itself":
        assert outcome.comparisons[0].advantage[:3] == (0.0, 0.0, 0.0), "the same numbers, seed by seed"


def test_a_copy_is_held_at_the_baselines_knobs(tmp_path):
    facts = facts_of("mixture2d")
    copy, plain = find(copy_of_dmd2(tmp_path, QUICK[0])), find("dmd2")
    recipe = plain.path.parent / "recipes" / "mixture2d.toml"
    assert recipe.exists()
    assert inherited(copy, plain, facts).keys() == load_recipe(plain.path.parent, "mixture2d", "dmd2").values.keys() > {"lr"}
    assert inherited(plain, plain, facts) == {}
    assert inherited(find(str(method_files.write(tmp_path / "tiny.py"))), plain, facts) == {}, "another method keeps its own"
    (tmp_path / "recipes").mkdir()
    shutil.copyfile(recipe, tmp_path / "recipes" / "mixture2d.toml")
    assert inherited(copy, plain, facts) == {}, "a recipe of its own stands"


def test_the_baseline_of_a_gate_that_names_none(tmp_path):
    facts = facts_of("mixture2d")
    assert default_baseline(find(copy_of_dmd2(tmp_path / "copy")), facts) == "dmd2", "a changed copy meets its original"
    rows = [row for row in board_of("mixture2d", published_store("mixture2d")).rows if row.competes]
    assert default_baseline(find(str(method_files.write(tmp_path / "tiny.py"))), facts) == rows[0].method
    assert default_baseline(find(rows[0].method), facts) == next(row.method for row in rows if row.method != rows[0].method)


# ---------------------------------------------------------------------- the command, and tests of other repositories

TINY_BUDGET = ("--budget", "3000passes", "--seeds", "2", "--jobs", "1")


def test_the_command_prints_a_paragraph_and_leaves_with_its_status(tmp_path, distillbench):
    tiny = method_files.write(tmp_path / "tiny.py")
    status, out, _ = distillbench("gate", str(tiny), "--against", str(tiny), *TINY_BUDGET)
    assert status == 0
    assert out.startswith("NOT WORSE: tiny")
    assert out.count("\n") == 1


def test_a_target_that_fails_is_worse(tmp_path, distillbench):
    tiny = method_files.write(tmp_path / "tiny.py")
    (tmp_path / "bad").mkdir()
    bad = method_files.write(tmp_path / "bad" / "tiny.py", method_files.in_loss("raise ValueError('no')"))
    status, out, _ = distillbench("gate", str(bad), "--against", str(tiny), *TINY_BUDGET)
    assert status == 1
    assert out.startswith("WORSE: tiny (bad/tiny.py), seed 0, failed: ValueError: no")


def test_the_assertion_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = method_files.write(tmp_path / "tiny.py")
    common = {"against": str(tiny), "budget": "3000passes", "seeds": 2, "store": tmp_path / "store", "workers": 1}
    assert testing.assert_no_regression(str(tiny), **common).status == NOT_WORSE
    (tmp_path / "bad").mkdir()
    bad = method_files.write(tmp_path / "bad" / "tiny.py", method_files.in_loss("raise ValueError('no')"))
    with pytest.raises(AssertionError, match="WORSE: tiny"):
        testing.assert_no_regression(str(bad), **common)


def test_bad_input(distillbench, tmp_path):
    assert distillbench("gate", "cd", "--against", "cdd").err.startswith("distillbench: unknown method 'cdd'")
    assert "--margin" in distillbench("gate", "cd", "--margin", "wide").err
    assert distillbench("gate", "cd", "--seeds", "1").status == 2
    other = method_files.write(tmp_path / "tiny.py", ("steps=(1, 2)", "steps=(8,)"))
    assert "no step count" in distillbench("gate", str(other), "--against", "dmd2").err
