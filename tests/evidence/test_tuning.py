"""The tuning protocol: which trials, what is kept, and that nothing of it meets a board."""

from __future__ import annotations

import dataclasses
import math
import tomllib

import pytest
import torch
from rich.console import Console

import method_files
from distillbench import tuning
from distillbench.config import load_recipe
from distillbench.discovery import discover, find
from distillbench.errors import UsageError
from distillbench.info import MOST_SEARCHED, Search
from distillbench.store import Store
from distillbench.tracks import get_track
from distillbench.tracks.facts import FACTS, VALIDATION, facts_of

BUDGET = 3000.0  # teacher passes of a trial in these tests


@pytest.fixture
def tuned(tmp_path):
    """A small method with a knob to tune."""
    return method_files.write(tmp_path / "tiny.py", ('steps=(1, 2),', 'steps=(1, 2), tunes=(Search("lr", 1e-5, 0.9, log=True),),'),
                              ("import Ema,", "import Ema, Search,"))  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """S/4 made small, and trials run in this process, which alone knows of it."""
    from distillbench.runner import execute

    name = "mixture2d-validation"
    monkeypatch.setitem(VALIDATION, name, dataclasses.replace(VALIDATION[name], budgets={"S/4": BUDGET}))
    done = []

    def here(jobs, store, workers, console, log):
        done.extend(record for record in (execute(job, store) for job in jobs))
        return done

    monkeypatch.setattr(tuning, "run_plan", here)
    return done


def study(tuned, tmp_path):
    return tuning.run_trials(str(tuned), "mixture2d", Store(tmp_path / "store"), 1, Console(quiet=True))


@pytest.mark.parametrize("name", sorted(discover()))
def test_every_method_declares_what_is_tuned(name):
    found = find(name)
    tried = tuning.points(found, found.load().Config)
    assert 1 <= len(found.info.tunes) <= MOST_SEARCHED
    assert len(tried) == tuning.TRIALS
    assert tried[0] == {}, "the first trial is the paper's"
    for values in tried[1:]:
        assert set(values) == {search.knob for search in found.info.tunes}
        found.load().Config(**values)
    assert tried == tuning.points(found, found.load().Config), "the same trials for everyone"


def test_trials_fill_the_ranges():
    found = find("cd")
    lr = sorted(values["lr"] for values in tuning.points(found, found.load().Config)[1:])
    search = next(search for search in found.info.tunes if search.knob == "lr")
    assert search.low <= lr[0]
    assert lr[-1] <= search.high
    thirds = [math.log(value / search.low) / math.log(search.high / search.low) * 3 for value in lr]
    assert {int(third) for third in thirds} == {0, 1, 2}


def test_a_search_says_where():
    for wrong in (
        {},
        {"low": 1.0},
        {"low": 2.0, "high": 1.0},
        {"low": 0.0, "high": 1.0, "log": True},
        {"low": 0.0, "high": 1.0, "choices": (1,)},
    ):
        with pytest.raises(ValueError):
            Search("lr", **wrong)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_validation_is_the_track_with_other_noise_and_another_reference(name):
    if FACTS[name].extra:
        pytest.importorskip("diffusers")
    track, other = get_track(name), get_track(f"{name}-validation")
    conditions, seeds = track.evaluation()
    theirs, others = other.evaluation()
    if "label" in conditions:
        assert torch.equal(conditions.field("label"), theirs.field("label"))
    else:
        assert not set(conditions.field("prompt")) & set(theirs.field("prompt"))
    assert not set(seeds) & set(others)
    assert other.facts.budgets == {"S/4": track.facts.budgets["S"] / 4}
    x = track.truth()
    own = next(score for score in track.score(x) if score.name == track.facts.tuned_on)
    held = other.score(x)
    assert [score.name for score in held] == [track.facts.tuned_on]
    assert held[0].key != own.key
    assert held[0].value != own.value
    share = 0.05 if "label" in conditions else 0.1  # the autoencoder of shapes-sd alone makes a twentieth
    assert held[0].value < share * next(s.value for s in other.score(torch.zeros_like(x)) if s.name == own.name)
    assert other.facts.id not in {facts.id for facts in FACTS.values()}


