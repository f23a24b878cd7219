"""Scores of image sets: the formulas by brute force, intervals against fresh samples, features kept by content."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from distillbench.data.image_folder import ImageFolder
from distillbench.errors import UsageError
from distillbench.metrics import feature_cache
from distillbench.metrics.diversity import group_diversity
from distillbench.metrics.extractors import Pixels8x8, extractor_identity
from distillbench.metrics.feature_cache import FeatureCache, features_of_folder
from distillbench.metrics.images import (
    SCORES,
    Reference,
    balls_around,
    deviations,
    image_scores,
    prompt_diversities,
    see,
    seen_features,
    values,
)
from distillbench.metrics.kernel import kernel_distance
from distillbench.metrics.prdc import prdc

WIDTH = 6


def rows(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, WIDTH))


def grouped(prompts: int, each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples whose prompts differ more from each other than the samples of one prompt do."""
    random = np.random.default_rng(seed)
    number = np.repeat(np.arange(prompts), each)
    return random.normal(0, 1, (prompts, WIDTH))[number] + random.normal(0, 0.5, (len(number), WIDTH)), number


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / WIDTH + 1) ** 3)


def test_every_value_is_its_formula_by_brute_force():
    x, y, prompts = rows(24, 0), rows(20, 1, 0.3), np.repeat(np.arange(6), 4)
    found = values(seen_features(x, prompts), Reference(y, "r"))
    radii = {k: [sorted(float(((a - b) ** 2).sum()) for b in y)[k] for a in y] for k in (3, 5)}
    own = [sorted(float(((a - b) ** 2).sum()) for b in x)[3] for a in x]
    far = [[float(((a - b) ** 2).sum()) for b in y] for a in x]
    assert found["precision"] == pytest.approx(np.mean([any(d <= r for d, r in zip(row, radii[3], strict=True)) for row in far]))
    assert found["recall"] == pytest.approx(np.mean([any(far[i][j] <= own[i] for i in range(24)) for j in range(20)]))
    assert found["density"] == pytest.approx(sum(d < r for row in far for d, r in zip(row, radii[5], strict=True)) / (5 * 24))
    assert found["coverage"] == pytest.approx(np.mean([any(far[i][j] < radii[5][j] for i in range(24)) for j in range(20)]))
    pairs = [np.mean([cubic(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
    assert found["kid"] == pytest.approx(sum(pairs) - 2 * np.mean([[cubic(a, b) for b in y] for a in x]))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    spectrum = np.linalg.eigvalsh(unit @ unit.T / 24)
    assert found["vendi"] == pytest.approx(np.exp(-sum(v * np.log(v) for v in spectrum if v > 1e-12)))
    within = [np.mean([1 - unit[a] @ unit[b] for a, b in itertools.combinations(np.flatnonzero(prompts == p), 2)]) for p in range(6)]
    assert found["diversity"] == pytest.approx(np.mean(within))
    roots = np.sqrt(np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).real)
    gap = x.mean(0) - y.mean(0)
    assert found["fd"] == pytest.approx(gap @ gap + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * roots.sum())


def test_counts_per_sample_have_the_means_of_prdc(monkeypatch):
    x, reference = rows(70, 0), Reference(rows(50, 1, 0.5), "r")
    whole = balls_around(x, reference)
    shares = prdc(x, reference.features)
    assert (whole[0].mean(), whole[1].mean()) == pytest.approx((shares.precision, shares.density))
    monkeypatch.setattr("distillbench.metrics.images.BLOCK", 16)
    for once, again in zip(whole, balls_around(x, Reference(reference.features, "r")), strict=True):
        np.testing.assert_array_equal(once, again)


def test_a_set_is_at_the_floor_to_itself_and_order_does_not_matter():
    x, prompts = grouped(20, 4, 0)
    seen, reference = seen_features(x, prompts), Reference(rows(60, 1), "r")
    assert values(seen, Reference(x, "x"))["fd"] < 1e-8
    order = np.random.default_rng(2).permutation(len(x))
    again = values(seen_features(x[order], prompts[order] * 7 + 3), reference)
    assert again == pytest.approx(values(seen, reference), rel=1e-9)


def test_diversity_agrees_with_the_general_one_and_needs_four_images_of_each_prompt():
    x, prompts = grouped(9, 5, 0)
    seen = seen_features(x, prompts)
    assert prompt_diversities(seen).mean() == pytest.approx(group_diversity(x, prompts), rel=1e-12)
    assert prompt_diversities(seen_features(np.repeat(x[:3], 4, 0), np.repeat([5, 1, 9], 4))) == pytest.approx([0, 0, 0], abs=1e-12)
    assert "diversity" not in values(seen_features(x[:-2], prompts[:-2]), Reference(x, "r"))
    with pytest.raises(UsageError, match="a prompt has one image"):
        prompt_diversities(seen_features(x))


def test_intervals_are_as_wide_as_fresh_samples_scatter():
    """Over 60 fresh sets of prompts and samples; the standard deviation of so many is known to a tenth, that of 16 draws to a fifth."""
    reference = Reference(grouped(300, 1, 10_000)[0] + 0.4, "r")
    found, moved = [], []
    for seed in range(60):
        seen = seen_features(*grouped(60, 4, seed))
        found.append(values(seen, reference))
        if seed < 12:
            moved.append(deviations(seen, found[-1], reference))
    for name in ("fd", "kid", "precision", "density", "diversity"):
        truth = np.std([value[name] for value in found], ddof=1)
        stated = np.mean([deviation[name] for deviation in moved])
        assert 0.7 < stated / truth < 1.4, (name, stated, truth)
    without = [{name: value for name, value in found[seed].items() if name != "diversity"} for seed in range(6)]
    alone = [deviations(seen_features(grouped(60, 4, seed)[0]), without[seed], reference) for seed in range(6)]
    assert np.mean([d["fd"] for d in alone]) < 0.8 * np.mean([d["fd"] for d in moved]), "images of one prompt are not independent"


def test_the_kernel_s_interval_counts_no_image_as_a_pair_with_itself(monkeypatch):
    from distillbench.metrics import images

    x, y, prompts = rows(40, 0), rows(30, 1), np.repeat(np.arange(10), 4)
    draws = images._draws(seen_features(x, prompts))
    brute = []
    for drawn in draws:
        pairs = [cubic(x[a], x[b]) for a, b in itertools.permutations(drawn, 2) if a != b]
        brute.append(np.mean(pairs) - 2 * np.mean([[cubic(x[a], b) for b in y] for a in drawn]))
    assert images._kernel_deviation(x, y, draws) == pytest.approx(np.std(brute, ddof=1), rel=1e-9)
    monkeypatch.setattr(images, "BLOCK", 7)
    assert images._kernel_deviation(x, y, draws) == pytest.approx(np.std(brute, ddof=1), rel=1e-9)
    assert kernel_distance(x, x[::-1]) < 0


def test_scores_are_named_by_their_extractor_and_compare_only_with_their_like():
    x, prompts = grouped(12, 4, 0)
    seen, reference, extractor = seen_features(x, prompts), Reference(rows(40, 1), "a" * 64), Pixels8x8((32, 32))
    scores = {score.name: score for score in image_scores(seen, reference, extractor, teacher=Reference(x + 0.1, "t"), seeds=range(48))}
    assert list(scores) == list(SCORES)
    fd = scores["fd"]
    assert (fd.identity["metric"], fd.n, fd.identity["n_reference"]) == ("fd/pixels8x8", 48, 40)
    assert fd.identity["preprocessing"][0].startswith("from 32 x 32 to 64 x 64: PIL bicubic")
    assert scores["fidelity-fd"].identity["reference_sha256"] == "t"
    assert all(score.low < score.value < score.high for score in scores.values() if 0 < score.value != 1)
    others = (
        image_scores(seen, dataclasses.replace(reference, sha256="b" * 64), extractor, seeds=range(48)),
        image_scores(seen, reference, Pixels8x8(), seeds=range(48)),
        image_scores(seen, reference, extractor, seeds=range(48), image_steps=("alpha on white",)),
        image_scores(seen, reference, extractor, seeds=range(1, 49)),
    )
    assert len({fd.key, *(other[0].key for other in others)}) == 5


def test_what_cannot_be_taken_has_no_value_and_says_why():
    scores = {score.name: score for score in image_scores(seen_features(rows(30, 0)), Reference(rows(30, 1), "r"), Pixels8x8())}
    assert (scores["diversity"].value, scores["diversity"].low) == (None, None)
    assert "fewer than 4 images" in scores["diversity"].note
    assert "fidelity-fd" not in scores
    one_prompt = image_scores(seen_features(rows(30, 0), np.zeros(30)), Reference(rows(30, 1), "r"), Pixels8x8())
    assert all(score.low is None and score.value is not None for score in one_prompt)
    with pytest.raises(UsageError, match="one per sample"):
        seen_features(rows(30, 0), [1, 2])


def test_images_are_seen_through_the_extractor():
    images = torch.randint(0, 256, (10, 3, 64, 64), generator=torch.manual_seed(0)).byte()
    assert np.array_equal(see(images, Pixels8x8()).features, Pixels8x8()(images).double().numpy())


# ---------------------------------------------------------------------- features kept by content


class Counting(Pixels8x8):
    """Counts the images it has been given, and can be stopped after some."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.seen, self.stop = 0, stop

    def __call__(self, images):
        if self.stop is not None and self.seen >= self.stop:
            raise KeyboardInterrupt
        self.seen += len(images)
        return super().__call__(images)


def folder_of(path, n: int, seed: int = 0):
    path.mkdir()
    for k, picture in enumerate(np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(path / f"{k:03d}.png")
    return path


def test_features_of_a_folder_are_taken_once(tmp_path):
    pictures, cache, extractor = folder_of(tmp_path / "images", 30), tmp_path / "cache", Counting()
    direct = features_of_folder(ImageFolder(pictures), Pixels8x8())
    first = features_of_folder(ImageFolder(pictures), extractor, cache, batch=7)
    again = features_of_folder(ImageFolder(pictures), extractor, cache)
    assert (first.taken, again.taken, extractor.seen) == (30, 0, 30)
    assert first.names == again.names == list(ImageFolder(pictures).names)
    for other in (first, again):
        torch.testing.assert_close(other.features, direct.features, rtol=0, atol=0)
    (pictures / "010.png").rename(pictures / "900.png")  # the same content elsewhere
    Image.new("RGB", (8, 8), "red").save(pictures / "011.png")
    moved = features_of_folder(ImageFolder(pictures), extractor, cache)
    assert (moved.taken, extractor.seen) == (1, 31)
    torch.testing.assert_close(moved.features[-1], first.features[10], rtol=0, atol=0)
    assert features_of_folder(ImageFolder(pictures, resize=4), extractor, cache).taken == 30, "another way of reading is another feature"


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "ROWS", 10)
    pictures, cache = folder_of(tmp_path / "images", 40), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        features_of_folder(ImageFolder(pictures), Counting(stop=20), cache, batch=5)
    (folder,) = cache.iterdir()
    shards = set(folder.iterdir())
    assert len(shards) == 2
    whole = features_of_folder(ImageFolder(pictures), Pixels8x8(), cache, batch=5)
    assert whole.taken == 20
    assert shards < set(folder.iterdir()), "shards are only ever added"
    torch.testing.assert_close(whole.features, features_of_folder(ImageFolder(pictures), Pixels8x8()).features, rtol=0, atol=0)


def test_what_a_kill_or_a_fault_leaves_is_taken_again(tmp_path):
    pictures, cache, extractor = folder_of(tmp_path / "images", 12), tmp_path / "cache", Counting()
    whole = features_of_folder(ImageFolder(pictures), extractor, cache)
    (shard,) = next(cache.iterdir()).iterdir()
    (shard.parent / ".0123456789abcdef.tmp").write_bytes(shard.read_bytes()[:100])  # a write that was cut off
    content = shard.read_bytes()
    identity = extractor_identity(extractor, ImageFolder(pictures).reading)
    for wrong in (content[:-5], content[:-1] + bytes([content[-1] ^ 1]), b""):
        shard.write_bytes(wrong)
        known = FeatureCache(cache, identity, extractor.width)
        assert len(known) == 0
        assert len(known.problems) == 1
        assert "taken again" in known.problems[0]
    again = features_of_folder(ImageFolder(pictures), extractor, cache)
    assert again.taken == 12
    torch.testing.assert_close(again.features, whole.features, rtol=0, atol=0)


def test_an_unreadable_file_has_no_features(tmp_path):
    pictures = folder_of(tmp_path / "images", 5)
    content = (pictures / "002.png").read_bytes()
    (pictures / "002.png").write_bytes(content[:60])
    for _ in range(2):
        images = ImageFolder(pictures)
        found = features_of_folder(images, Pixels8x8(), tmp_path / "cache")
        assert found.names == ["000.png", "001.png", "003.png", "004.png"]
        with pytest.raises(UsageError, match=r"4 usable images of the 5 needed: 002\.png"):
            images.require()


def test_a_cache_says_what_it_lacks():
    cache = FeatureCache(None, "0" * 64, 3)
    cache.put(["a" * 64], torch.ones(1, 3))
    assert cache.get(["a" * 64, "a" * 64]).tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(UsageError, match="1 of 2 files have no features yet"):
        cache.get(["a" * 64, "b" * 64])
    with pytest.raises(UsageError, match=r"not \(1, 3\)"):
        cache.put(["b" * 64], torch.ones(1, 4))
