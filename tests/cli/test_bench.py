"""A plan is run: only what is missing, whatever its methods do to the workers, and on after Ctrl-C and kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import method_files
from distillbench import bench
from distillbench.jobs import Job
from distillbench.runner import execute
from distillbench.store import Store
from method_files import in_build, in_loss, in_student, named

# name -> what is wrong with it, and the reason in its row
IN_TRAINING = {
    "raises": (in_loss("raise RuntimeError('out of ideas')"), "RuntimeError: out of ideas (raises.py:"),
    "nan": (in_loss("return (self.student.velocity(x, t, conditions) * float('nan')).mean()"), "the loss of turn 'regress' is nan"),
    "endless": (in_loss("while batch.count == 1: pass"), "turn 'regress' did not finish within 1 s"),
    "dies": (in_loss("if batch.count == 1: os._exit(3)"), "the worker process died (exit status 3)"),
    "killed": (in_loss("os.kill(os.getpid(), 9)"), "the worker process died (signal SIGKILL; out of memory?)"),
    "hidden": (in_build("self.many = [context.teacher.copy()]"), "self.many is a plain list of modules; use ModuleList"),
    "refuses": (in_build("from distillbench.errors import UsageError\nraise UsageError('not with these knobs')"), "not with these knobs"),
}
IN_SCORING = {
    "dear": (
        in_student(
            "def generate(self, conditions, **options):\n"
            "    super().generate(conditions, **options)\n"
            "    return Samples(super().generate(conditions, **options).x, 1)"
        ),
        "the student says 1 evaluations at 1 steps and spends 2",
    ),
    "bent": (
        in_student("def generate(self, conditions, **options):\n    return Samples(torch.zeros(len(conditions), 3), 1)"),
        "the student returned samples of shape (512, 3) at 1 steps, not (512, 2)",
    ),
    "infinite": (
        in_student("def generate(self, conditions, **options):\n    return Samples(torch.full((len(conditions), 2), torch.inf), 1)"),
        "the student's samples at 1 steps are not finite",
    ),
    "halves": (
        in_student("def generate(self, conditions, **options):\n    return Samples(super().generate(conditions, **options).x, 1.5)"),
        "1.5",
    ),
    "fewer": (("for n in self.steps", "for n in self.steps if n > 1"), "this student was trained for"),
    "unsaved": (in_student("def save(self, folder):\n    raise OSError('no room')"), "OSError: no room (unsaved.py:"),
}


def write(folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    return method_files.write(folder / f"{name}.py", named(name), *changes)


def job(file: Path, budget: str = "3steps") -> Job:
    return Job(str(file), "mixture2d", budget=budget, steps=(1,))


@pytest.mark.slow
def test_whatever_a_method_does_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBENCH_TURN_LIMIT", "1")
    files = {name: write(tmp_path, name, change) for name, (change, _) in IN_TRAINING.items()}
    text = write(tmp_path, "text", ('needs=("labels",)', 'needs=("labels", "text")'))
    jobs = [job(file) for file in (*files.values(), text, write(tmp_path, "good"))]
    store = Store(tmp_path / "store")

    records = {record.method: record for record in bench.run_plan(jobs, store, 2, Console(stderr=True))}

    kinds = {name: record.status.partition(":")[0] for name, record in records.items()}
    assert kinds == {**dict.fromkeys(IN_TRAINING, "failed"), "text": "skipped", "good": "ok"}
    assert records["text"].status == "skipped: needs text"
    for name, (_, told) in IN_TRAINING.items():
        assert told in records[name].status
        assert "\n" not in records[name].status
    assert {record.method: record.status for record in store.records()} == {name: record.status for name, record in records.items()}
    assert store.problems == []
    assert {left.target for left in bench.still_missing(jobs, store)} == {str(file) for file in files.values()}


@pytest.mark.parametrize("name", IN_SCORING)
def test_a_student_that_breaks_its_word_is_a_failed_row(tmp_path, few_samples, name):
    change, told = IN_SCORING[name]
    store = Store(tmp_path / "store")
    record = execute(job(write(tmp_path, name, change)), store)
    assert record.status.startswith("failed: ")
    assert told in record.status
    assert store.get(record.id).status == record.status


def test_failed_runs_end_with_status_1(distillbench, few_samples, tmp_path):
    status, out, err = distillbench("run", write(tmp_path, "raises", IN_TRAINING["raises"][0]), "mixture2d", "--steps", "1")
    assert status == 1
    assert "failed: RuntimeError: out of ideas (raises.py:" in out
    assert "Traceback" not in err
    skipped = distillbench("run", write(tmp_path, "text", ('needs=("labels",)', 'needs=("text",)')), "mixture2d", "--steps", "1")
    assert (skipped.status, "skipped: needs text" in skipped.out) == (0, True)


def test_a_stopped_run_goes_on(distillbench, few_samples, tmp_path):
    stop = in_loss("if batch.count == 5 and os.environ.get('STOP'):\n    os.kill(os.getpid(), 2)")
    words = ("run", write(tmp_path, "tiny", stop), "mixture2d", "--steps", "1", "--budget", "10steps", "--store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOP", "1")
        status, out, err = distillbench(*words, "store")
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "distillbench: stopped; the state is kept, the same command goes on from here"
    assert "1 job left to do, 1 of them with a checkpoint in store/runs" in err
    assert Store("store").records() == []
    for folder in ("store", "whole"):
        assert distillbench(*words, folder).status == 0
    resumed, whole = (Store(folder).records()[0] for folder in ("store", "whole"))
    assert (resumed.checksums, resumed.scores) == (whole.checksums, whole.scores)
    assert resumed.spent["cycles"] == whole.spent["cycles"] == 10


def test_a_plan_is_data_and_runs_nothing(distillbench, few_samples, tmp_path):
    tiny = write(tmp_path, "tiny")
    words = ("bench", "mixture2d", "--methods", f"{tiny},dmd2", "--seeds", "2", "--budget", "3steps", "--plan")
    status, out, err = distillbench(*words)
    plan = json.loads(out)
    assert (status, err) == (0, "")
    assert [(entry["target"], entry["seed"], entry["steps"], entry["done"]) for entry in plan] == [
        ("teacher", 0, [1, 2, 4, 8, 50], False),
        ("truth", 0, [1], False),
        *[row for seed in (0, 1) for row in [(str(tiny), seed, [1, 2], False), *[("dmd2", seed, [n], False) for n in (1, 2, 4)]]],
    ]
    assert not (tmp_path / "store").exists()
    execute(Job(str(tiny), "mixture2d", budget="3steps", steps=(1, 2), seed=1), Store(tmp_path / "store"))
    assert [entry["seed"] for entry in json.loads(distillbench(*words).out) if entry["done"]] == [1]


def test_default_methods_are_installed():
    from distillbench.discovery import discover

    assert bench.default_methods("mixture2d") == list(discover())
    assert set(bench.default_methods("digits")) <= set(discover())


# ---------------------------------------------------------------------- whole benches, as people type them

SLOW = in_loss(
    "from pathlib import Path\nif 'SIGN' in os.environ:\n    Path(os.environ['SIGN']).touch()\n    time.sleep(0.02)",
)


class Bench:
    """`distillbench bench mixture2d` on one file in a process group of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sign = folder / "sign"
        write(folder, "tiny", ("steps=(1, 2)", "steps=(1,)"), SLOW)
        self.words = ["bench", "mixture2d", "--methods", "tiny.py", "--jobs", "1", "--store", "store", "--budget", "200steps"]

    def start(self) -> subprocess.Popen:
        self.sign.unlink(missing_ok=True)
        code = "from distillbench.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *self.words], cwd=self.folder, start_new_session=True, text=True,
            env={**os.environ, "SIGN": str(self.sign), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def await_training(self) -> None:
        wait_for(self.sign.exists)
        time.sleep(0.5)

    def finish(self) -> tuple[int, str, str]:
        process = self.start()
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err

    def store(self) -> Store:
        return Store(self.folder / "store")

    def runs(self):
        return [record for record in self.store().records() if record.kind == "run"]

    def checkpoints(self) -> list[Path]:
        return list((self.folder / "store" / "runs").glob("*/checkpoint.safetensors"))


def wait_for(done, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken bench, with what it said."""
    bench_ = Bench(tmp_path_factory.mktemp("whole"))
    return bench_, bench_.finish()


@pytest.mark.slow
def test_bench_prints_a_board_and_a_second_call_does_nothing(whole):
    first, (status, out, err) = whole
    assert status == 0, err
    assert all(name in out for name in ("tiny", "teacher", "truth", "latency"))
    assert "1 trainings x 200 steps on 1 worker" in err
    assert (first.folder / "store" / "mixture2d.png").stat().st_size > 10_000
    assert {record.method for record in first.store().records()} == {"tiny", "teacher", "truth"}
    timed = {(record.subject, record.steps) for record in first.store().latencies()}
    assert (first.runs()[0].id, 1) in timed  # a stranger's file too
    before = {path: path.stat().st_mtime_ns for path in (first.folder / "store").rglob("*.json")}
    status, again, err = first.finish()
    assert (status, again) == (0, out)
    assert err == "Nothing to run: all 3 jobs of this plan are in store.\n"
    assert {path: path.stat().st_mtime_ns for path in (first.folder / "store").rglob("*.json")} == before


@pytest.mark.slow
def test_a_stopped_and_a_killed_bench_go_on_and_end_with_the_same_student(whole, tmp_path):
    broken = Bench(tmp_path)
    shutil.copytree(whole[0].folder / "store", tmp_path / "store")
    (run,) = whole[0].runs()
    for left in ("students", "runs"):
        shutil.rmtree(tmp_path / "store" / left)
    (tmp_path / "store" / "records" / f"{run.id}.json").unlink()

    parent = broken.start()
    broken.await_training()
    parent.kill()  # the worker notices, saves its state and ends
    wait_for(broken.checkpoints)
    parent.communicate(timeout=60)
    assert broken.runs() == []
    saved = broken.checkpoints()[0].read_bytes()

    process = broken.start()
    broken.await_training()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "stopped; the state is kept, the same command goes on from here"
    assert "1 job left to do, 1 of them with a checkpoint in store/runs" in err
    assert "Traceback" not in err
    assert broken.checkpoints()[0].read_bytes() != saved
    assert broken.runs() == []

    status, _, err = broken.finish()
    assert status == 0, err
    (again,) = broken.runs()
    assert (again.id, again.checksums, again.scores) == (run.id, run.checksums, run.scores)
    assert (again.spent["macs"], again.spent["cycles"]) == (run.spent["macs"], run.spent["cycles"])
