"""Event files: what is in them, that a run is the same with and without, that a stopped run goes on in them; what is said at the end."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

import method_files
from distillbench import bench, logs
from distillbench.jobs import Job
from distillbench.store import Store

CYCLES = 40
RUN = ("mixture2d", "--steps", "1,2", "--budget", f"{CYCLES}steps")


@pytest.fixture
def tensorboard():
    """events(folder) -> {tag: [(x, value), ...]} as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def events(folder):
        (holder,) = folder.iterdir()
        read = accumulator.EventAccumulator(str(holder), size_guidance={"scalars": 0}).Reload()
        return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}

    return events


@pytest.fixture
def method(tmp_path):
    loss = method_files.in_loss("if str(batch.count) == os.environ.get('STOP'):\n    raise KeyboardInterrupt")
    terms = "return {'far off': loss, 'near': 0 * loss}"
    change = ("        return (self", "        loss = (self")
    ending = ("+ 0.01).square().mean()\n", f"+ 0.01).square().mean()\n        {terms}\n")
    return method_files.write(tmp_path / "tiny.py", loss, change, ending)


def only(store: str):
    (record,) = Store(store).records()
    return record


def test_what_is_written(distillbench, few_samples, tensorboard, method):
    status, _, err = distillbench("run", method, *RUN, "--log", "tensorboard")
    record = only("store")
    folder = logs.logs_folder(Store("store"), record.id)
    assert (status, [path.name for path in folder.iterdir()]) == (0, ["tiny_40steps_1,2-step_seed_0"])
    found = tensorboard(folder)
    spent = {f"spent/{word}" for word in ("seconds", "processor_seconds", "updates", "cycles", "images")}
    scores = {f"score/{score['name']}/{steps}-step" for steps, known in record.scores.items() for score in known}
    assert set(found) == {"loss/regress/far_off", "loss/regress/near", "progress", *spent, *scores}
    kept = json.loads((Store("store").student_folder(record.id) / "losses.json").read_text())
    assert found["loss/regress/far_off"] == [(round(point["passes"]), pytest.approx(point["far off"])) for point in kept]
    assert len(kept) == CYCLES
    assert [value for _, value in found["spent/cycles"]] == list(range(1, CYCLES + 1))
    assert found["progress"][-1] == (round(record.spent["passes"]), 1.0)
    for steps, known in record.scores.items():
        for score in known:
            assert found[f"score/{score['name']}/{steps}-step"] == [(round(record.spent["passes"]), pytest.approx(score["value"]))]
    assert f"Event files: {Store().folder}/logs; to see them: tensorboard --logdir {Store().folder}/logs" in err


def test_a_run_is_the_same_with_a_log_and_without(distillbench, few_samples, tensorboard, method):
    for store, log in (("with", ("--log", "tensorboard")), ("without", ())):
        assert distillbench("run", method, *RUN, "--store", store, *log).status == 0
    one, other = only("with"), only("without")
    times = ("seconds", "processor_seconds", "peak_memory_mb")
    same = {"created": "", "spent": {}, "environment": {}}
    assert replace(one, **same) == replace(other, **same)
    assert {k: v for k, v in one.spent.items() if k not in times} == {k: v for k, v in other.spent.items() if k not in times}
    assert one.spent.keys() == other.spent.keys()
    assert not logs.logs_folder(Store("without")).exists()


def test_a_stopped_and_a_killed_run_go_on_without_a_step_twice(distillbench, few_samples, tensorboard, method, monkeypatch):
    """Stopped with its state kept; then torn down after more was logged than is kept; then afresh, with no state at all."""
    command = ("run", method, *RUN, "--log", "tensorboard")
    distillbench(*command, "--store", "whole")
    whole = tensorboard(logs.logs_folder(Store("whole"), only("whole").id))
    folder = logs.logs_folder(Store("store"), only("whole").id)
    checkpoint = Store("store").run_folder(only("whole").id) / "checkpoint.safetensors"

    def broken_off(at: int) -> dict:
        with monkeypatch.context() as patch:
            patch.setenv("STOP", str(at))
            assert distillbench(*command).status == 130
        return tensorboard(folder)

    from distillbench.training import loop

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_between", keeping(loop.Loop._between, 12))
        assert len(broken_off(20)["spent/cycles"]) == 20
    assert checkpoint.exists()
    assert len(broken_off(30)["spent/cycles"]) == 30  # of which 13 to 20 were logged twice
    checkpoint.unlink()
    assert [value for _, value in broken_off(5)["spent/cycles"]] == [1, 2, 3, 4, 5]
    assert distillbench(*command).status == 0
    again = tensorboard(folder)
    assert len(list(folder.glob("*/*"))) == 1
    assert again.keys() == whole.keys()
    for tag, points in again.items():
        assert all(a[0] < b[0] for a, b in pairwise(points)), tag
        assert [x for x, _ in points] == [x for x, _ in whole[tag]], tag
        if "seconds" not in tag:
            assert points == whole[tag], tag


