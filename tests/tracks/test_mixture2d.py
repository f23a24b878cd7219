"""The track in the plane: its teacher is what its card says, its scores move where they should, and truth gets the floor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distillbench.api import is_external
from distillbench.data.mixture import Mixture, exact_denoiser, standard_mixture
from distillbench.diffusion import Denoiser, Flow, ddim, time_grid
from distillbench.errors import BadFileError, NonFiniteError, UsageError
from distillbench.metrics import mixture as metrics
from distillbench.metrics.score import Score
from distillbench.networks.files import sha256_file
from distillbench.randomness import sample_noise
from distillbench.teachers import mixture2d as teachers
from distillbench.teachers.files import open_teacher
from distillbench.teachers.zoo import load_teacher, zoo_card, zoo_folder
from distillbench.tracks import TRACKS, get_track
from distillbench.tracks.mixture2d import Mixture2D

Scores = dict[str, Score]


@pytest.fixture(scope="module")
def track() -> Mixture2D:
    return Mixture2D()


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return standard_mixture()


def sampled(track: Mixture2D, denoiser: Denoiser, steps: int) -> Tensor:
    conditions, seeds = track.evaluation()
    with torch.no_grad():
        return ddim(denoiser, sample_noise(seeds, track.shape), conditions, time_grid(denoiser.schedule, steps))


def by_name(scores: list[Score]) -> Scores:
    return {score.name: score for score in scores}


@pytest.fixture(scope="module")
def floor(track: Mixture2D) -> Scores:
    return by_name(track.floor())


@pytest.fixture(scope="module")
def teacher_50(track: Mixture2D) -> Scores:
    return by_name(track.score(sampled(track, track.teacher(), 50)))


@pytest.fixture(scope="module")
def teacher_4(track: Mixture2D) -> Scores:
    return by_name(track.score(sampled(track, track.teacher(), 4)))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo_folder("mixture2d"), tmp_path / "teacher"))


def test_truth_is_in_its_modes(floor):
    """Each mode holds 0.99 of its own samples; 4 standard errors of 8,192 of them, and the few of a neighbouring mode."""
    assert abs(floor["in-mode"].value - 0.99) < 4 * (0.99 * 0.01 / 8192) ** 0.5
    assert floor["coverage"].value == 1
    assert floor["mode-tv"].value < 0.03
    assert floor["sliced-w2"].value < 0.03
    assert floor["within-w2"].value < 0.12
    assert 0.94 < floor["class-acc"].value < 0.98


def test_exact_denoiser_reaches_the_floor(track, mixture, floor):
    exact = by_name(track.score(sampled(track, exact_denoiser(mixture, Flow()), 50)))
    assert exact["in-mode"].value > floor["in-mode"].value - 0.005
    for name in ("sliced-w2", "mode-tv", "fidelity-w2"):
        assert exact[name].low < floor[name].high, name


def test_teacher_is_close_at_50_and_visibly_short_at_4(floor, teacher_4, teacher_50):
    assert teacher_50["in-mode"].value > floor["in-mode"].value - 0.02
    assert teacher_50["sliced-w2"].low < floor["sliced-w2"].high
    assert teacher_4["in-mode"].high < teacher_50["in-mode"].value - 0.1
    for name in ("sliced-w2", "mode-tv", "within-w2", "fidelity-w2"):
        assert teacher_4[name].low > 2 * teacher_50[name].value, name
    assert teacher_4["class-acc"].high < teacher_50["class-acc"].low


def test_teacher_without_labels_draws_all_classes(track, mixture):
    teacher, n = track.teacher(), 2048
    conditions = mixture.conditions(torch.zeros(n, dtype=torch.int64)).null()
    with torch.no_grad():
        x = ddim(teacher, sample_noise(range(n), (2,)), conditions, time_grid(teacher.schedule, 50))
    assert (mixture.mahalanobis(x).flatten(1).amin(1) < 9.21).double().mean() > 0.96
    shares = mixture.class_posterior(x).mean(0)
    assert (shares - 1 / 8).abs().max() < 0.04


def test_velocity_error_is_that_of_the_card(track, mixture):
    found = teachers.velocity_errors(track.teacher(), mixture)
    stated = zoo_card("mixture2d")["relative velocity error"]
    assert found == pytest.approx(stated, rel=0.02)
    assert stated["with label"] < 0.02
    assert stated["without label"] < 0.05


def test_scores_are_the_metrics_on_all_samples(track, mixture, teacher_4):
    """The track scores class by class, which must give what the metrics give on everything at once."""
    x, labels = sampled(track, track.teacher(), 4), track.evaluation()[0].field("label")
    parameters = (mixture.means, mixture.covariances, mixture.weights)
    for name, metric in [
        ("in-mode", metrics.in_mode_rate),
        ("mode-tv", metrics.mode_mass_tv),
        ("within-w2", metrics.within_mode_w2),
        ("coverage", metrics.coverage),
        ("class-acc", metrics.class_accuracy),
    ]:
        assert teacher_4[name].value == pytest.approx(metric(x, labels, *parameters), abs=1e-12), name


def test_scores_are_deterministic_and_of_one_identity(track, floor, teacher_4):
    again = track.floor()
    assert tuple(score.name for score in again) == track.facts.columns
    assert again == list(floor.values())
    assert len({score.key for score in again}) == len(again)
    assert {score.key for score in again} == {score.key for score in teacher_4.values()}
    assert all(score.low <= score.value <= score.high and score.n == 8192 for score in again)
    assert next(score.name for score in again if score.higher_is_better) == track.facts.main


def test_interval_is_as_wide_as_the_scatter_of_fresh_samples(track, mixture, floor):
    """Fourteen fresh samples of truth scatter by sigma, known to a fifth; the interval is 2 x 1.96 sigma."""
    labels = track.evaluation()[0].field("label")
    samples = [mixture.sample(8192, torch.Generator().manual_seed(i), labels)[0] for i in range(14)]
    parameters = (mixture.means, mixture.covariances, mixture.weights)
    for name, metric in (("in-mode", metrics.in_mode_rate), ("class-acc", metrics.class_accuracy)):
        sigma = float(np.std([metric(x, labels, *parameters) for x in samples], ddof=1))
        assert 0.5 < (floor[name].high - floor[name].low) / (2 * 1.96 * sigma) < 2, name


def test_samples_of_the_wrong_classes(track, floor):
    wrong = by_name(track.score(track.truth().roll(1024, 0)))
    assert wrong["in-mode"].value < 0.15
    assert wrong["class-acc"].value < 0.05
    assert wrong["sliced-w2"].value == pytest.approx(floor["sliced-w2"].value, rel=1e-6)  # sees all classes together


def test_dropped_mode_is_seen(track, mixture, floor):
    x, labels = track.truth(), track.evaluation()[0].field("label")
    modes = mixture.responsibilities(x, labels).argmax(1)
    lost = (labels == 3) & (modes == 0)
    kept = x[(labels == 3) & (modes == 1)]
    moved = x.clone()
    moved[lost] = kept[: int(lost.sum())]
    scores = by_name(track.score(moved))
    assert scores["coverage"].value == 31 / 32
    assert scores["in-mode"].value >= floor["in-mode"].value - 0.001
    assert scores["mode-tv"].value > floor["mode-tv"].value + 0.5 * mixture.weights[3, 0].item() / 8


def test_evaluation_is_balanced_and_apart_from_the_reference(track):
    conditions, seeds = track.evaluation()
    assert conditions.field("label").bincount().tolist() == [1024] * 8
    assert len(set(seeds)) == len(seeds) == track.evaluations
    assert track.truth().shape == (8192, 2)
    assert track.catalog().field("label").tolist() == list(range(8))


def test_what_cannot_be_scored(track):
    with pytest.raises(UsageError, match=r"\(8192, 2\)"):
        track.score(torch.zeros(100, 2))
    x = track.truth()
    x[7] = float("nan")
    with pytest.raises(NonFiniteError, match="2 values"):
        track.score(x)


def test_teacher_is_shipped_frozen_and_whole(track):
    teacher, card = load_teacher("mixture2d"), zoo_card("mixture2d")
    assert is_external(teacher)
    assert is_external(teacher.network)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert sha256_file(zoo_folder("mixture2d") / "network.safetensors") == card["sha256"]
    assert sum(p.numel() for p in teacher.parameters()) == card["parameters"] < 50_000
    assert track.teacher() is track.teacher()
    x, conditions = track.source().draw(8, torch.Generator().manual_seed(0))
    assert teacher.velocity(x, 0.5, conditions).shape == (8, 2)


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_truncated_weights_are_refused(copied, keep):
    weights = copied / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(BadFileError, match=r"network\.safetensors"):
        open_teacher(copied)


def test_other_weights_are_refused_even_with_their_own_description(copied):
    """network.json states a checksum too: the card's is the one that counts."""
    weights, description = copied / "network.safetensors", copied / "network.json"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    description.write_text(json.dumps({**json.loads(description.read_text()), "sha256": sha256_file(weights)}))
    with pytest.raises(BadFileError, match="not what its card states"):
        open_teacher(copied)


