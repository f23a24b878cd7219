"""`distillbench score`: the numbers of the track, resumed where it was stopped; wrong input in one line."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil

import pytest
import torch

from distillbench import runner, scoring
from distillbench.errors import BadFileError
from distillbench.parts.student import FewStepStudent
from distillbench.records import RunRecord, run_id
from distillbench.report.build import build, collect
from distillbench.store import Store
from distillbench.teachers.diffusers import open_pipeline
from distillbench.teachers.pipelines_export import export_pipeline
from given_files import only, paint
from toy_pipelines import toy_ddpm, toy_sana, toy_sd
from toy_track import PROMPTS, ToyTrack, register


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return ToyTrack(tmp_path_factory.mktemp("track") / "toy")


@pytest.fixture
def track(toy, monkeypatch):
    register(monkeypatch, toy)
    return toy


@pytest.fixture(scope="module")
def student(toy):
    denoiser = open_pipeline(toy.folder).denoiser.copy()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return FewStepStudent(denoiser, {1: (1.0,), 2: (1.0, 0.5)}, toy.shape)


def same(found, expected) -> None:
    """Scores as stored against scores as the track gives them."""
    assert [score["name"] for score in found] == [score.name for score in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["identity"] == other.identity
        assert one["value"] == pytest.approx(other.value, rel=1e-3, abs=1e-6)
        assert one["low"] == pytest.approx(other.low, rel=1e-3, abs=1e-4)


def no_sampling(*_):
    raise AssertionError("it was sampled again")


def test_an_exported_student_gets_the_numbers_that_its_track_gives_it(distillbench, track, student, tmp_path):
    export_pipeline(track.opened(), student, 2, tmp_path / "student-2")
    expected = track.score(runner.sample_student(student, track, 2).x)
    status, out, err = distillbench("score", "--pipeline", "student-2", "--steps", "2", "--track", "toy-sd")
    assert status == 0
    assert "fd ↓" in out
    assert "student-2" in out
    record = only(tmp_path)
    same(record.scores["2"], expected)
    teacher = track.score(runner.sample_teacher(track, 2).x)
    assert abs(teacher[0].value - expected[0].value) > 0.01 * expected[0].value  # the test can tell two models apart
    assert record.evaluations == {"2": 2}
    assert (record.kind, record.budget, record.label, record.trained_for) == ("released", None, "student-2", [])
    assert "distillbench board toy-sd" in err


def test_the_teachers_folder_gets_the_teachers_numbers(distillbench, track, tmp_path):
    words = ("score", "--pipeline", track.folder, "--steps", "3,2", "--guidance", "2", "--track", "toy-sd@1")
    assert distillbench(*words).status == 0
    record = only(tmp_path)
    assert (record.label, record.steps, record.evaluations) == ("toy(guidance=2.0)", [3, 2], {"3": 6, "2": 4})
    for steps in (2, 3):
        same(record.scores[str(steps)], track.score(runner.sample_teacher(track, steps).x))


def test_a_stopped_scoring_goes_on_with_the_next_chunk(distillbench, track, tmp_path, monkeypatch):
    words = ("score", "--pipeline", track.folder, "--steps", "1,2", "--track", "toy-sd", "--format", "json")
    whole = json.loads(distillbench(*words, "--store", "other").out)
    sampled, done = scoring._sampled, []

    def stopping(released, steps, rows, *rest):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append((steps, rows.start))
        return sampled(released, steps, rows, *rest)

    monkeypatch.setattr(scoring, "_sampled", stopping)
    status, _, err = distillbench(*words)
    assert (status, "goes on from here" in err, Store(tmp_path / "store").records()) == (130, True, [])
    assert done == [(1, 0), (1, 10), (1, 20), (2, 0)]
    damaged = tmp_path / "store" / "runs" / whole["id"] / "looked-1" / "00000010.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    done[:] = []
    assert distillbench(*words).status == 0
    assert done == [(1, 10), (2, 10), (2, 20)]
    record = only(tmp_path)
    assert (record.id, record.scores) == (whole["id"], whole["scores"])
    monkeypatch.setattr(scoring, "_sampled", no_sampling)
    assert json.loads(distillbench(*words).out)["scores"] == whole["scores"]


def test_it_stands_beside_trained_rows_in_every_format_and_on_the_report(distillbench, track, tmp_path):
    distillbench("score", "--pipeline", track.folder, "--steps", "1", "--track", "toy-sd")
    record = only(tmp_path)
    budget = {"name": "S", "unit": "passes", "amount": track.facts.budgets["S"]}
    trained = dataclasses.replace(
        record, kind="run", method="cd", label="cd", budget=budget, trained_for=[1], source_sha256=None, data_access="none"
    )
    Store(tmp_path / "store").add(dataclasses.replace(trained, id=run_id(**trained.determinants())))
    rows = json.loads(distillbench("board", "toy-sd", "--format", "json").out)
    assert {(row["method"], row["kind"], row["rank"]) for row in rows} == {("cd", "run", 1), ("toy (released)", "released", None)}
    text = distillbench("board", "toy-sd").out
    assert all(words in text for words in ("toy (released)", "trained elsewhere at an unknown cost"))
    assert "no method was scored" not in text
    lines = list(csv.DictReader(io.StringIO(distillbench("board", "toy-sd", "--format", "csv").out)))
    assert {line["method"]: line["budget"] for line in lines} == {"cd": "S", "toy (released)": "–"}
    for form in ("markdown", "latex"):
        assert "toy (released)" in distillbench("board", "toy-sd", "--format", form).out
    assert "released, not trained here" in distillbench("show", record.id).out
    build(collect(Store(tmp_path / "store"), published=False), tmp_path / "report")
    page = (tmp_path / "report" / "runs" / f"{record.id}.html").read_text()
    assert "distillbench score --pipeline toy --steps 1 --track toy-sd --guidance 1.0 --scheduler DDIMScheduler" in page
    assert f"{record.id}-1.png" in page  # its samples were kept


def test_what_determines_the_numbers_is_the_id(track, tmp_path):
    def opened(where=track.folder, **options):
        return scoring.open_released(where, "toy-sd", **options).record

    first = opened()
    copy = shutil.copytree(track.folder, tmp_path / "elsewhere")
    (copy / "README.md").write_text("notes")
    assert opened(copy).id == first.id
    assert opened(copy).label == "elsewhere"
    assert opened(guidance=0).id == opened(guidance=1).id == opened(scheduler="DDIMScheduler").id == first.id
    others = [opened(guidance=3), opened(scheduler="LCMScheduler"), opened(steps=(1, 2)), opened(toy_sd(tmp_path / "seed", seed=1))]
    assert len({first.id, *(record.id for record in others)}) == 5
    assert opened(steps=(1,)).setting == first.setting  # so that a board shows them as one model
    assert others[1].label == "toy(scheduler=LCMScheduler)"


def test_a_lora_is_told_apart_from_its_base(track, tmp_path):
    network = open_pipeline(track.folder).denoiser.copy()
    network.network = network.network.lora(2, torch.Generator().manual_seed(0), targets=("to_q", "to_v"))
    lora = FewStepStudent(network, {1: (1.0,)}, track.shape)
    export_pipeline(track.opened(), lora, 1, tmp_path / "lora")
    base = scoring.open_released(track.folder, "toy-sd", steps=(1,))
    with_lora = scoring.open_released(track.folder, "toy-sd", lora=tmp_path / "lora", steps=(1,))
    assert with_lora.record.id != base.record.id
    assert with_lora.record.label == "toy(lora=lora)"
    assert with_lora.record.config["scheduler"] == "LCMScheduler"
    assert set(with_lora.record.checksums) == {"pipeline", "lora"}


def test_captions_that_are_cut_are_counted_and_told(distillbench, tmp_path, monkeypatch):
    long = ToyTrack(tmp_path / "toy", [*PROMPTS[:5], "x y z " * 10])
    register(monkeypatch, long)
    status, _, err = distillbench("score", "--pipeline", "toy", "--steps", "1", "--track", "toy-sd")
    told = "1 of 6 captions are longer than the text encoder takes and were cut"
    assert (status, told in err) == (0, True)
    assert {score["note"] for score in only(tmp_path).scores["1"]} == {told}


def test_a_family_names_the_track_of_the_pipelines_format(track, monkeypatch, tmp_path):
    monkeypatch.setitem(scoring.FAMILIES, "toys", {"StableDiffusionPipeline": "toy-sd"})
    assert scoring.open_released(track.folder, "toys").track is track
    assert set(scoring.FAMILIES["shapes"].values()) == {"shapes-sd", "shapes-sana"}


def test_a_track_of_the_users_own_data_is_scored_with_data_alone(distillbench, toy, tmp_path, monkeypatch, fresh_tracks):
    from distillbench.tracks import coco_sd15

    measures = tuple(dataclasses.replace(measure, size=16) for measure in coco_sd15.DEFINITION.measures)
    small = dataclasses.replace(coco_sd15.DEFINITION, n=10, side=16, measures=measures, chunk=4)
    monkeypatch.setattr(coco_sd15, "DEFINITION", small)
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path / "no-weights"))
    (tmp_path / "data").mkdir()
    paint(tmp_path / "data" / "reference", 12, 0)
    (tmp_path / "data" / "prompts.txt").write_text("\n".join("abcdefghij") + "\n")
    words = ("score", "--pipeline", toy.folder, "--steps", "1", "--track", "coco-sd15")
    status, _, err = distillbench(*words)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "needs --data PATH" in err
    assert distillbench(*words, "--data", tmp_path / "data").status == 0
    record = only(tmp_path)
    assert set(record.files) == {"reference", "prompts"}
    by_name = {score["name"]: score for score in record.scores["1"]}
    assert (by_name["fd"]["n"], by_name["fd"]["identity"]["n_reference"]) == (10, 12)
    assert by_name["fid"]["note"] == "not run: weights missing"
    assert "toy (released)" in distillbench("board", "coco-sd15").out


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    root = tmp_path_factory.mktemp("others")
    toy_sana(root / "sana")
    toy_ddpm(root / "ddpm")
    (root / "empty").mkdir()
    kandinsky = root / "kandinsky"
    kandinsky.mkdir()
    (kandinsky / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    from safetensors.torch import save_file

    (root / "lora").mkdir()
    save_file({f"unet.nowhere.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}, root / "lora" / "other.safetensors")
    return root


WRONG_PIPELINE = {
    "no folder": ("--pipeline {root}/none --track toy-sd", "no such folder"),
    "hub id without revision": ("--pipeline owner/name --track toy-sd", "--revision"),
    "no pipeline": ("--pipeline {root}/empty --track toy-sd", "no model_index.json"),
    "class": ("--pipeline {root}/kandinsky --track toy-sd", "KandinskyPipeline are not supported"),
    "lora of another base": ("--pipeline {toy} --track toy-sd --lora {root}/lora/other.safetensors", "this LoRA is for another base"),
    "no lora": ("--pipeline {toy} --track toy-sd --lora {root}/empty", "no LoRA"),
    "track": ("--pipeline {toy} --track shapes-sb", "did you mean shapes-s"),
    "track without images": ("--pipeline {toy} --track mixture2d", "no images that a pipeline could make"),
    "size": ("--pipeline {root}/sana --track toy-sd", "images of 32 x 32 pixels, and toy-sd is scored on images of 16 x 16"),
    "no prompts": ("--pipeline {root}/ddpm --track toy-sd", "takes no prompts"),
    "family": ("--pipeline {root}/ddpm --track shapes", "no track for a DDPMPipeline"),
    "scheduler": ("--pipeline {toy} --track toy-sd --scheduler LCMSchedular", "did you mean LCMScheduler"),
    "scheduler of flows": ("--pipeline {toy} --track toy-sd --scheduler FlowMatchEulerDiscreteScheduler", "predicts eps"),
    "guidance": ("--pipeline {toy} --track toy-sd --guidance nan", "0 or above"),
    "steps": ("--pipeline {toy} --track toy-sd --steps 0", "step counts start at 1"),
    "too many steps": ("--pipeline {toy} --track toy-sd --steps 2000", "cannot take 2000 steps"),
    "device": ("--pipeline {toy} --track toy-sd --device abacus", "no such device"),
    "no track": ("--pipeline {toy}", "--track is missing"),
    "nothing": ("", "one of the two"),
    "both": ("--pipeline {toy} --track toy-sd --images {root}", "one of the two"),
    "option of images": ("--pipeline {toy} --track toy-sd --resize 8", "--resize does not go with --pipeline"),
    "option of pipelines": ("--images {root} --reference {root} --steps 1", "--steps does not go with --images"),
    "format": ("--images {root} --reference {root} --format tabel", "did you mean table"),
}


@pytest.mark.parametrize(("words", "told"), WRONG_PIPELINE.values(), ids=WRONG_PIPELINE.keys())
def test_a_wrong_pipeline_is_refused_in_a_line(distillbench, track, others, tmp_path, words, told):
    status, out, err = distillbench("score", *words.format(root=others, toy=track.folder).split())
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert told in err
    assert not (tmp_path / "store" / "records").exists()


def test_a_released_record_states_no_training(track):
    record = dataclasses.replace(scoring.open_released(track.folder, "toy-sd").record, status="skipped: a test")
    assert RunRecord.from_json(record.to_json()) == record
    for change in ({"budget": {"name": "S", "unit": "passes", "amount": 1}}, {"trained_for": [1]}, {"spent": {"passes": 1}}):
        with pytest.raises(BadFileError, match="was not trained here"):
            RunRecord.from_json({**record.to_json(), **change})


def test_names_become_labels():
    sha = "0123456789abcdef0123456789abcdef01234567"
    assert scoring.plain_name(f"owner/name@{sha}") == "owner-name@01234567"
    assert scoring.plain_name("my model (v2)") == "my-model-v2-"
    assert scoring.plain_name(".hidden") == "hidden"
    assert scoring.plain_name("()") == "unnamed"
