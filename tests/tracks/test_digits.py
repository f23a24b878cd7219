"""The track on real digits: its teacher and classifier are what their cards say, and its scores move where they should."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillbench.api import is_external
from distillbench.data.digits import load_digits
from distillbench.errors import BadFileError, UsageError
from distillbench.metrics.digits import PARTS, evaluation_labels, frechet_infinity_in_order, held_out, nearest_training
from distillbench.metrics.frechet import frechet_distance
from distillbench.networks import Transformer
from distillbench.randomness import generator_for
from distillbench.teachers.cards import read_card
from distillbench.teachers.digits import CONFIG, _fit, held_out_loss, reference_features, sample, shifted, training_batch
from distillbench.teachers.digits_classifier import DigitsClassifier, accuracy, features_of, load_classifier
from distillbench.teachers.zoo import zoo_folder
from distillbench.tracks.digits import Digits


@pytest.fixture(scope="module")
def track() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def floor(track: Digits) -> dict[str, float]:
    return {score.name: score.value for score in track.floor()}


@pytest.fixture(scope="module")
def held_out_twice() -> Tensor:
    """The held-out images, each twice, in the order of the labels asked for."""
    digits = load_digits("held-out")
    rows = torch.stack([(digits.labels == label).nonzero().flatten().repeat(2) for label in range(10)], 1).flatten()
    assert torch.equal(digits.labels[rows], evaluation_labels())
    return digits.images[rows]


def scores_of(track: Digits, x: Tensor) -> dict[str, float]:
    return {score.name: score.value for score in track.score(x)}


def test_the_classifier_is_what_its_card_says() -> None:
    card = read_card(zoo_folder("digits-classifier"))
    assert card["held_out_accuracy"] >= 0.965
    assert accuracy(load_classifier()) == pytest.approx(card["held_out_accuracy"], abs=1e-3)
    assert sum(p.numel() for p in load_classifier().parameters()) == card["parameters"]


def test_features_do_not_depend_on_the_batch() -> None:
    images = load_digits("held-out").images[:600]
    torch.testing.assert_close(features_of(images)[500:510], features_of(images[500:510]), rtol=1e-5, atol=1e-5)


def test_a_damaged_classifier_is_refused(tmp_path) -> None:
    shutil.copytree(zoo_folder("digits-classifier"), tmp_path / "it")
    path = tmp_path / "it" / "network.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadFileError, match="checksum"):
        load_classifier(tmp_path / "it")


def test_damaged_reference_features_are_refused(tmp_path) -> None:
    shutil.copytree(zoo_folder("digits"), tmp_path / "it")
    path = tmp_path / "it" / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadFileError, match=r"reference\.safetensors"):
        reference_features(tmp_path / "it")


def test_the_teacher_is_small_frozen_and_what_its_card_says(track: Digits) -> None:
    teacher = track.teacher()
    parameters = sum(p.numel() for p in teacher.network.parameters())
    assert parameters < 500_000
    assert parameters == read_card(zoo_folder("digits"))["parameters"]
    assert is_external(teacher)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_scores_what_its_card_says(track: Digits) -> None:
    conditions, seeds = track.evaluation()
    x = sample(track.teacher(), conditions.field("label"), seeds, 2)
    stated = read_card(zoo_folder("digits"))["scores"]["2"]
    found = scores_of(track, x)
    for name in ("fd", "fidelity-fd", "diversity", "nearest"):
        assert found[name] == pytest.approx(stated[name], rel=1e-3)


def test_scores_have_names_identities_and_intervals(track: Digits, held_out_twice: Tensor) -> None:
    scores = track.score(held_out_twice)
    assert tuple(score.name for score in scores) == track.facts.columns
    assert len({score.key for score in scores}) == len(scores)
    assert scores[0].identity["metric"] == "fd/digits-cnn64@28"
    for score, of_floor in zip(scores, track.floor(), strict=True):
        assert score.low <= score.value <= score.high
        assert score.key == of_floor.key
        assert score.n == track.evaluations or score.name == "nearest"
    assert [score.to_json() for score in track.score(held_out_twice)] == [score.to_json() for score in scores]


def test_the_reference_itself_is_below_the_floor(track: Digits, floor: dict[str, float], held_out_twice: Tensor) -> None:
    found = scores_of(track, held_out_twice)
    assert found["fd"] < floor["fd"]
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["nearest"] == pytest.approx(1)
    assert found["diversity"] == pytest.approx(1, abs=0.02)
    assert found["label-agreement"] > 0.96


def test_fd_inf_is_the_line_through_parts_of_equal_class_counts(track: Digits) -> None:
    found = {score.name: score for score in track.score(track.truth())}
    features, reference = features_of(track.truth()).double().numpy(), held_out().features
    means = []
    for k in PARTS:
        parts = np.split(features, k)
        assert all(np.bincount(labels).tolist() == [200 // k] * 10 for labels in np.split(evaluation_labels().numpy(), k))
        means.append(np.mean([frechet_distance(part, reference) for part in parts]))
    assert means == sorted(means)
    assert found["fd-inf"].value == pytest.approx(np.polyfit(np.array(PARTS) / len(features), means, 1)[1], rel=1e-9)
    assert found["fd-inf"].value < found["fd"].value == pytest.approx(means[0], rel=1e-9)
    assert found["fd-inf"].identity["metric"] == "fd-inf/digits-cnn64@28"
    assert str(PARTS) in found["fd-inf"].identity["estimator"]


def test_fd_inf_does_not_depend_on_the_number_of_samples_where_fd_does() -> None:
    """Samples drawn by class from the training images, whose distance to the reference is known: that of all of them."""
    train, reference, rng = load_digits("train"), held_out().features, np.random.default_rng(0)
    features = features_of(train.images).double().numpy()
    of_class = [np.flatnonzero(train.labels.numpy() == label) for label in range(10)]
    assert {len(rows) for rows in of_class} == {400}
    truth = frechet_distance(features, reference)
    for per_class, fd_bias in ((100, 2.0), (200, 1.0)):
        fd, at_infinity = [], []
        for _ in range(40):
            drawn = features[np.stack([rng.choice(rows, per_class) for rows in of_class], 1).ravel()]
            fd.append(frechet_distance(drawn, reference))
            at_infinity.append(frechet_infinity_in_order(drawn, reference))
        assert np.mean(fd) - truth > fd_bias
        assert abs(np.mean(at_infinity) - truth) < 3 * np.std(at_infinity, ddof=1) / np.sqrt(len(at_infinity))


def test_images_copied_from_training_are_seen(track: Digits) -> None:
    train = load_digits("train")
    rows = torch.stack([(train.labels == label).nonzero().flatten()[:200] for label in range(10)], 1).flatten()
    assert scores_of(track, train.images[rows])["nearest"] == 0
    assert nearest_training(train.images[:3] * 0.5).tolist() == pytest.approx(
        (train.images[:3] * 0.5).square().mean((1, 2, 3)).sqrt().tolist(), abs=1e-6
    )


def test_each_fault_moves_its_score(track: Digits, floor: dict[str, float], held_out_twice: Tensor) -> None:
    blurred = scores_of(track, F.avg_pool2d(held_out_twice, 5, stride=1, padding=2, count_include_pad=False))
    assert blurred["fd"] > 30 * floor["fd"]
    assert blurred["recall"] < 0.2
    assert blurred["diversity"] < 0.8
    thick = scores_of(track, F.max_pool2d(held_out_twice, 3, stride=1, padding=1))
    assert thick["fd"] > 30 * floor["fd"]
    assert thick["precision"] < 0.6
    assert thick["density"] < 0.5
    assert thick["nearest"] > 1.2
    one_each = held_out_twice[:10].repeat(200, 1, 1, 1)
    one_each = (one_each + 0.02 * torch.randn(one_each.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    dropped = scores_of(track, one_each)
    assert dropped["fd"] > 30 * floor["fd"]
    assert dropped["recall"] < 0.2
    assert dropped["coverage"] < 0.2
    assert dropped["diversity"] < 0.3
    assert dropped["precision"] > 0.8
    rolled = scores_of(track, held_out_twice.roll(1, 0))
    assert rolled["fd"] == pytest.approx(scores_of(track, held_out_twice)["fd"], abs=1e-6)
    assert rolled["label-agreement"] < 0.05


def test_samples_of_another_shape_are_refused(track: Digits) -> None:
    with pytest.raises(UsageError, match="2000, 1, 28, 28"):
        track.score(torch.zeros(10, 1, 28, 28))


def test_training_batches_are_on_the_flow() -> None:
    x, t, conditions, velocity = training_batch(load_digits("train"), 512, torch.Generator().manual_seed(0))
    x0 = x - t[:, None, None, None] * velocity
    assert x0.min() == pytest.approx(-1, abs=1e-5)
    assert x0.max() == pytest.approx(1, abs=1e-5)
    assert (conditions.field("label") == 10).float().mean().item() == pytest.approx(0.1, abs=0.05)
    assert (x0 + velocity).std().item() == pytest.approx(1, abs=0.01)


def test_shifting_moves_whole_pixels() -> None:
    images = load_digits("train").images[:50]
    moved = shifted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    for before, after in zip(images, moved, strict=True):
        candidates = [F.pad(before, (1, 1, 1, 1), value=-1.0)[:, i : i + 28, j : j + 28] for i in range(3) for j in range(3)]
        assert any(torch.equal(after, candidate) for candidate in candidates)


def test_an_untrained_classifier_has_other_features() -> None:
    images = load_digits("held-out").images[:10]
    assert not torch.allclose(features_of(images, DigitsClassifier()), features_of(images))


def test_training_is_repeatable_and_learns() -> None:
    lines: list[str] = []
    first, again = (_fit(load_digits("train"), lines.append, 6, 0) for _ in range(2))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = Transformer(CONFIG, generator_for(0, "teacher/weights", 0))
    assert held_out_loss(first) < held_out_loss(fresh)
    assert held_out_loss(Digits().teacher().network) < 0.2
