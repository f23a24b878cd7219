"""`distillbench score --images`: folders of pictures are scored as the metrics say, and a wrong folder is refused in a line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from distillbench import scoring_images
from distillbench.data.image_folder import READING, ImageFolder
from distillbench.metrics.extractors import Pixels8x8, embedded_extractor
from distillbench.metrics.feature_cache import features_of_folder
from distillbench.metrics.images import Reference, image_scores, seen_features
from distillbench.published_weights import WeightsMissing
from distillbench.store import Store
from given_files import only, paint


@pytest.fixture
def folders(tmp_path):
    return paint(tmp_path / "made", 12, 0, shift=40), paint(tmp_path / "real", 15, 1)


def test_folders_are_scored_as_the_metrics_say(distillbench, folders, tmp_path):
    made, real = folders
    status, out, err = distillbench("score", "--images", made, "--reference", real)
    record = only(tmp_path)
    found = {score["name"]: score for score in record.scores["1"]}
    extractor = embedded_extractor((16, 16))
    ours, theirs = (features_of_folder(ImageFolder(folder), extractor) for folder in folders)
    expected = image_scores(
        seen_features(ours.features),
        Reference(theirs.features.double().numpy(), record.checksums["reference"]),
        extractor,
        image_steps=READING,
    )
    assert status == 0
    for score in expected:
        if score.name != "diversity":
            assert found[score.name] == score.to_json()
    assert set(found) == {*scoring_images.EMBEDDED, *scoring_images.FIDS}
    assert {found[name]["note"] for name in scoring_images.FIDS} == {"not run: weights missing"}
    assert out.count("not run: weights missing") == 3
    assert "12 of 12 images, 16 x 16 pixels" in err
    assert "distillbench doctor" in err
    assert "released, not trained here" in distillbench("show", record.id[:8]).out
    assert distillbench("board", "shapes-sd").status == 0  # no board shows it, and none chokes on it


def test_features_are_taken_once_whatever_the_folder_is_called(distillbench, folders, tmp_path, monkeypatch):
    made, real = folders
    words = ("--reference", real, "--metrics", "fd,vendi", "--format", "json")
    first = json.loads(distillbench("score", "--images", made, *words).out)
    assert [score["name"] for score in first["scores"]["1"]] == ["fd", "vendi"]
    made.rename(tmp_path / "renamed")

    def never(_):
        raise AssertionError("features were taken again")

    monkeypatch.setattr(Pixels8x8, "__call__", never)
    extractor = type(embedded_extractor((16, 16)))
    monkeypatch.setattr(extractor, "__call__", lambda self, images: never(images))
    again = json.loads(distillbench("score", "--images", "renamed", *words).out)
    assert (again["id"], again["scores"]) == (first["id"], first["scores"])


def test_the_first_n_are_scored_and_all_resized(distillbench, tmp_path):
    made, real = paint(tmp_path / "made", 12, 0), paint(tmp_path / "real", 8, 1, side=24)
    status, _, err = distillbench("score", "--images", made, "--reference", real)
    assert (status, "give --resize" in err) == (2, True)
    assert distillbench("score", "--images", made, "--reference", real, "--resize", "8", "--n", "10", "--metrics", "fd").status == 0
    (score,) = only(tmp_path).scores["1"]
    assert (score["n"], score["identity"]["n_reference"]) == (10, 8)
    assert any("to 8 x 8" in step for step in score["identity"]["preprocessing"])


def test_captions_by_line_and_by_name_group_the_images(distillbench, folders, tmp_path):
    made, real = folders
    told = ["a cat", "a dog", "two birds"]
    captions = [told[i % 3] for i in range(12)]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n")
    named = [{"file": f"{i:03d}.png", "caption": captions[i]} for i in reversed(range(12))]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, named)))
    records = []
    for file in ("captions.txt", "captions.jsonl"):
        words = ("--captions", file, "--metrics", "diversity,clipcos/openclip-b32-openai", "--format", "json")
        status, out, _ = distillbench("score", "--images", made, "--reference", real, *words)
        assert status == 0
        records.append(json.loads(out))
    assert records[0]["id"] == records[1]["id"]
    diversity, agreement = records[0]["scores"]["1"]
    features = features_of_folder(ImageFolder(made), embedded_extractor((16, 16))).features.double()
    unit = features / features.norm(dim=1, keepdim=True)
    gaps = [1 - (unit[rows] @ unit[rows].T)[i, j] for rows in (range(k, 12, 3) for k in range(3)) for i in range(4) for j in range(i)]
    assert diversity["value"] == pytest.approx(float(torch.stack(gaps).mean()), rel=1e-6)
    assert (agreement["value"], agreement["note"]) == (None, "not run: weights missing")


class ToyClip:
    """Stands for a CLIP network: an image's mean colour against the length of its caption."""

    name, weights_sha256, preprocessing = "openclip-b32-openai", "0" * 64, ("mean colour",)

    def __init__(self, name, weights, *, device):
        assert (name, weights.name, device) == ("openclip-b32-openai", "weights", "cpu")

    def image_features(self, images):
        return torch.nn.functional.normalize(images.float().mean((2, 3)) + 1, dim=1)

    def text_features(self, captions):
        return torch.nn.functional.normalize(torch.tensor([[len(c), 1.0, 2.0] for c in captions]), dim=1)

    def score(self, cosines, captions, *, prompts_sha256):
        from distillbench.metrics.score import Score, identity

        what = identity(
            "clipcos/x", estimator="mean", preprocessing=self.preprocessing, n_generated=len(cosines), prompts_sha256=prompts_sha256
        )
        return Score("clipcos/openclip-b32-openai", what, float(cosines.mean()), None, None, len(cosines), True, note="2 captions were cut")