@pytest.mark.parametrize("text", ["", "[]", '{"sha256": 3}', "{" * 100_000])
def test_broken_cards_are_refused(copied, text):
    (copied / "card.json").write_text(text)
    with pytest.raises(BadFileError, match=r"card\.json"):
        open_teacher(copied)


@pytest.mark.parametrize("change", [{"schedule": {"name": "no such"}}, {"prediction": "future"}, {"schedule": None}])
def test_card_must_say_how_to_read_the_network(copied, change):
    path = copied / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadFileError, match=r"card\.json"):
        open_teacher(copied)


def test_training_is_deterministic_and_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "SCORED_PER_CLASS", 64)
    monkeypatch.setattr(teachers, "ERROR_SAMPLES", 1024)
    cards = [teachers.train(tmp_path / name, lambda _: None, steps=3, seed=1) for name in ("a", "b")]
    assert cards[0]["sha256"] == cards[1]["sha256"] != zoo_card("mixture2d")["sha256"]
    assert cards[0].keys() == zoo_card("mixture2d").keys()
    assert open_teacher(tmp_path / "a").to_config() == load_teacher("mixture2d").to_config()


def test_tracks_by_name():
    assert "mixture2d" in TRACKS
    assert get_track("mixture2d") is get_track("mixture2d@1")
    for name in ("mixture2", "mixture2d@2", ""):
        with pytest.raises(UsageError, match="mixture2d"):
            get_track(name)


def test_names_of_tracks_and_teachers_need_no_torch():
    code = "import sys, distillbench.tracks, distillbench.teachers.zoo as z; z.zoo_card('mixture2d'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
