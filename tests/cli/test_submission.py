"""A stranger's method from its records to a published row: submitted, shown as self-reported, rerun; and what a forger may try."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import method_files
from distillbench import agreement, cli, listing, records
from distillbench.agreement import prediction_interval
from distillbench.commands.submission import submit, verify
from distillbench.jobs import TEACHER, TRUTH, Job, resolve
from distillbench.leaderboard import FORMATS, render
from distillbench.listing import board_of
from distillbench.records import LatencyRecord
from distillbench.runner import execute
from distillbench.store import Store
from distillbench.tracks import mixture2d
from forgeries import BY_THE_FILE, BY_THE_METHOD, BY_THE_RERUN, BY_THE_TRACK, SEEDS, better, edit, elsewhere, no_latencies, scattered

BUDGET = "20000passes"
NAME = f"tiny-mixture2d-{BUDGET}.json"


@pytest.fixture(scope="module")
def small():
    """mixture2d on 512 samples, as `few_samples`, for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture2d, "PER_CLASS", 64)
        patch.setattr(mixture2d, "N", 64 * mixture2d.CLASSES)
        patch.setattr(mixture2d.Mixture2D, "evaluations", 64 * mixture2d.CLASSES)
        for cached in (mixture2d._metrics, mixture2d._teacher_samples):
            cached.cache_clear()
        floor = mixture2d.Mixture2D().floor()
        patch.setattr(mixture2d.Mixture2D, "floor", lambda self: floor)  # a pure function; every `verify` asks for it
        yield
    for cached in (mixture2d._metrics, mixture2d._teacher_samples):
        cached.cache_clear()


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """An author's folder: tiny.py, a store with three seeds of it, and what is published: the teacher and the truth."""
    folder = tmp_path_factory.mktemp("made")
    tiny = method_files.write(folder / "tiny.py")
    store, published = Store(folder / "store"), Store(folder / "leaderboards" / "mixture2d")
    for target, steps in ((TEACHER, (1, 2)), (TRUTH, (1,))):
        assert execute(Job(target, "mixture2d", steps=steps), published).ok
    for seed in range(SEEDS):
        record = execute(Job(str(tiny), "mixture2d", BUDGET, seed, (1, 2)), store)
        assert record.ok
    store.add(LatencyRecord.measured(track="mixture2d@1", subject=record.id, steps=1, batch=1, seconds=[0.001, 0.0011], threads=1,
                                     dtype="float32", device_class="cpu"))  # fmt: skip
    return folder


@pytest.fixture
def author(made, distillbench, monkeypatch, tmp_path):
    """author(words...) calls the command line in a copy of the author's folder, which is the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(listing, "published_store", lambda track: Store(tmp_path / "leaderboards" / "mixture2d", read_only=True))
    for command in (submit, verify):
        monkeypatch.setitem(cli.cli.commands, command.name, command)
    return distillbench


@pytest.fixture
def sent(author, tmp_path) -> Path:
    """A submission in its place among the published records."""
    folder = tmp_path / "leaderboards" / "mixture2d" / "submissions"
    assert author("submit", "tiny.py", "--budget", BUDGET, "--out", folder).status == 0
    return folder / NAME


@pytest.fixture
def known_rerun(author, monkeypatch):
    """A rerun gives what the author's run gave, as the honest tests show; here it is looked up to save the time."""
    monkeypatch.setattr("distillbench.runner.execute", lambda job, store, report: Store("store").get(resolve(job).record.id))


# ---------------------------------------------------------------------- the honest way