def test_with_weights_the_published_scores_run_and_are_another_record(distillbench, folders, tmp_path, monkeypatch):
    made, real = folders
    (tmp_path / "captions.txt").write_text("\n".join("x" * (i + 1) for i in range(12)))
    (tmp_path / "weights").mkdir()
    name = "clipcos/openclip-b32-openai"
    words = ("score", "--images", made, "--reference", real, "--captions", "captions.txt", "--metrics", name, "--weights", "weights")
    assert distillbench(*words).status == 0

    def find(wanted, folder):
        if wanted != "openclip-b32-openai":
            raise WeightsMissing("not there")

    monkeypatch.setattr(scoring_images, "find", find)
    monkeypatch.setattr(scoring_images, "ClipScore", ToyClip)
    assert distillbench(*words).status == 0
    without, with_ = sorted((record.scores["1"][0] for record in Store(tmp_path / "store").records()), key=lambda s: s["value"] or 0)
    assert without["note"] == "not run: weights missing"
    images = torch.cat([batch.images for batch in ImageFolder(made).batches()])
    clip = ToyClip("openclip-b32-openai", tmp_path / "weights", device="cpu")
    expected = (clip.image_features(images) * clip.text_features(["x" * (i + 1) for i in range(12)])).sum(1).mean()
    assert with_["value"] == pytest.approx(float(expected), rel=1e-6)
    assert with_["identity"]["preprocessing"] == [*READING, "mean colour"]
    assert with_["note"] == "2 captions were cut"


def test_what_had_to_be_converted_is_counted_in_the_note(distillbench, folders, tmp_path):
    made, real = folders
    picture = Image.open(made / "000.png")
    picture.convert("RGBA").save(made / "000.png")
    picture.convert("L").save(made / "001.png")
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200).save(made / "002.png")
    assert distillbench("score", "--images", made, "--reference", real, "--metrics", "fd").status == 0
    (score,) = only(tmp_path).scores["1"]
    assert score["note"] == "images converted: 1 16-bit, 2 grey, 1 with alpha"


def test_a_picture_that_breaks_only_when_decoded_is_named_and_no_score_is_made(distillbench, folders, tmp_path):
    made, real = folders
    content = (made / "004.png").read_bytes()
    (made / "004.png").write_bytes(content[: len(content) // 2])
    status, out, err = distillbench("score", "--images", made, "--reference", real)
    assert (status, out, len([line for line in err.splitlines() if "distillbench:" in line])) == (2, "", 1)
    assert "11 usable images of the 12 needed: 004.png" in err
    assert not (tmp_path / "store" / "records").exists()


WRONG_FOLDERS = {
    "no folder": ("--images none --reference real", "not there"),
    "no reference": ("--images made", "--reference is missing"),
    "empty": ("--images empty --reference real", "holds no images"),
    "empty reference": ("--images made --reference empty", "holds no images"),
    "mixed": ("--images mixed --reference real", "2 sizes"),
    "corrupt": ("--images corrupt --reference real", "bad.png (not an image)"),
    "too few for n": ("--images made --reference real --n 13", "holds 12 images and 13 are needed"),
    "few": ("--images few --reference real", "at least 6 are needed"),
    "metric": ("--images made --reference real --metrics fdd", "did you mean fd"),
    "metric of captions": ("--images made --reference real --metrics diversity", "give --captions"),
    "weights": ("--images made --reference real --weights nowhere", "no such folder"),
    "no captions": ("--images made --reference real --captions nowhere.txt", "cannot be read"),
    "few captions": ("--images made --reference real --captions few.txt", "2 captions for 12 images"),
    "empty caption": ("--images made --reference real --captions hole.txt", "hole.txt:2 holds no caption"),
    "no json": ("--images made --reference real --captions bad.jsonl", "bad.jsonl:1 is no JSON"),
    "other names": ("--images made --reference real --captions other.jsonl", "none for 001.png"),
    "resize 0": ("--images made --reference real --resize 0", "--resize"),
}


@pytest.mark.parametrize(("words", "told"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS.keys())
def test_wrong_folders_are_refused_in_a_line(distillbench, folders, tmp_path, words, told):
    (tmp_path / "empty").mkdir()
    paint(tmp_path / "few", 3, 0)
    for name in ("mixed", "corrupt"):
        shutil.copytree(folders[0], tmp_path / name)
    Image.new("RGB", (8, 16)).save(tmp_path / "mixed" / "bad.png")
    (tmp_path / "corrupt" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "few.txt").write_text("a\nb\n")
    (tmp_path / "hole.txt").write_text("a\n\nb\n")
    (tmp_path / "bad.jsonl").write_text("a cat\n")
    (tmp_path / "other.jsonl").write_text('{"file": "000.png", "caption": "a"}\n')
    status, out, err = distillbench("score", *words.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert told in err
    assert not (tmp_path / "store" / "records").exists()
