"""CLIP-shapes: it reads the captions of `shapes` and nothing else, tells single attributes apart, and is what its card says."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from distillbench.data.shapes import LEFT_OPEN, PHRASINGS, draw_captions, draw_scenes, fits, render
from distillbench.errors import BadFileError, UsageError
from distillbench.randomness import generator_for
from distillbench.teachers.zoo import zoo_card, zoo_folder

pytest.importorskip("open_clip", reason="open_clip, in whose format CLIP-shapes is, is not installed")
from distillbench.metrics.clip_shapes import clipcos
from distillbench.teachers import clip_shapes
from distillbench.teachers.clip_shapes import changed, cosines, load_clip, own_scores, tokenize


@pytest.fixture(scope="module")
def drawn():
    """Scenes of both kinds of combination, their pictures and captions."""
    generator = generator_for(3, "test/clip-shapes", 0)
    scenes = [scene for held_out in (False, True) for scene in draw_scenes(120, generator, held_out=held_out, left_open=LEFT_OPEN)]
    return scenes, render(scenes, generator), draw_captions(scenes, generator)


def test_every_caption_has_tokens_and_no_other_text_has(drawn):
    scenes, _, _ = drawn
    captions = [scene.caption(phrasing) for scene in scenes for phrasing in range(len(PHRASINGS))]
    tokens = tokenize(captions)
    assert (tokens.argmax(1) == (tokens == clip_shapes.END).int().argmax(1)).all(), "open_clip reads out at the largest token"
    assert (tokens == clip_shapes.END).sum(1).tolist() == [1] * len(captions)
    assert len({tuple(row) for row in tokens.tolist()}) == len(set(captions))
    assert torch.equal(tokenize(["A red circle, above a blue square."]), tokenize(["a red circle above a blue square"]))
    with pytest.raises(UsageError, match="not 'dog'"):
        tokenize(["a red dog"])
    with pytest.raises(UsageError, match=r"at most 16 words and .* has 17"):
        tokenize(["red " * 17])


def test_a_changed_scene_differs_in_the_named_attribute_alone(drawn):
    scenes, _, _ = drawn
    fields = {"background": "background", "size": "size", "position": "place", "relation": "place", "count": "number", "binding": "objects"}
    seen = set()
    for scene in scenes:
        for attribute, others in changed(scene).items():
            seen.add(attribute)
            assert others
            assert scene not in others
            assert len(set(others)) == len(others)
            assert not fits(others, [scene]).any(), "a changed caption is false of the picture"
            for other in others:
                differs = {f.name for f in dataclasses.fields(scene) if getattr(scene, f.name) != getattr(other, f.name)}
                assert differs == {fields.get(attribute, "objects")}
                if attribute in ("colour", "object"):
                    words = [(a, b) for old, new in zip(scene.objects, other.objects, strict=True) for a, b in zip(old, new, strict=True)]
                    assert sum(a != b for a, b in words) == 1
    assert seen == {"background", "colour", "object", "size", "position", "relation", "binding", "count"}


def test_training_never_meets_a_held_out_combination(drawn):
    scenes, _, _ = drawn
    generator = generator_for(0, "test/near", 0)
    for scene in scenes[:120]:
        near = clip_shapes._near(scene, generator)
        assert len(near) == clip_shapes.NEAR
        assert not any(other.held_out for other in near)


def test_it_is_what_its_card_says():
    card = zoo_card("clip-shapes")
    net = load_clip()
    assert card["parameters"] == sum(p.numel() for p in net.parameters())
    assert sum(file.stat().st_size for file in zoo_folder("clip-shapes").iterdir()) < 2e6
    found = own_scores(net, held_out=True, n=300)
    for attribute, share in found["beats_one_changed"].items():
        stated = card["held_out"]["beats_one_changed"][attribute]
        # 300 scenes hold at least 60 with the attribute: four standard deviations of a share of 60, and of the card's own of 200.
        assert abs(share - stated) <= 4 * (max(stated * (1 - stated), 0.01) * (1 / 60 + 1 / 200)) ** 0.5, attribute
        assert share > 0.7, attribute


def test_the_score_falls_when_captions_are_exchanged(drawn):
    _, images, captions = drawn
    true = clipcos(images, captions, seeds=range(240))
    exchanged = clipcos(images, captions[1:] + captions[:1], seeds=range(240))
    assert exchanged.high < true.low
    assert (true.identity["metric"], true.n, true.name) == ("clipcos/clip-shapes", 240, "clipcos")
    assert true.identity["weights_sha256"] == zoo_card("clip-shapes")["sha256"]
    assert true.value == pytest.approx(float(cosines(images, captions).mean()), abs=1e-6)
    assert clipcos(images, captions, seeds=range(1, 241)).key != true.key


def test_the_interval_treats_pictures_of_one_caption_as_one(drawn):
    _, images, captions = drawn
    once, twice = clipcos(images, captions), clipcos(images.repeat(2, 1, 1, 1), captions * 2)
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=1e-5)
    alone = clipcos(images[:4], captions[:1] * 4)
    assert (alone.low, alone.high) == (None, None)


def test_a_cosine_does_not_depend_on_the_batch(drawn):
    _, images, captions = drawn
    whole = cosines(images, captions)
    parts = torch.cat([cosines(images[at : at + 7], captions[at : at + 7]) for at in range(0, 240, 7)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_wrong_input_is_named(drawn):
    _, images, captions = drawn
    with pytest.raises(UsageError, match="240 pictures have 239 captions"):
        cosines(images, captions[1:])
    with pytest.raises(UsageError, match="uint8 pictures"):
        cosines(images.float(), captions)
    with pytest.raises(UsageError, match="at least one picture"):
        clipcos(images[:0], [])


def test_damaged_files_are_refused(tmp_path):
    def copy(name: str):
        return shutil.copytree(zoo_folder("clip-shapes"), tmp_path / name)

    network = copy("cut") / "network.safetensors"
    network.write_bytes(network.read_bytes()[:-1])
    with pytest.raises(BadFileError, match="checksum differs"):
        load_clip(tmp_path / "cut")
    card = copy("words") / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"words": ["dog"]}))
    with pytest.raises(BadFileError, match=r"other words: distillbench zoo train clip-shapes"):
        load_clip(tmp_path / "words")
    with pytest.raises(BadFileError, match="cannot be read"):
        load_clip(tmp_path / "missing")


def test_training_is_reproducible_and_leaves_the_global_generator_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_shapes, "own_scores", lambda net, held_out: {})
    state = torch.get_rng_state()
    cards = [clip_shapes.train(tmp_path / str(k), lambda line: None, steps=2, seed=5) for k in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert cards[0]["sha256"] == cards[1]["sha256"]
    load_clip(tmp_path / "0")