def test_an_honest_submission_loses_its_label_when_it_is_verified(author, sent, tmp_path):
    board = ("board", "mixture2d", "--published", "--store", "empty", "--format", "markdown")
    shown = author(*board)
    assert (shown.status, shown.err) == (0, "")
    assert "tiny (self-reported)" in shown.out
    assert "not rerun by anyone else yet" in shown.out

    status, out, err = author("verify", sent, "--method", "tiny.py", "--seed", 1)

    assert status == 0, err
    assert "seed 1 rerun, 14 scores agree, bit for bit" in out
    written = json.loads((sent.parent / NAME.replace(".json", ".verified.json")).read_text())
    assert (written["submission"], written["seed"]) == (json.loads(sent.read_text())["digest"], 1)
    assert all(score["reported"] == score["rerun"] for score in written["scores"])
    shown = author(*board)
    assert (shown.status, shown.err) == (0, "")
    assert "| tiny |" in shown.out
    assert "self-reported" not in shown.out


def test_the_label_stands_in_every_format_and_the_row_is_not_ranked(author, sent):
    board = board_of("mixture2d", Store("empty"), published=True)
    mine = [row for row in board.rows if row.method == "tiny"]
    assert [(row.label, row.rank, row.self_reported, len(row.seeds)) for row in mine] == [("tiny (self-reported)", None, True, SEEDS)] * 2
    for form in FORMATS:
        assert "self-reported" in render(board, form), form
    assert "no method was scored on in-mode under this budget" in render(board, "markdown")


def test_a_self_reported_row_takes_nothing_from_the_others(author, sent, tmp_path):
    """The same setting in the store: two rows, and the submission neither adds seeds or latencies nor marks or ranks."""
    edit(sent, better(0.3))
    own = execute(Job("tiny.py", "mixture2d", BUDGET, 0, (1, 2)), Store("own"))
    rows = {row.label: row for row in board_of("mixture2d", Store("own"), published=True).rows if row.method == "tiny" and row.steps == 1}
    assert rows["tiny"].seeds == (0,)
    assert rows["tiny"].rank == 1
    assert rows["tiny"].cells["in-mode"].by_seed == {0: own.scores["1"][0]["value"]}
    assert rows["tiny (self-reported)"].seeds == (0, 1, 2)
    assert (rows["tiny"].latency, list(rows["tiny (self-reported)"].latency)) == ({}, [1])


def test_an_authors_own_board_does_not_show_the_runs_twice(author, sent):
    shown = author("board", "mixture2d", "--published", "--format", "csv")
    assert "self-reported" not in shown.out
    assert "tiny" in shown.out


def test_another_kind_of_machine_agrees_within_the_noise(author, sent):
    edit(sent, elsewhere, better(0.002))
    status, out, err = author("verify", sent, "--method", "tiny.py", "--seed", 0)
    assert status == 0, err
    assert "within the noise" in out


def test_a_seed_is_drawn_and_a_rerun_can_be_kept(author, sent, tmp_path):
    assert author("verify", sent, "--method", "tiny.py", "--store", "kept").status == 0
    seed = json.loads(sent.with_name(NAME.replace(".json", ".verified.json")).read_text())["seed"]
    assert [record.seed for record in Store("kept").records()] == [seed]
    again = author("verify", sent, "--method", "tiny.py", "--store", "kept", "--seed", seed)
    assert (again.status, "name a fresh store" in again.err) == (2, True)


# ---------------------------------------------------------------------- forgeries


def test_a_forger_is_caught_by_a_training(author, sent):
    """The whole way: better scores, ids and digest made to fit, any seed drawn."""
    edit(sent, better(0.2))
    status, out, err = author("verify", sent, "--method", "tiny.py")
    assert (status, out) == (1, "")
    assert "in-mode at 1 step: reported" in err


@pytest.mark.parametrize(("edits", "renew", "told"), BY_THE_FILE.values(), ids=BY_THE_FILE.keys())
def test_a_file_that_disagrees_with_itself_is_refused_and_not_shown(author, sent, edits, renew, told):
    edit(sent, *edits, renew=renew)
    status, out, err = author("verify", sent, "--method", "tiny.py")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert told in err
    shown = author("board", "mixture2d", "--published", "--store", "empty", "--format", "csv")
    assert shown.status == 0
    assert NAME in shown.err
    assert told in shown.err
    assert "tiny" not in shown.out


