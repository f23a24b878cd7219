"""The tracks of the user's own files: whole runs on tiny stand-in checkpoints and data, and what each protocol does to its images."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

import distillbench as package
import method_files
import toy_pipelines
from distillbench import tracks
from distillbench.data.image_folder import ImageFolder
from distillbench.errors import BadFileError, UsageError
from distillbench.jobs import Job
from distillbench.metrics.extractors import Pixels8x8
from distillbench.metrics.published import clip
from distillbench.networks.files import sha256_file
from distillbench.published_weights import WEIGHTS
from distillbench.records import RunRecord
from distillbench.runner import execute
from distillbench.store import Store
from distillbench.tracks import get_track, measures
from distillbench.tracks.facts import EXTERNAL, FACTS, facts_of
from distillbench.tracks.given import Prompts
from distillbench.tracks.published import PublishedTrack, read_captions
from given_files import picture, write_data
from published_files import TINY_CLIP, entry, random_clip

PUBLISHED = [name for name in EXTERNAL if name != "emoji"]
TOYS = {"coco-sd15": (toy_pipelines.toy_sd, 16), "coco-sdxl": (toy_pipelines.toy_sdxl, 16), "mjhq-sana": (toy_pipelines.toy_sana, 32),
        "cifar10": (toy_pipelines.toy_ddpm, 16)}  # fmt: skip
CAPTIONS = ["a red cat", "two dogs", "a bus", "tea", "one very long caption of much"]


def definition_of(name):
    return import_module(f"distillbench.tracks.{name.replace('-', '_')}").DEFINITION


def toy(name, folder, monkeypatch, **changes):
    """A toy teacher and data for a definition of 5 images; returns their paths as options."""
    make, side = TOYS[name]
    small = dataclasses.replace(definition_of(name), n=5, side=side, chunk=2, batch_size=2, **changes)
    monkeypatch.setattr(import_module(f"distillbench.tracks.{name.replace('-', '_')}"), "DEFINITION", small)
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(folder / "weights"))
    tracks._made.cache_clear()
    captions = CAPTIONS if small.prompts else []
    data = write_data(folder / "data", captions, training=bool(captions))
    if small.prompts == "meta_data.json":
        entries = {f"{k:02d}": {"category": "part", "prompt": caption} for k, caption in enumerate(captions)}
        (data / "meta_data.json").write_text(json.dumps(entries))
    teacher = make(folder / "teacher")
    if name == "mjhq-sana":  # without SANA's instruction, which is some thousand tokens of single characters here
        (teacher / "distillbench.json").write_text('{"complex_human_instruction": null, "max_sequence_length": 16}')
    return {"teacher": str(teacher), "data": str(data)}


@pytest.fixture(autouse=True)
def forget():
    yield
    tracks._made.cache_clear()


# ---------------------------------------------------------------------- definitions


@pytest.mark.parametrize("name", PUBLISHED)
def test_definitions_and_facts_agree(name):
    definition, facts = definition_of(name), facts_of(name)
    assert tuple(measure.column for measure in definition.measures) == facts.columns
    assert facts.main in facts.columns
    assert {measure.weights for measure in definition.measures} - {None} <= set(WEIGHTS)
    assert all(f"{column}:" in facts.glossary for column in facts.columns)
    assert definition.prompts_sha256 is None  # none is known; the one in use is recorded
    assert definition.sources


def test_they_are_known_but_not_among_the_embedded_ones():
    assert not set(EXTERNAL) & set(FACTS)
    assert set(tracks.TRACKS) == set(FACTS)
    assert all(facts_of(facts.id) is facts for facts in EXTERNAL.values())
    with pytest.raises(UsageError, match="coco-sd15"):
        facts_of("coco-sd1")


def test_images_are_brought_as_files_are_read(tmp_path):
    for k in range(3):
        picture(k, 40, 40).save(tmp_path / f"{k}.png")
    images = torch.stack([torch.from_numpy(np.array(picture(k, 40, 40))).permute(2, 0, 1) for k in range(3)])
    for options, size, crop in (
        ({"resize": 24}, 24, None),
        ({"crop": 13, "kernel": "bicubic"}, None, 13),
        ({"crop": 50, "kernel": "bicubic"}, None, 50),
    ):
        (read,) = ImageFolder(tmp_path, **options).batches()
        assert torch.equal(measures.brought(images, size, crop), read.images)
    assert measures.brought(images) is images
    middle = np.asarray(picture(0, 40, 40))[13:26, 13:26]
    np.testing.assert_array_equal(measures.brought(images, crop=13)[0].permute(1, 2, 0).numpy(), middle)


# ---------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_without_published_weights(name, tmp_path, monkeypatch):
    given = toy(name, tmp_path, monkeypatch)
    needs = method_files.write(tmp_path / "tiny.py", ('needs=("labels",)', "needs=()"))
    store = Store(tmp_path / "store")
    record = package.run(str(needs), track=name, budget="1steps", steps=(1,), store=store.folder, **given)
    assert record.status == "ok"
    assert set(record.files) == ({"teacher", "reference"} if name == "cifar10" else {"teacher", "reference", "prompts", "training"})
    assert str(tmp_path) not in (store.folder / "records" / f"{record.id}.json").read_text()
    assert RunRecord.from_json(record.to_json()) == record
    scores = {score["name"]: score for score in record.scores["1"]}
    assert tuple(scores) == facts_of(name).columns
    assert {column: score["note"] for column, score in scores.items() if score["value"] is None} == dict.fromkeys(
        set(scores) - {"fd"}, "not run: weights missing"
    )
    assert scores["fd"]["value"] > 0
    assert (scores["fd"]["n"], scores["fd"]["identity"]["n_reference"]) == (5, 10)


def test_references_and_what_identifies_them(tmp_path, monkeypatch):
    given = toy("coco-sd15", tmp_path, monkeypatch)
    store = Store(tmp_path / "store")
    teacher = execute(Job("teacher", "coco-sd15", steps=(1, 2), **given), store)
    truth = execute(Job("truth", "coco-sd15", steps=(1,), **given), store)
    assert (teacher.status, truth.status) == ("ok", "ok")
    assert teacher.evaluations == {"1": 2, "2": 4}  # guidance 3 counts twice
    floor = {score["name"]: score for score in truth.scores["1"]}
    assert floor["fd"]["note"] == "two halves of the 10 real images"
    assert floor["fd"]["identity"]["n_generated"] == floor["fd"]["identity"]["n_reference"] == 5
    assert floor["clip"]["note"].startswith("not run: the reference images are not paired")
    assert "1 of 5 captions are longer" in teacher.scores["1"][0]["note"] or teacher.scores["1"][0]["value"] is None

    picture(7, 24, 20).save(tmp_path / "data/reference/0.png")  # another picture under the same path is another result
    tracks._made.cache_clear()
    assert execute(Job("teacher", "coco-sd15", steps=(1, 2), **given), store).id != teacher.id


def test_published_measures_with_stand_in_weights(tmp_path, monkeypatch):
    given = toy("coco-sdxl", tmp_path, monkeypatch)
    (tmp_path / "weights").mkdir()
    name = "openclip-g14-laion2b-s12b-b42k"
    path = tmp_path / "weights" / WEIGHTS[name].file
    torch.save(random_clip(TINY_CLIP).state_dict(), path)
    monkeypatch.setitem(WEIGHTS, name, entry(path))
    monkeypatch.setitem(clip.CLIPS, name, clip.Clip(name, TINY_CLIP))
    seen = []

    class Inception(Pixels8x8):
        name = "clean-inception2015@299"

        def __init__(self, mode, device):
            super().__init__()

        def __call__(self, images):
            seen.append(tuple(images.shape[2:]))
            return super().__call__(images)

    monkeypatch.setattr(measures, "Inception", Inception)
    track = get_track("coco-sdxl", **given)
    conditions, seeds = track.evaluation()
    x = track.sample_teacher(conditions[:5], list(seeds), 1).x
    found = {score.name: score for score in track.score(x)}
    assert set(seen) == {(512, 512), (299, 299)}
    assert found["fid"].identity["metric"] == found["patch-fid"].identity["metric"] == "fid/clean-inception2015@299"
    assert found["fid"].key != found["patch-fid"].key
    assert any("to 512 x 512" in step for step in found["fid"].identity["preprocessing"])
    assert any("centre 299 x 299" in step for step in found["patch-fid"].identity["preprocessing"])
    images = track.as_scored(track.decode(x))
    brought = torch.stack([
        torch.from_numpy(np.array(Image.fromarray(image).resize((256, 256), Image.Resampling.LANCZOS))).permute(2, 0, 1)
        for image in images.permute(0, 2, 3, 1).numpy()
    ])  # fmt: skip
    expected = clip.ClipScore(name).cosines(brought, [f"A photo depicts {caption}" for caption in CAPTIONS])
    assert found["clip"].value == pytest.approx(expected.mean(), abs=1e-6)
    assert "'A photo depicts '" in found["clip"].identity["estimator"]
    assert found["fid"].identity["reference_sha256"] != found["fid"].identity["prompts_sha256"]
    assert found["clip"].low < found["clip"].value < found["clip"].high
    again = {score.name: score for score in track.score_images(images)}
    assert {column: score.key for column, score in again.items()} == {column: score.key for column, score in found.items()}
    for column, score in found.items():
        assert again[column].value == pytest.approx(score.value, rel=1e-5)  # all at once, not in chunks of two


def test_prompts_are_embedded_when_they_are_picked(tmp_path, monkeypatch):
    track = get_track("coco-sd15", **toy("coco-sd15", tmp_path, monkeypatch))
    conditions, seeds = track.evaluation()
    assert (len(conditions), len(seeds), list(conditions)) == (5, 5, ["prompt"])
    assert isinstance(conditions, Prompts)
    eager = track.opened().conditions(CAPTIONS)
    assert torch.equal(conditions[1:4].field("tokens"), eager.field("tokens")[1:4])
    assert conditions[torch.tensor([4, 0])].field("prompt") == [CAPTIONS[4], CAPTIONS[0]]


def test_training_data_come_with_their_own_captions(tmp_path, monkeypatch):
    given = toy("coco-sd15", tmp_path, monkeypatch)
    track = get_track("coco-sd15", **given)
    x, conditions = track.source().draw(3, torch.Generator().manual_seed(0))
    again, same = track.source().draw(3, torch.Generator().manual_seed(0))
    assert x.shape == (3, *track.shape)
    assert torch.equal(x, again)
    assert torch.equal(conditions.field("tokens"), same.field("tokens"))
    row = int(torch.randint(4, (3,), generator=torch.Generator().manual_seed(0))[0])
    image = ImageFolder(tmp_path / "data/training/images", resize=16).read(f"{row}.png")
    assert torch.allclose(x[0], track.opened().encode(image[None].float() / 255)[0], atol=1e-5)
    wanted = track.opened().conditions([["a", "bc", "d", "ef"][row]]).field("tokens")[0]
    assert torch.equal(conditions.field("tokens")[0], wanted)
    assert track.provides == {"text", "real data"}


# ---------------------------------------------------------------------- wrong input


def test_what_is_missing_or_wrong_is_said_in_one_line(tmp_path, monkeypatch, distillbench):
    given = toy("coco-sd15", tmp_path, monkeypatch)
    options = ["--teacher", given["teacher"], "--data", given["data"]]
    method = method_files.write(tmp_path / "tiny.py", ('needs=("labels",)', "needs=()"))

    def refused(*more, track="coco-sd15"):
        tracks._made.cache_clear()
        status, out, err = distillbench("run", method, track, "--steps", "1", "--budget", "1steps", *more)
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        return err

    assert "needs --teacher PATH" in refused(*options[2:])
    assert "needs --data PATH" in refused(*options[:2])
    assert "ships its teacher and data" in refused(*options, track="mixture2d")
    assert "no pipeline folder" in refused("--teacher", tmp_path, *options[2:])
    assert "a DDPMPipeline; coco-sd15 takes StableDiffusionPipeline" in refused(
        "--teacher", toy_pipelines.toy_ddpm(tmp_path / "ddpm"), *options[2:]
    )
    assert "not there" in refused(*options[:2], "--data", tmp_path / "nowhere")
    prompts = tmp_path / "data/prompts.txt"
    prompts.write_text("one\ntwo\n")
    assert "2 captions, and coco-sd15 is scored on 5" in refused(*options)
    prompts.write_text("one\n\ntwo\n")
    assert "line 2 is empty" in refused(*options)
    prompts.write_text("\n".join(CAPTIONS))
    (tmp_path / "data/training/captions.txt").write_text("one\n")
    with pytest.raises(UsageError, match="1 captions for 4 images"):
        get_track("coco-sd15", **given).source()


def test_a_pinned_list_of_captions_is_held_to_its_checksum(tmp_path, monkeypatch):
    given = toy("coco-sd15", tmp_path, monkeypatch)
    facts, definition = facts_of("coco-sd15"), import_module("distillbench.tracks.coco_sd15").DEFINITION
    sha256 = sha256_file(tmp_path / "data/prompts.txt")
    assert PublishedTrack(facts, dataclasses.replace(definition, prompts_sha256=sha256), **given).prompts() == CAPTIONS
    with pytest.raises(BadFileError, match="not the captions of coco-sd15"):
        PublishedTrack(facts, dataclasses.replace(definition, prompts_sha256="0" * 64), **given).prompts()


def test_captions_from_a_foreign_json(tmp_path):
    (tmp_path / "meta_data.json").write_text('{"a": {"text": "b"}}')
    with pytest.raises(UsageError, match="not an object of entries with a prompt"):
        read_captions(tmp_path / "meta_data.json", "MJHQ-30K")
