"""The commands and their options, which others rely on by name, and what they print."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest

import distillbench as package
import method_files
from distillbench.cli import cli
from distillbench.records import RunRecord
from distillbench.store import Store

COMMANDS = {
    "list": {"what", "--json"},
    "run": {"method", "track", "--budget", "--seed", "--steps", "--set", "--teacher", "--data", "--device", "--store", "--resume", "--log"},
    "bench": {"track", "--methods", "--budget", "--seeds", "--teacher", "--data", "--device", "--jobs", "--store", "--plan", "--log"},
    "board": {"track", "--store", "--published", "--format"},
    "show": {"run_id", "--store"},
    "zoo": set(),
    "check": {"target"},
    "doctor": {"track", "--teacher", "--data"},
    "demo": {"--out"},
    "claims": {"method", "--track", "--seeds", "--published", "--jobs", "--log", "--store"},
    "gate": {"target", "--against", "--track", "--budget", "--seeds", "--margin", "--jobs", "--log", "--store"},
    "tune": {"method", "track", "--out", "--jobs", "--log", "--store"},
    "latency": {
        "track",
        "--pipeline",
        "--revision",
        "--lora",
        "--guidance",
        "--steps",
        "--batch",
        "--compile",
        "--rounds",
        "--threads",
        "--device",
        "--format",
        "--teacher",
        "--data",
        "--store",
    },
    "new": {"path", "--id"},
    "score": {
        "--pipeline",
        "--track",
        "--revision",
        "--lora",
        "--steps",
        "--guidance",
        "--scheduler",
        "--images",
        "--reference",
        "--captions",
        "--n",
        "--resize",
        "--metrics",
        "--weights",
        "--data",
        "--device",
        "--format",
        "--store",
    },
    "report": {"--store", "--published", "--out"},
    "submit": {"method", "--track", "--budget", "--source", "--store", "--out"},
    "verify": {"file", "--method", "--seed", "--store"},
}


def options_of(command) -> set[str]:
    return {param.opts[0] for param in command.params}


@pytest.fixture
def tiny(tmp_path):
    return method_files.write(tmp_path / "tiny.py")


def test_commands_and_options_are_these():
    assert {name: options_of(command) for name, command in cli.commands.items()} == COMMANDS
    assert set(cli.commands["zoo"].commands) == {"list", "train"}
    defaults = {param.opts[0]: param.default for name in ("run", "bench") for param in cli.commands[name].params}
    assert (defaults["--budget"], defaults["--seed"], defaults["--steps"], defaults["--resume"]) == ("S", 0, None, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(distillbench, name):
    status, out, err = distillbench(name, "--help")
    assert (status, err) == (0, "")
    assert all(option in out for option in COMMANDS[name] if option.startswith("--"))


def test_list_methods_json(distillbench):
    status, out, _ = distillbench("list", "methods", "--json")
    rows = {row["id"]: row for row in json.loads(out)}
    assert status == 0
    assert {"cd", "dmd2"} <= set(rows)
    assert all({"id", "family", "domain", "needs"} <= set(row) for row in rows.values())
    assert rows["dmd2"]["domain"] == ["diffusion"]
    assert "taps" in rows["dmd2"]["needs"]


def test_lists_for_people(distillbench):
    for what, expected in [("methods", "dmd2"), ("tracks", "mixture2d@1"), ("metrics", "in-mode")]:
        status, out, err = distillbench("list", what)
        assert (status, err) == (0, "")
        assert expected in out
    assert distillbench("list").out == distillbench("list", "methods").out


def test_metrics_of_every_track_are_explained(distillbench):
    rows = json.loads(distillbench("list", "metrics", "--json").out)
    assert {"mixture2d@1", "digits@1"} <= {row["track"] for row in rows}
    assert [row["name"] for row in rows if not row["meaning"]] == []


@pytest.mark.parametrize("words", ["list", "list tracks --json", "list metrics", "zoo list", "board mixture2d", "bench --help"])
def test_looking_around_imports_no_torch(words, tmp_path):
    code = (
        f"import sys; from distillbench.cli import cli; cli.main({words.split()!r}, standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_run_prints_and_keeps_a_record(distillbench, few_samples, tiny, tmp_path):
    status, out, err = distillbench("run", tiny, "mixture2d", "--budget", "3steps", "--steps", "1,2", "--set", "lr=0.01")
    (record,) = Store(tmp_path / "store").records()
    assert status == 0
    assert "tiny(lr=0.01) on mixture2d@1, seed 0, budget 3steps: ok" in out
    assert "in-mode" in out
    assert "Traceback" not in err
    assert (record.label, record.config["lr"], record.steps, record.spent["cycles"]) == ("tiny(lr=0.01)", 0.01, [1, 2], 3)
    assert record.source_sha256

    shown = distillbench("show", record.id[:6])
    assert shown.status == 0
    assert record.id in shown.out

    board = distillbench("board", "mixture2d", "--format", "json")
    rows = json.loads(board.out)
    assert [(row["method"], row["steps"], row["evaluations"], row["status"], row["seeds"]) for row in rows] == [
        ("tiny(lr=0.01)", 1, 1, "ok", 1),
        ("tiny(lr=0.01)", 2, 2, "ok", 1),
    ]
    assert rows[0]["passes"] == record.spent["passes"]
    assert rows[0]["seconds"] > 0
    assert all({"value", "low", "high", "n"} <= set(score) for score in rows[0]["scores"].values())
    assert {score["n"] for score in rows[0]["scores"].values()} == {512}

    assert "tiny(lr=0.01)" in distillbench("board", "mixture2d").out
    assert len(list(csv.DictReader(io.StringIO(distillbench("board", "mixture2d@1", "--format", "csv").out)))) == 2
    assert "\\toprule" in distillbench("board", "mixture2d", "--format", "latex").out
    assert "| tiny(lr=0.01) |" in distillbench("board", "mixture2d", "--format", "markdown").out


def test_run_again_trains_nothing_and_python_mirrors_the_command_line(distillbench, few_samples, tiny, tmp_path):
    distillbench("run", tiny, "mixture2d", "--budget", "3steps", "--steps", "1", "--set", "times=1,0.3", "--seed", "3")
    (first,) = Store(tmp_path / "store").records()
    again = package.run(str(tiny), track="mixture2d", budget="3steps", steps=(1,), settings={"times": (1, 0.3)}, seed=3)
    assert isinstance(again, RunRecord)
    assert again == first  # its seconds too: it was not trained again
    elsewhere = package.run(f"{tiny}:Tiny", track="mixture2d@1", budget="3steps", steps=[1], settings={"times": "1,0.3"}, seed=3,
                            store=tmp_path / "other")  # fmt: skip
    assert (elsewhere.id, elsewhere.scores, elsewhere.checksums) == (first.id, first.scores, first.checksums)


def test_python_takes_a_class(few_samples, tiny, tmp_path):
    from distillbench.discovery import find

    record = package.run(find(tiny).load(), track="mixture2d", budget="2steps", steps=(1,), store=tmp_path / "store")
    assert record.status == "ok"
    assert record.id == package.run(str(tiny), track="mixture2d", budget="2steps", steps=(1,), store=tmp_path / "store").id


def test_a_student_per_step_count_is_trained_once_for_each(distillbench, few_samples, tmp_path):
    file = method_files.write(tmp_path / "apart.py", ("steps=(1, 2),", 'steps=(1, 2), trains="a student per step count",'))
    record = package.run(str(file), track="mixture2d", budget="3steps", steps=(1, 2), store=tmp_path / "store")
    kept = Store(tmp_path / "store").records()
    assert sorted(r.trained_for for r in kept) == [[1], [2]]
    assert (record.steps, record.trained_for, sorted(record.scores), record.evaluations) == ([1, 2], [1, 2], ["1", "2"], {"1": 1, "2": 2})
    assert record.spent["passes"] == sum(r.spent["passes"] for r in kept)
    assert len(record.checksums) == 2
    status, out, _ = distillbench("run", file, "mixture2d", "--budget", "3steps", "--steps", "1,2")
    assert status == 0
    assert "trained for 1, 2 steps" in out


def test_no_resume_starts_afresh(distillbench, few_samples, tmp_path):
    file = method_files.write(tmp_path / "tiny.py", method_files.in_loss("if os.environ.get('BREAK') and batch.count == 2: raise OSError"))
    arguments = ("run", file, "mixture2d", "--budget", "3steps", "--steps", "1")
    assert distillbench(*arguments).status == 0
    (record,) = Store(tmp_path / "store").records()
    checkpoint = tmp_path / "store" / "runs" / record.id / "checkpoint.safetensors"
    (tmp_path / "store" / "records" / f"{record.id}.json").unlink()
    assert checkpoint.exists()
    assert distillbench(*arguments, "--no-resume").status == 0
    assert checkpoint.with_name("checkpoint.safetensors.bad-1").exists()
    assert Store(tmp_path / "store").records()[0].checksums == record.checksums


def test_zoo_and_doctor(distillbench):
    assert "mixture2d" in distillbench("zoo", "list").out
    assert distillbench("zoo").out == distillbench("zoo", "list").out
    status, out, err = distillbench("doctor")
    assert status == (1 if " broken  " in out else 0)
    assert err == ""
    assert [line for line in out.splitlines() if "zoo mixture2d" in line and "checksum holds" in line]
    assert all(word in out for word in ("python:", "torch:", "store:", "methods: cd"))


def test_demo_shows_published_records_or_says_that_there_are_none(distillbench, tmp_path):
    from distillbench.published import published_store

    status, out, err = distillbench("demo", "--out", tmp_path / "demo.png")
    if published_store("mixture2d").records():
        assert status == 0
        assert "mixture2d@1" in out
        assert (tmp_path / "demo.png").exists()
    else:
        assert (status, out, len(err.splitlines())) == (2, "", 1)


def test_version_and_no_arguments(distillbench):
    assert distillbench("--version").out == f"distillbench, version {package.__version__}\n"
    status, out, err = distillbench()
    assert status == 2
    assert "Commands:" in err + out


def test_a_reason_with_brackets_is_printed_as_it_is(distillbench, few_samples, tmp_path):
    file = method_files.write(tmp_path / "tiny.py", method_files.in_loss("raise KeyError('[/x] and [red]')"))
    status, out, err = distillbench("run", file, "mixture2d", "--steps", "1")
    assert (status, "KeyError: '[/x] and [red]' (tiny.py:" in out) == (1, True)
    assert "Traceback" not in err