def test_all_trials_are_run_and_the_best_is_kept(tuned, tmp_path, small):
    found = study(tuned, tmp_path)
    assert len(found.trials) == tuning.TRIALS
    assert {record.seed for record in small} == {tuning.SEED}
    assert all(record.ok and record.spent["passes"] >= BUDGET for record in small)
    assert found.best.score == min(trial.score for trial in found.trials)
    path = tuning.write_recipe(found)
    assert path == tuned.parent / "recipes" / "mixture2d.toml"
    recipe = load_recipe(tuned.parent, "mixture2d", "tiny")
    assert recipe.values == found.best.values
    assert (recipe.trials, recipe.passes) == (tuning.TRIALS, round(sum(record.spent["passes"] for record in small)))
    kept = tomllib.loads(path.read_text())["tiny"]["tuning"]["trial"]
    assert [trial["score"] for trial in kept] == [pytest.approx(trial.score, rel=1e-3) for trial in found.trials]


def test_a_second_call_runs_nothing_and_boards_see_nothing(tuned, tmp_path, small):
    first = study(tuned, tmp_path)
    before = len(list((tmp_path / "store/tuning/records").iterdir()))
    assert study(tuned, tmp_path) == first
    assert len(list((tmp_path / "store/tuning/records").iterdir())) == before == tuning.TRIALS
    assert Store(tmp_path / "store").records() == []


def test_a_trial_that_fails_loses(tmp_path, small):
    bad = method_files.write(
        tmp_path / "tiny.py", ('steps=(1, 2),', 'steps=(1, 2), tunes=(Search("lr", 1e-5, 0.9, log=True),),'),
        ("import Ema,", "import Ema, Search,"), ("# LOSS", "if self.config.lr > 1e-3: return x.sum() * float('nan')"),
    )  # fmt: skip
    found = study(bad, tmp_path)
    assert any(math.isinf(trial.score) and "nan" in trial.note for trial in found.trials)
    assert math.isfinite(found.best.score)
    assert found.best.values["lr"] <= 1e-3 if found.best.values else True


def test_other_sections_stay(tuned, tmp_path, small):
    recipes = tuned.parent / "recipes"
    recipes.mkdir()
    (recipes / "mixture2d.toml").write_text("[other.values]\nlr = 0.5\n[other.tuning]\ntrials = 3\npasses = 7.0\n")
    tuning.write_recipe(study(tuned, tmp_path))
    assert load_recipe(tuned.parent, "mixture2d", "other").values == {"lr": 0.5}


def test_bad_input(tmp_path, distillbench):
    plain = method_files.write(tmp_path / "tiny.py")
    status, _, err = distillbench("tune", str(plain), "mixture2d")
    assert (status, err) == (2, "distillbench: tiny declares no knobs to tune; add tunes=(Search(...),) to its info\n")
    wrong = method_files.write(tmp_path / "wrong.py", ('steps=(1, 2),', 'steps=(1, 2), tunes=(Search("rate", 1e-5, 0.9),),'),
                               ("import Ema,", "import Ema, Search,"))  # fmt: skip
    assert "no knob of its Config" in distillbench("tune", str(wrong), "mixture2d").err
    assert "name the track itself" in distillbench("tune", "cd", "mixture2d-validation").err
    four = "tunes=(" + "".join(f'Search("k{i}", 1.0, 2.0),' for i in range(4)) + "),"
    many = method_files.write(tmp_path / "many.py", ("steps=(1, 2),", f"steps=(1, 2), {four}"), ("import Ema,", "import Ema, Search,"))
    assert "the protocol allows 3" in distillbench("tune", str(many), "mixture2d").err
    assert facts_of("mixture2d").tuned_on == "sliced-w2"


def test_nothing_is_written_if_every_trial_failed(tmp_path, small):
    study_ = tuning.Study("tiny", 1, facts_of("mixture2d"), tmp_path / "tiny.py", (tuning.Trial({}, math.inf, 0.0, "failed: why"),))
    with pytest.raises(UsageError, match="every trial"):
        tuning.write_recipe(study_)
    assert not (tmp_path / "recipes").exists()
