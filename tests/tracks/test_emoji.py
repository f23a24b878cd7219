"""The track `emoji`: the recipe of its teacher at toy size, the shipped one, and runs on a stand-in for the drawings."""

from __future__ import annotations

import pytest
import torch

from distillbench import tracks
from distillbench.data import emoji
from distillbench.errors import UsageError
from distillbench.teachers.zoo import zoo_card
from distillbench.tracks import get_track
from distillbench.tracks.facts import facts_of
from given_files import emoji_files, expect_emoji, write_files


@pytest.fixture(autouse=True)
def forget():
    yield
    tracks._made.cache_clear()


def test_emoji_is_trained_and_run_at_toy_size(tmp_path, monkeypatch, distillbench):
    from distillbench.teachers import emoji as training

    files = emoji_files(40)
    sha256 = expect_emoji(monkeypatch, files, 40)
    data = write_files(files, tmp_path / "package")
    assert "needs --data PATH" in distillbench("zoo", "train", "emoji").err
    assert "leave --data out" in distillbench("zoo", "train", "mixture2d", "--data", data).err
    few = {"steps": {"autoencoder": 3, "denoiser": 3}, "batch": {"autoencoder": 4, "denoiser": 4}}
    changes = {"autoencoder": {"block_out_channels": (8, 8, 8, 8)}, "network": {"block_out_channels": (8, 16)}}
    monkeypatch.setattr(training, "EVALUATED", (1, 2))
    card = training.train(tmp_path / "made", lambda line: None, data=data, **few, **changes)
    assert (card["data"]["sha256"], card["cost"]["denoiser"]["steps"]) == (sha256, 3)
    assert card["scores"].keys() == {"n", "against", "autoencoder", "guidance 1", "guidance 2"}
    assert card["scores"]["guidance 2"]["2 steps"]["fd"] > 0

    track = get_track("emoji", str(tmp_path / "made/pipeline"), str(data))
    held_out = track.drawings(held_out=True)
    assert (track.shape, track.guidance, track.evaluations) == ((16, 8, 8), training.GUIDANCE, 4 * len(held_out))
    assert set(track.drawings(held_out=False).captions).isdisjoint(track.prompts())
    conditions, seeds = track.evaluation()
    samples = track.sample_teacher(conditions, list(seeds), 1)
    found = {score.name: score for score in track.score(samples.x)}
    assert tuple(found) == facts_of("emoji").columns
    assert all(score.value is not None for score in found.values())
    floor = {score.name: score for score in track.floor()}
    train = track.drawings(held_out=False)
    assert (floor["fd"].n, floor["label-agreement"].n) == (len(train), len(held_out))
    assert floor["fd"].note == "real drawings through the teacher's autoencoder"
    assert (floor["diversity"].value, floor["diversity"].note[:8]) == (None, "not run:")
    assert (track.read_categories(track.extractor(train.images)) == train.labels.numpy()).mean() > 0.9
    x, drawn = track.source().draw(2, torch.Generator().manual_seed(0))
    assert x.shape == (2, 16, 8, 8)
    assert "tokens" in drawn


def test_emoji_ships_its_teacher_and_needs_the_drawings_alone(tmp_path, monkeypatch):
    card = zoo_card("emoji")
    assert (card["data"]["sha256"], card["data"]["images"]) == (emoji.PACKAGE.sha256, 1408)
    with pytest.raises(UsageError, match=r"needs --data PATH: the package of the drawings.*npm pack"):
        get_track("emoji").prompts()
    expect_emoji(monkeypatch, files := emoji_files())
    track = get_track("emoji", None, str(write_files(files, tmp_path)))
    assert (track.shape, track.image_size, track.guidance) == ((16, 8, 8), (64, 64), card["guidance_scale"])
    conditions = track.opened().conditions(["grinning face", "flag of sweden"])
    both = track.sample_teacher(conditions, [5, 6], 2).x
    assert torch.allclose(both[1:], track.sample_teacher(conditions[[1]], [6], 2).x, atol=1e-5)
    assert not torch.allclose(both[:1], track.sample_teacher(conditions[[1]], [5], 2).x, atol=1e-2)


def test_the_card_of_emojis_teacher_says_what_it_is_worth():
    scores = zoo_card("emoji")["scores"]
    guided = scores["guidance 2"]
    assert scores["autoencoder"]["fd"] < guided["50 steps"]["fd"] < guided["4 steps"]["fd"] < guided["1 steps"]["fd"]
    assert guided["50 steps"]["label-agreement"] > 1.5 * 95 / scores["n"]  # the largest category has 95 of the held-out names