@pytest.mark.parametrize(("change", "told"), BY_THE_TRACK.values(), ids=BY_THE_TRACK.keys())
def test_a_score_that_is_another_quantity_breaks_no_board(author, sent, change, told):
    edit(sent, change)
    for words in (("verify", sent, "--method", "tiny.py"), ("board", "mixture2d", "--published", "--store", "empty")):
        status, out, err = author(*words)
        assert (status, told in err) == (int(words[0] == "verify"), True)
        assert "tiny" not in out


@pytest.mark.parametrize(("change", "told"), BY_THE_METHOD.values(), ids=BY_THE_METHOD.keys())
def test_what_the_method_and_the_track_say_otherwise_is_refused_before_any_training(author, sent, monkeypatch, change, told):
    monkeypatch.setattr("distillbench.runner.execute", lambda *_: pytest.fail("trained"))
    edit(sent, change, no_latencies)
    status, out, err = author("verify", sent, "--method", "tiny.py")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert told in err


@pytest.mark.parametrize("edits", BY_THE_RERUN.values(), ids=BY_THE_RERUN.keys())
def test_a_forgery_that_agrees_with_itself_is_caught_by_the_rerun(author, sent, known_rerun, edits):
    edit(sent, *edits)
    assert "tiny (self-reported)" in author("board", "mixture2d", "--published", "--store", "empty", "--format", "csv").out
    status, out, err = author("verify", sent, "--method", "tiny.py", "--seed", 0)
    assert (status, out) == (1, "")
    assert "the rerun of seed 0 does not agree with it" in err
    assert "reported" in err.splitlines()[-1]
    assert "rerun" in err.splitlines()[-1]
    assert not list(sent.parent.glob("*.verified.json"))


def test_the_interval_alone_would_let_scattered_seeds_through(author, sent, known_rerun, monkeypatch):
    """What the bound on the seed's own value is for."""
    monkeypatch.setattr(agreement, "DEVIATIONS", 1e9)
    edit(sent, elsewhere, scattered)
    assert author("verify", sent, "--method", "tiny.py", "--seed", 0).status == 0


def test_the_interval_catches_seeds_that_were_forged_around_an_honest_one(author, sent, known_rerun):
    """The drawn seed is honest, bit for bit; the forged ones, close together, leave no room for it."""

    def tight(data: dict[str, Any]) -> None:
        for record in data["records"][1:]:
            for score in (score for scores in record["scores"].values() for score in scores if score["name"] == "in-mode"):
                score.update(value=0.95, low=0.94, high=0.96)

    edit(sent, tight)
    status, _, err = author("verify", sent, "--method", "tiny.py", "--seed", 0)
    assert (status, "by the other seeds one more lies in" in err) == (1, True)


def test_a_verification_of_another_content_takes_no_label_away(author, sent, known_rerun):
    assert author("verify", sent, "--method", "tiny.py", "--seed", 0).status == 0
    edit(sent, better(0.2))
    shown = author("board", "mixture2d", "--published", "--store", "empty", "--format", "csv")
    assert "verifies another content" in shown.err
    assert "tiny (self-reported)" in shown.out


def test_a_changed_method_file_is_another_method(author, sent, tmp_path):
    with (tmp_path / "tiny.py").open("a") as file:
        file.write("# changed\n")
    status, _, err = author("verify", sent, "--method", "tiny.py")
    assert (status, len(err.splitlines()), "was made with another text of tiny.py" in err) == (1, 1, True)


def test_a_submission_is_named_after_its_content(author, sent):
    sent.rename(sent.with_name("dmd2-mixture2d-S.json"))
    shown = author("board", "mixture2d", "--published", "--store", "empty", "--format", "csv")
    assert f"this one {NAME}" in shown.err
    assert "tiny" not in shown.out


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000, '{"format": NaN}', '{"a": 1, "a": 2}'])
def test_a_malformed_file_is_named_and_breaks_no_board(author, sent, content):
    sent.write_text(content)
    for words, status in ((("verify", sent, "--method", "tiny.py"), 1), (("board", "mixture2d", "--published", "--store", "empty"), 0)):
        found = author(*words)
        assert (found.status, len(found.err.splitlines())) == (status, 1)
        assert NAME in found.err


