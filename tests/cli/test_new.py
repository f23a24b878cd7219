"""`distillbench new` writes a method that passes the kit and learns, and refuses what would only fail later."""

from __future__ import annotations

import pytest

import distillbench
from distillbench.conformance import check_method
from distillbench.discovery import find
from distillbench.info import Claim, Search
from distillbench.scaffold import method_text


def test_it_writes_a_method_and_says_what_comes_next(distillbench, tmp_path):
    made = distillbench("new", "my_method.py")
    assert (made.status, made.err) == (0, "")
    file = tmp_path / "my_method.py"
    assert [line.split()[:2] for line in made.out.splitlines()[1:]] == [["distillbench", word] for word in ("check", "run", "gate")]
    assert made.out.count(" my_method.py") == 4
    lines = file.read_text().splitlines()
    assert 50 <= len(lines) <= 75
    assert max(map(len, lines)) <= 140
    found = find(str(file))
    assert (found.info.id, found.class_name, found.info.title) == ("my_method", "MyMethod", "My method")
    assert found.info.claims == (Claim("one step beats one step of the teacher", "my_method", "teacher", "in-mode", steps=1),)
    assert found.info.tunes == (Search("lr", 1e-4, 1e-2, log=True),)


def test_what_it_writes_passes_every_check(tmp_path):
    file = tmp_path / "my_method.py"
    file.write_text(method_text(file, year=2026))
    results = list(check_method(str(file)))
    assert len(results) > 10
    assert [(result.name, result.detail) for result in results if not result.passed or result.skipped] == []


def test_what_it_writes_learns(tmp_path, few_samples):
    """On a twentieth of S one step is far beyond one step of the teacher, which its claim is about."""
    file = tmp_path / "my_method.py"
    file.write_text(method_text(file, year=2026))
    store = tmp_path / "store"
    record = distillbench.run(str(file), track="mixture2d", budget="2e5passes", store=store)
    student = {steps: next(s["value"] for s in scores if s["name"] == "in-mode") for steps, scores in record.scores.items()}
    assert student["1"] > 3 * TEACHER_AT_ONE_STEP
    assert student["1"] < student["2"] < student["4"]


TEACHER_AT_ONE_STEP = 0.1  # its in-mode rate, rounded up (leaderboards/mixture2d/table.md)


@pytest.mark.parametrize(
    ("path", "options", "class_name", "method_id"),
    [
        ("fast.py", (), "Fast", "fast"),
        ("a_DMD_variant.py", (), "ADMDVariant", "a_DMD_variant"),
        ("_hidden.py", (), "Hidden", "hidden"),
        ("cd.py", ("--id", "our-cd"), "Cd", "our-cd"),
        ("method.py", (), "MyMethod", "method"),  # a class Method would hide the contract's own
        ("stage.py", (), "MyStage", "stage"),
    ],
)
def test_names(distillbench, tmp_path, path, options, class_name, method_id):
    assert distillbench("new", path, *options).status == 0
    found = find(str(tmp_path / path))
    assert (found.class_name, found.info.id) == (class_name, method_id)
    assert found.load().info == found.info


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("my-method.py",), "is no name that Python can import"),
        (("2fast.py",), "is no name that Python can import"),
        (("class.py",), "is no name that Python can import"),
        (("__.py",), "is no name that Python can import"),
        (("größer.py",), "is no name that Python can import"),
        (("my_method",), "write distillbench new my_method.py"),
        (("my_method.txt",), "write distillbench new my_method.py"),
        (("cd.py",), "an installed method is called 'cd' already"),
        (("mine.py", "--id", "dmd2"), "an installed method is called 'dmd2' already"),
        (("teacher.py",), "'teacher' cannot be a method's id"),
        (("mine.py", "--id", "a b"), "'a b' cannot be a method's id"),
        (("mine.py", "--id", ""), "'' cannot be a method's id"),
        (("nowhere/mine.py",), "nowhere/mine.py cannot be written (No such file or directory)"),
    ],
)
def test_a_name_that_would_fail_later_is_one_line_now(distillbench, tmp_path, words, told):
    refused = distillbench("new", *words)
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert told in refused.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_left_alone(distillbench, tmp_path):
    (tmp_path / "mine.py").write_text("precious")
    refused = distillbench("new", "mine.py")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "mine.py exists and is left as it is" in refused.err
    assert (tmp_path / "mine.py").read_text() == "precious"
