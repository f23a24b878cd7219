"""Latency by stages: stages that sum to the whole, exact counts, batches, compilation, records old and new, and what a board says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import distillbench.latency_stages as measuring
from distillbench.errors import BadFileError, UsageError
from distillbench.latency_stages import (
    Timed,
    inputs,
    largest_batch,
    marks,
    measure_stages,
    multiply_adds,
    timed_pipeline,
    timed_student,
    timed_teacher,
)
from distillbench.latency_subjects import parse_batches, subjects_of
from distillbench.leaderboard import render
from distillbench.leaderboard.board import Board
from distillbench.leaderboard.stages import flops
from distillbench.parts.student import FewStepStudent
from distillbench.records import LatencyRecord, digest
from distillbench.scoring import open_released
from distillbench.store import Store
from distillbench.teachers.diffusers import open_pipeline
from distillbench.tracks.facts import FACTS
from distillbench.tracks.text_to_image import PipelineTrack
from distillbench.training.costs import count
from toy_pipelines import toy_ddpm, toy_sd

SHAPES = FACTS["shapes-sd"].id


class ToyTrack(PipelineTrack):
    """A track around a toy pipeline, at most two images on a processor."""

    facts = replace(FACTS["shapes-sd"], latency_batch=2)
    reference_steps, guidance, batch_size, evaluations = (1, 2), 2.0, 2, 8

    def __init__(self, opened):
        self._opened, self.shape = opened, opened.shape

    def opened(self):
        return self._opened

    def prompts(self):
        return ["a red", "two"]

    def reference_images(self):
        return torch.zeros(8, 3, *self._opened.image_size, dtype=torch.uint8)

    def source(self):
        raise NotImplementedError

    def floor(self):
        return []

    def truth(self):
        return torch.zeros(8, *self.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_sd(tmp_path_factory.mktemp("pipeline") / "toy")


@pytest.fixture(scope="module")
def track(folder):
    return ToyTrack(open_pipeline(folder))


@pytest.fixture(scope="module")
def student(track):
    return FewStepStudent(track.teacher().copy(), {1: (1.0,)}, track.shape)


@pytest.fixture(scope="module")
def records(track, student):
    subjects = [timed_teacher(track, 1), timed_teacher(track, 2), timed_student(track, student, 1, subject="a" * 16, label="cd")]
    return measure_stages(track, subjects, batches=(1, None), rounds=2)


def test_every_subject_has_a_record_at_every_batch_and_it_can_be_read_back(records, track):
    assert [(r.subject, r.steps, r.batch) for r in records] == [
        (subject, steps, batch) for batch in (1, 2) for subject, steps in (("teacher", 1), ("teacher", 2), ("a" * 16, 1))
    ]
    for record in records:
        assert LatencyRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
        assert list(record.stages["seconds"]) == ["text encoder", "denoiser", "decode"]
        assert record.stages["peak_memory_mb"] > 1
        assert [sum(parts) for parts in zip(*record.stages["seconds"].values(), strict=True)] == pytest.approx(record.seconds)
    assert [r.stages["evaluations"] for r in records[:3]] == [2, 4, 1]  # guidance counts double
    assert [r.reference_steps for r in records[:3]] == [2, None, 2]
    assert records[1].ratio is None
    assert records[2].ratio["value"] > 0


def test_stages_are_marked_where_they_end(track):
    """With a clock that counts its readings and stages that take readings, each stage gets its own seconds."""
    now = [0.0]

    def clock():
        return now[0]

    def spending(seconds, result):
        def call(*_, **__):
            now[0] += seconds
            return result

        return call

    timed = timed_teacher(track, 1)
    encoded, drawn = timed.encode(["two"]), timed.draw(timed.encode(["two"]), [1])
    fake = Timed("teacher", "teacher", 1, track.opened(), spending(20.0, drawn), ())
    object.__setattr__(fake, "encode", spending(3.0, encoded))
    spent, samples, images = marks(fake, ["two"], [1], clock)
    assert spent == [3.0, 20.0, 0.0]
    assert samples is drawn
    assert images.shape == (1, 3, 16, 16)


def test_a_call_makes_what_the_track_makes(track, student):
    prompts, seeds = inputs(track, 3)
    assert prompts == ["a red", "two", "a red"]
    assert seeds == [track.first_seed + i for i in range(3)]
    conditions = track.opened().conditions(prompts)
    _, samples, images = marks(timed_teacher(track, 2), prompts, seeds, lambda: 0.0)
    assert torch.allclose(samples.x, track.sample_teacher(conditions, seeds, 2).x, atol=1e-5)
    assert torch.allclose(images, track.decode(samples.x), atol=1e-5)
    _, samples, _ = marks(timed_student(track, student, 1, subject="a" * 16, label="cd"), prompts, seeds, lambda: 0.0)
    assert torch.allclose(samples.x, student.generate(conditions, steps=1, seeds=seeds).x, atol=1e-5)


def test_multiply_adds_are_those_of_the_network_and_grow_with_steps(track):
    one, evaluations = multiply_adds(timed_teacher(track, 1), *inputs(track, 1))
    two, _ = multiply_adds(timed_teacher(track, 2), *inputs(track, 1))
    assert evaluations == 2
    assert two["denoiser"]["matmul"] == 2 * one["denoiser"]["matmul"]
    assert two["decode"] == one["decode"]
    conditions, x = track.opened().conditions(["two"]), torch.zeros(1, *track.shape)
    with torch.no_grad():
        alone = count(lambda: track.teacher().predict(x, 0.5, conditions)).matmul
    assert one["denoiser"]["matmul"] == 2 * alone  # guidance


def test_a_pipeline_without_text_has_two_stages(tmp_path):
    opened = open_pipeline(toy_ddpm(tmp_path / "ddpm"))
    track = ToyTrack(opened)
    (record,) = measure_stages(track, [timed_pipeline(opened, 1, subject="b" * 16, label="ddpm")], batches=(1,), rounds=1)
    assert list(record.stages["seconds"]) == ["denoiser", "decode"]
    assert record.ratio is None


@pytest.mark.parametrize(("room", "most", "found"), [(5, 64, 4), (64, 64, 64), (100, 48, 48), (1, 64, 1)])
def test_the_largest_batch_is_doubled_until_memory_ends(room, most, found):
    tried = []

    def run(batch):
        tried.append(batch)
        if batch > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_batch(run, most) == found
    assert max(tried) <= most


def test_no_room_at_all_is_one_line_and_other_errors_pass():
    def full(_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    def wrong(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(UsageError, match="not even one image fits"):
        largest_batch(full, 8)
    with pytest.raises(RuntimeError, match="shapes"):
        largest_batch(wrong, 8)


def test_compilation_is_reported_apart_and_undone(track, monkeypatch):
    """A stand-in for the compiler: the real one takes half a minute."""
    seen = []

    def compile_(module, **options):
        seen.append(type(module).__name__)
        module._compiled_call_impl = module._call_impl

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    plain, quick = measure_stages(track, [timed_teacher(track, 1)], batches=(1,), compilations=(False, True), rounds=1)
    assert seen == ["UNet2DConditionModel"]
    assert (plain.stages["compiled"], plain.stages["compile_seconds"]) == (False, None)
    assert quick.stages["compiled"]
    assert quick.stages["compile_seconds"] > 0
    assert track.teacher().network.model._compiled_call_impl is None


def test_a_compiler_that_fails_and_a_batch_that_does_not_fit_are_one_line(track, monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    timed = timed_teacher(track, 1)
    monkeypatch.setattr(measuring, "marks", broken)
    with pytest.raises(UsageError, match=r"torch.compile does not work here \(no C\+\+ compiler\)"):
        measure_stages(track, [timed], batches=(1,), compilations=(True,), rounds=1)
    with pytest.raises(RuntimeError, match="no C"):
        measure_stages(track, [timed], batches=(1,), rounds=1)

    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(measuring, "marks", full)
    with pytest.raises(UsageError, match="a batch of 4096 does not fit"):
        measure_stages(track, [timed], batches=(4096,), rounds=1)


# ---------------------------------------------------------------------- records and boards


def made(seconds, changes=None):
    parts = {"text encoder": [s * 0.25 for s in seconds], "denoiser": [s * 0.5 for s in seconds], "decode": [s * 0.25 for s in seconds]}
    macs = {stage: {"matmul": 1000, "elementwise": 10} for stage in parts}
    stages = {"label": "teacher", "compiled": False, "compile_seconds": None, "peak_memory_mb": 300.0, "evaluations": 4, "seconds": parts,
              "macs": macs}  # fmt: skip
    return LatencyRecord.measured(
        track=SHAPES, subject="teacher", steps=2, batch=1, seconds=seconds, threads=1, dtype="float32", device_class="cpu",
        created="2025-01-01T00:00:00Z", stages=stages | (changes or {}),
    )  # fmt: skip


def test_a_record_without_stages_keeps_the_form_and_the_id_it_always_had():
    old = LatencyRecord.measured(track=SHAPES, subject="teacher", steps=2, batch=1, seconds=[1.0], threads=1, dtype="float32",
                                 device_class="cpu")  # fmt: skip
    data = old.to_json()
    assert "stages" not in data
    assert data["id"] == digest({name: value for name, value in data.items() if name != "id"})[:16]
    assert LatencyRecord.from_json(data) == old


@pytest.mark.parametrize(("change", "why"), [
    ({"compile_seconds": 1.0}, "compile_seconds belong"),
    ({"peak_memory_mb": -1}, "peak_memory_mb should be"),
    ({"evaluations": 0}, "evaluations should be"),
    ({"label": ""}, "label should be"),
    ({"surprise": 1}, "unknown 'surprise'"),
    ({"macs": {"decode": {"matmul": 1, "elementwise": 1}}}, "different stages"),
    ({"seconds": {"denoiser": [1.0]}, "macs": {"denoiser": {"matmul": 1, "elementwise": 1}}}, "same rounds"),
    ({"seconds": {"denoiser": [1.0, 1.5]}, "macs": {"denoiser": {"matmul": 1, "elementwise": 1}}}, "do not sum"),
])  # fmt: skip
def test_stages_that_do_not_hold_together_are_refused(change, why):
    assert LatencyRecord.from_json(made([1.0, 2.0]).to_json())
    with pytest.raises(BadFileError, match=why):
        LatencyRecord.from_json(made([1.0, 2.0], change).to_json())


def test_a_path_in_a_label_is_taken_out(tmp_path):
    store = Store(tmp_path)
    store.add(made([1.0], {"label": "/home/someone/models/toy"}))
    (record,) = store.latencies()
    assert record.stages["label"].startswith("toy#")
    assert not store.problems


def test_a_board_shows_the_stages_and_says_what_is_too_noisy():
    noisy = made([1.0, 1.0, 2.0])
    assert noisy.flagged
    for records, mark, said in (([made([1.0, 1.0, 1.0])], "1e+03 ms", "no row's spread is too wide"),
                                ([noisy], "~1e+03 ms", "1 of 1 rows end to end")):  # fmt: skip
        board = Board.from_records([], records, "shapes-sd")
        assert not board.rows
        assert board.stages == tuple(records)
        for form in ("terminal", "markdown"):
            text = render(board, form, width=140) if form == "terminal" else render(board, form)
            flat = " ".join(text.replace("\\", "").split())
            assert mark in flat
            assert said in flat
            assert ("~" in flat.split("eval: network")[0]) == bool(records[0].flagged)
    assert flops(noisy) == 6000
    assert "250 ms" in render(Board.from_records([], [made([1.0])], "shapes-sd"), "markdown")  # the denoiser's second in two steps


def test_the_latest_measurement_counts_and_rows_keep_their_own_latency():
    first, second = made([1.0]), replace(made([3.0]), created="2025-02-01T00:00:00Z")
    alone = LatencyRecord.measured(track=SHAPES, subject="teacher", steps=2, batch=1, seconds=[0.5], threads=1, dtype="float32",
                                   device_class="cpu")  # fmt: skip
    assert Board.from_records([], [second, first, alone], "shapes-sd").stages == (second,)


# ---------------------------------------------------------------------- what is measured, and the command


def test_a_pipeline_is_the_subject_that_its_scores_have(track, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("distillbench.scoring.get_track", lambda *names: track)
    store = Store(tmp_path / "store")
    found = subjects_of(track, store, print, pipeline=str(folder), steps=(1,), guidance=2.0)
    assert [(timed.label, timed.steps) for timed in found] == [("teacher", 1), ("teacher", 2), ("toy(guidance=2.0)", 1)]
    assert found[-1].subject == open_released(folder, "shapes-sd", steps=(1,), guidance=2.0).record.id
    with pytest.raises(UsageError, match="name one"):
        subjects_of(track, store, print, guidance=2.0)
    with pytest.raises(UsageError, match="takes no prompts"):
        subjects_of(track, store, print, pipeline=str(toy_ddpm(tmp_path / "ddpm")))


@pytest.mark.parametrize("text", ["0", "huge", "1,,2", "-1", "1.5"])
def test_batches_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="--batch"):
        parse_batches(text)
    assert parse_batches("1, largest,16,1") == (1, None, 16)


def test_the_command_measures_prints_and_stores(distillbench, monkeypatch, track, folder, tmp_path):
    monkeypatch.setattr("distillbench.latency_subjects.get_track", lambda *names: track)
    monkeypatch.setattr("distillbench.scoring.get_track", lambda *names: track)
    monkeypatch.setenv("COLUMNS", "160")
    status, out, err = distillbench("latency", "shapes-sd", "--pipeline", folder, "--steps", "1", "--rounds", "1", "--batch", "1")
    assert status == 0, err
    assert "end to end" in out
    assert "toy" in out
    assert "FLOPs" in out
    assert [record.stages["label"] for record in Store(tmp_path / "store").latencies(SHAPES)].count("teacher") == 2


@pytest.mark.parametrize(("arguments", "why"), [
    (("mixture2d",), "mixture2d has no pipeline"),
    (("shapes-sd", "--batch", "many"), "--batch 'many'"),
    (("shapes-sd", "--device", "tpu"), "measured on cpu or cuda"),
    (("shapes-sd", "--format", "xml"), "xml"),
])  # fmt: skip
def test_wrong_input_is_one_line(distillbench, arguments, why):
    status, _, err = distillbench("latency", *arguments)
    assert status == 2
    assert why in err
    assert len(err.strip().splitlines()) == 1