# ---------------------------------------------------------------------- bad input


def test_what_is_missing_is_said_with_the_command_that_makes_it(author, made):
    path = next(path for path in Path("store/records").iterdir() if json.loads(path.read_text())["seed"] == 1)
    path.unlink()
    status, out, err = author("submit", "tiny.py", "--budget", BUDGET)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "seed 1 not run" in err
    assert f"distillbench bench mixture2d --methods tiny.py --budget {BUDGET} --seeds 3 --store" in err
    nothing = author("submit", "tiny.py")
    assert "seed 0 not run, seed 1 not run, seed 2 not run" in nothing.err
    assert not Path("submissions").exists()


def test_a_student_that_was_changed_after_scoring_is_not_submitted(author):
    weights = next(path for path in sorted(Path("store/students").glob("*/*.safetensors")) if not path.name.startswith("preview"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    status, _, err = author("submit", "tiny.py", "--budget", BUDGET)
    assert (status, len(err.splitlines()), "has another checksum than its record" in err) == (2, 1, True)
    shutil.rmtree(weights.parent)
    assert "is not in the store any more" in author("submit", "tiny.py", "--budget", BUDGET).err


WRONG = {
    "built in": ("submit cd", "comes with distillbench"),
    "method": ("submit tin.py", "no file 'tin.py'"),
    "track": ("submit tiny.py --track mixture3d", "did you mean mixture2d"),
    "budget": ("submit tiny.py --budget XL", "write S, M, L"),
    "seconds": ("submit tiny.py --budget 60s", "use passes or steps"),
    "out": ("submit tiny.py --budget 20000passes --out tiny.py", "name another folder with --out"),
    "no file": ("verify nothing.json", "cannot read nothing.json"),
    "not installed": ("verify {sent}", "tiny is not installed; get tiny.py (in the pull request) and name it with --method"),
    "no such method file": ("verify {sent} --method tin.py", "no file 'tin.py'"),
    "no such seed": ("verify {sent} --method tiny.py --seed 7", "has seeds 0 to 2, not 7"),
    "seed text": ("verify {sent} --seed first", "'--seed'"),
}


@pytest.mark.parametrize(("words", "told"), WRONG.values(), ids=WRONG.keys())
def test_wrong_words(author, sent, words, told):
    status, out, err = author(*words.format(sent=sent).split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert told in err


def test_submit_says_what_to_do_next(author):
    status, out, err = author("submit", "tiny.py", "--budget", BUDGET, "--source", "https://example.org/ada/tiny.py")
    assert (status, err) == (0, "")
    assert f"submissions/{NAME}: 3 records, 1 latencies" in out
    assert "put it under leaderboards/mixture2d/submissions/ and open a pull request." in out
    assert json.loads(Path("submissions", NAME).read_text())["source"]["where"] == "https://example.org/ada/tiny.py"


def test_the_prediction_interval_holds_the_next_draw_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n in (3, 8):
        draws = rng.normal(5.0, 2.0, (4000, n + 1))
        inside = [(i := prediction_interval(list(row[:n]), 0.95)).low <= row[n] <= i.high for row in draws]
        assert np.mean(inside) == pytest.approx(0.95, abs=0.012)  # three and a half standard errors
    assert prediction_interval([1.0, 1.0, 1.0], least=0.1)[1:3] == pytest.approx((0.9, 1.1))


def test_the_kind_of_processor_is_read_without_anything_else(tmp_path):
    told = "processor\t: 0\nmodel name\t: A Processor\ncpu family\t: 25\nmodel\t\t: 1\ncpu MHz\t: 2649.9\n\nprocessor\t: 1\nmodel\t: 2\n"
    (tmp_path / "cpuinfo").write_text(told)
    assert records._processor(tmp_path / "cpuinfo") == "A Processor cpu family 25 model 1"
    assert records._processor(tmp_path / "missing") is None