def keeping(between, at: int):
    """`Loop._between` that saves at one cycle."""

    def kept(self, stage, guard):
        if self.spent.cycles == at:
            self._save()
        between(self, stage, guard)

    return kept


@pytest.mark.slow
def test_worker_processes_log_and_runs_that_are_known_get_a_file_too(few_samples, tensorboard, method, tmp_path):
    store = Store(tmp_path / "store")
    jobs = [Job(str(method), "mixture2d", budget=f"{CYCLES}steps", steps=(1,), seed=seed) for seed in (0, 1)]
    first = bench.run_plan(jobs[:1], store, 1, Console(stderr=True))
    assert not logs.logs_folder(store).exists()
    second = bench.run_plan(jobs, store, 2, Console(stderr=True), log="tensorboard")
    early, late = (tensorboard(logs.logs_folder(store, record.id)) for record in (*first, *second))
    assert early.keys() == late.keys()
    assert len(early["loss/regress/near"]) == len(late["loss/regress/near"]) == CYCLES
    assert (len(early["spent/cycles"]), len(late["spent/cycles"])) == (1, CYCLES)
    before = [path.stat().st_mtime_ns for path in logs.logs_folder(store).rglob("events*")]
    bench.run_plan(jobs, store, 2, Console(stderr=True), log="tensorboard")
    assert [path.stat().st_mtime_ns for path in logs.logs_folder(store).rglob("events*")] == before


def test_a_log_that_cannot_be_written_costs_the_run_nothing(distillbench, few_samples, method):
    pytest.importorskip("tensorboard")
    Store("store").folder.mkdir()
    logs.logs_folder(Store("store")).write_text("in the way")
    assert distillbench("run", method, *RUN, "--log", "tensorboard").status == 0
    assert only("store").ok


@pytest.mark.parametrize("words", [("run", "cd", "mixture2d"), ("bench", "mixture2d")])
def test_wrong_log_is_one_line(distillbench, words, monkeypatch):
    status, out, err = distillbench(*words, "--log", "tensorbord")
    assert (status, out, err) == (2, "", "distillbench: unknown log 'tensorbord': did you mean tensorboard? (known: tensorboard)\n")
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else known(name, *more))
    status, out, err = distillbench(*words, "--log", "tensorboard")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "pip install distillbench[tensorboard]" in err


# ---------------------------------------------------------------------- what is said at the end


def test_after_success_and_failure_it_is_said_where_things_are(distillbench, few_samples, tmp_path):
    good = method_files.write(tmp_path / "good.py")
    status, _, err = distillbench("run", good, *RUN)
    record = only("store")
    store = Store().folder
    assert status == 0
    assert err.splitlines()[-4:] == [
        f"1 record written to {store}/records (1 ok)",
        f"It in full: distillbench show {record.id[:8]}",
        f"Students with samples and loss curves: {store}/students",
        "The board: distillbench board mixture2d",
    ]
    assert distillbench("show", record.id[:8]).status == 0
    assert distillbench("run", good, *RUN).err.splitlines()[1:] == []  # nothing new: only the display's line

    bad = method_files.write(tmp_path / "bad.py", method_files.in_loss("raise RuntimeError('no')"))
    status, _, err = distillbench("run", bad, *RUN, "--store", "other place")
    assert status == 1
    assert "1 record written to other place/records (1 failed)" in err
    assert "The same command tries again what failed; with DISTILLBENCH_DEBUG=1 it prints the traceback." in err
    assert err.splitlines()[-1] == "The board: distillbench board mixture2d --store 'other place'"
    assert "students" not in err


def test_after_ctrl_c_it_is_said_what_is_kept(distillbench, few_samples, method, monkeypatch):
    monkeypatch.setenv("STOP", "20")
    pytest.importorskip("tensorboard")
    status, out, err = distillbench("run", method, *RUN, "--log", "tensorboard")
    store = Store().folder
    assert (status, out) == (130, "")
    assert [line for line in err.splitlines() if line][-5:] == [
        "No record was written.",
        f"1 job left to do, 0 of them with a checkpoint in {store}/runs",
        f"Event files: {store}/logs; to see them: tensorboard --logdir {store}/logs",
        "The board: distillbench board mixture2d",
        "stopped; the state is kept, the same command goes on from here",
    ]
