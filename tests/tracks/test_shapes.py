"""The tracks on captioned scenes: the shipped teachers, what they are scored on, and that bad input is named."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")

from distillbench.data.shapes import CAPTIONS, PER_CAPTION
from distillbench.errors import BadFileError, UsageError
from distillbench.metrics.extractors import to_uint8
from distillbench.metrics.shapes_checker import attributes
from distillbench.parts.student import FewStepStudent
from distillbench.teachers import shapes_pipelines
from distillbench.teachers.cards import read_card
from distillbench.teachers.shapes_pipelines import PIPELINE
from distillbench.teachers.zoo import zoo_folder
from distillbench.tracks import get_track
from distillbench.tracks import shapes as module

NAMES = ("shapes-sd", "shapes-sana")
LIMIT = 16 * 2**20  # bytes that both teachers together may take


@pytest.fixture(scope="module", params=NAMES)
def track(request):
    return get_track(request.param)


@pytest.fixture(scope="module")
def few(track):
    """The first captions with their samples from the teacher in 50 steps."""
    conditions, seeds = track.evaluation()
    rows = list(range(0, 240, PER_CAPTION))
    return track.sample_teacher(conditions[rows], [seeds[row] for row in rows], 50).x


def test_the_evaluation_has_four_samples_of_each_caption(track):
    conditions, seeds = track.evaluation()
    prompts = conditions.field("prompt")
    assert len(prompts) == len(seeds) == track.evaluations == CAPTIONS * PER_CAPTION
    assert prompts[0] == prompts[PER_CAPTION - 1] != prompts[PER_CAPTION]
    assert track.opened().too_long(track.prompts()) == []


def test_the_teacher_does_what_captions_say(track, few):
    scenes = track.scenes()[: len(few)]
    table = attributes(to_uint8(track.decode(few)), scenes)
    shares = {name: torch.tensor(values).nanmean().item() for name, values in table.items()}
    assert min(shares["object"], shares["colour"], shares["position"]) >= 0.9, shares
    assert few.shape[1:] == track.shape


def guided(name: str) -> dict[str, float]:
    card = read_card(zoo_folder(name))
    return card["scores"][f"guidance {card['guidance_scale']:g}"]["50 steps"]


@pytest.mark.parametrize("name", NAMES)
def test_cards_state_what_was_asked_of_the_teachers(name):
    card, found = read_card(zoo_folder(name)), guided(name)
    assert min(found["object"], found["colour"], found["position"]) >= 0.9
    assert min(found["count"], found["binding"]) >= 0.75
    assert card["parameters"]["denoiser"] <= 1e6
    plain = card["scores"]["guidance 1"]
    assert plain["1 steps"]["whole"] < 0.5 * plain["50 steps"]["whole"], "one step of the teacher must leave something to distil"
    assert plain["4 steps"]["fd"] > 1.05 * plain["50 steps"]["fd"], "a track that its teacher solves in 4 steps cannot rank methods"
    assert plain["4 steps"]["attributes"] < plain["50 steps"]["attributes"] - 0.05


def test_both_teachers_are_small():
    assert sum(file.stat().st_size for name in NAMES for file in zoo_folder(name).rglob("*") if file.is_file()) <= LIMIT


def test_truth_scores_better_than_nothing_and_a_sample_is_scored_as_its_image(track):
    x = track.truth()
    floor = {score.name: score for score in track.score(x)}
    assert list(floor) == list(track.facts.columns)
    assert floor["attributes"].value > 0.95
    again = track.score_images(to_uint8(track.decode(x)))
    assert [score.value for score in again] == [score.value for score in floor.values()]
    blank = {score.name: score for score in track.score_images(torch.full((track.evaluations, 3, 32, 32), 128, dtype=torch.uint8))}
    assert blank["fd"].value > 20 * floor["fd"].value
    assert blank["attributes"].value < 0.1


def test_a_sample_depends_on_its_caption_and_seed_alone(track, few):
    conditions, seeds = track.evaluation()
    row = 5 * PER_CAPTION
    alone = track.sample_teacher(conditions[[row]], [seeds[row]], 50).x
    assert torch.allclose(alone[0], few[5], atol=1e-4)


def test_training_data_is_a_function_of_the_generator(track):
    source = module.ShapesSource(track.opened(), scenes=64)
    x, conditions = source.draw(8, torch.Generator().manual_seed(0))
    again, _ = source.draw(8, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
    assert x.shape == (8, *track.shape)
    assert 0.5 < x.std() < 2
    assert conditions.field("tokens").shape[0] == len(source.conditions(8, torch.Generator().manual_seed(0)))
    assert conditions.null().field("tokens").shape == conditions.field("tokens").shape


def test_a_student_that_diffusers_cannot_sample_is_kept_without_a_pipeline_and_told_why(tmp_path):
    track = get_track("shapes-sd")
    grids = {1: (1.0,), 2: (1.0, 1e-6), 4: (1.0, 0.5, 0.0102, 0.0101)}  # the first row of the table; twice the same row
    track.export(FewStepStudent(track.opened().denoiser, grids, track.shape), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline-1", "pipeline-2.txt", "pipeline-4.txt"}
    assert "no pipeline for 2 steps: the student's last time is the first row" in (tmp_path / "pipeline-2.txt").read_text()
    assert "LCMScheduler cannot take 4 steps" in (tmp_path / "pipeline-4.txt").read_text()


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(zoo_folder("shapes-sd"), tmp_path / "shapes-sd")
    (tmp_path / "shapes-sd" / PIPELINE / "model_index.json").write_text("{}")
    monkeypatch.setattr(shapes_pipelines, "zoo_folder", lambda name: tmp_path / name)
    with pytest.raises(BadFileError, match="zoo train shapes-sd"):
        shapes_pipelines.shipped_pipeline("shapes-sd")


def test_too_few_images_are_refused(track):
    with pytest.raises(UsageError, match="2000 images, not 4"):
        track.score_images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
