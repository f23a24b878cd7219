"""Scenes: captions say what is drawn, held-out combinations stay apart, and a picture depends on its row alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from distillbench.data.shapes import (
    BACKGROUNDS,
    CAPTIONS,
    COLOURS,
    KINDS,
    LEFT_OPEN,
    OPTIONAL,
    PER_CAPTION,
    SHAPES,
    Scene,
    area,
    cover,
    draw_captions,
    draw_scenes,
    evaluation_pictures,
    evaluation_scenes,
    fits,
    redrawn,
    render,
    words,
)

ONE = Scene("one", (("red", "circle"),), "white", size="small", place="on the left")
TWO = Scene("two", (("red", "circle"), ("blue", "square")), "grey", place="above")
COUNT = Scene("count", (("cyan", "triangle"),), "black", number=3)


def leaving_open(scene: Scene, *names: str) -> Scene:
    return replace(scene, unsaid=frozenset(names))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_training_and_held_out_scenes_share_no_combination():
    seen, kept = draw_scenes(3000, generator()), draw_scenes(500, generator(1), held_out=True)
    plain = {(s.kind, s.objects, s.size, s.place, s.number) for s in seen}
    assert not plain & {(s.kind, s.objects, s.size, s.place, s.number) for s in kept}
    assert {s.kind for s in seen} == set(KINDS) == {s.kind for s in kept}
    for held in (seen, kept):  # every word is seen in training and asked for in the evaluation
        assert {colour for s in held for colour, _ in s.objects} == set(COLOURS)
        assert {shape for s in held for _, shape in s.objects} == set(SHAPES)
        assert {s.background for s in held} == set(BACKGROUNDS)


def test_a_caption_states_everything_about_its_scene():
    assert ONE.caption() == "a small red circle on the left on a white background"
    assert TWO.caption(1) == "grey background with a red circle above a blue square"
    assert COUNT.caption(2) == "there are three cyan triangles, the background is black"


@pytest.mark.parametrize(
    ("scene", "unsaid", "phrasing", "caption"),
    [
        (ONE, ("size", "colour"), 0, "a circle on the left on a white background"),
        (ONE, ("place", "background"), 2, "there is a small red circle"),
        (ONE, OPTIONAL["one"], 1, "a circle"),
        (TWO, ("place", "second colour"), 0, "a red circle with a square on a grey background"),
        (TWO, ("colour", "background"), 2, "there is a circle above a blue square"),
        (COUNT, OPTIONAL["count"], 2, "there are three triangles"),
    ],
)
def test_a_caption_may_leave_things_open(scene, unsaid, phrasing, caption):
    assert leaving_open(scene, *unsaid).caption(phrasing) == caption


def test_training_meets_held_out_combinations_neither_in_words_nor_in_pictures():
    scenes = draw_scenes(2000, generator(), left_open=LEFT_OPEN)
    assert not any(scene.held_out or replace(scene, unsaid=frozenset()).held_out for scene in scenes)
    held_out = draw_scenes(500, generator(1), held_out=True, left_open=LEFT_OPEN)
    assert not {replace(scene.said, background="") for scene in scenes} & {replace(scene.said, background="") for scene in held_out}
    share = sum(len(scene.unsaid) / len(OPTIONAL[scene.kind]) for scene in scenes) / len(scenes)
    assert share == pytest.approx(LEFT_OPEN, abs=0.03)  # four standard deviations of 2,000 scenes with 2 to 4 attributes


def test_what_is_drawn_anew_is_what_was_left_open_and_all_of_it():
    g = generator()
    for scene in draw_scenes(200, g, left_open=LEFT_OPEN):
        assert redrawn(scene, g).said == scene.said
    open_scene = leaving_open(TWO, "colour", "place", "background")
    others = [redrawn(open_scene, g) for _ in range(300)]
    assert {scene.place for scene in others} == {"left of", "right of", "above", "below"}
    assert {scene.objects[0][0] for scene in others} == set(COLOURS) - {"blue"}  # two things of a scene differ in colour
    assert {scene.background for scene in others} == set(BACKGROUNDS)
    assert {scene.objects[1] for scene in others} == {("blue", "square")}
    assert redrawn(TWO, g) is TWO


def test_which_captions_are_true_of_which_scenes():
    mirrored = Scene("two", (("blue", "square"), ("red", "circle")), "grey", place="below")
    said = [leaving_open(ONE, "colour"), leaving_open(TWO, "place"), TWO, leaving_open(COUNT, *OPTIONAL["count"])]
    shown = [
        ONE,
        replace(ONE, objects=(("blue", "circle"),)),
        replace(ONE, size="large"),
        TWO,
        mirrored,
        replace(TWO, place="below"),
        COUNT,
    ]
    expected = [[1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    assert fits(said, shown).int().tolist() == expected
    scenes = draw_scenes(300, generator(), left_open=LEFT_OPEN)
    assert fits(scenes, [redrawn(scene, generator(1)) for scene in scenes]).diagonal().all()


def test_captions_have_no_other_words():
    scenes = draw_scenes(2000, generator(), left_open=LEFT_OPEN)
    assert {word for scene in scenes for k in range(3) for word in re.findall("[a-z]+", scene.caption(k))} == set(words())


def test_captions_tell_scenes_apart():
    scenes = draw_scenes(3000, generator())
    for phrasing in range(3):
        told = {scene.caption(phrasing) for scene in scenes}
        assert len(told) == len(set(scenes))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3.7, 6.6])
def test_a_shape_covers_its_area_around_its_centroid(shape, radius):
    mask = cover(shape, 15.3, 16.2, radius)
    line = torch.arange(32) + 0.5
    assert mask.sum().item() == pytest.approx(area(shape, radius), rel=0.05)
    assert (mask.sum(0) * line).sum().item() / mask.sum().item() == pytest.approx(15.3, abs=0.1)
    assert (mask.sum(1) * line).sum().item() / mask.sum().item() == pytest.approx(16.2, abs=0.3)


def test_pictures_are_a_function_of_scenes_and_seed():
    scenes = draw_scenes(20, generator())
    pictures = render(scenes, generator(3))
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (20, 3, 32, 32)
    assert torch.equal(pictures, render(scenes, generator(3)))
    assert not torch.equal(pictures, render(scenes, generator(4)))


def test_the_evaluation_is_fixed_and_held_out():
    scenes, captions = evaluation_scenes()
    assert len(set(captions)) == len(scenes) == CAPTIONS
    assert all(scene.held_out for scene in scenes)
    assert not any(scene.held_out for scene in evaluation_scenes(held_out=False)[0])
    reference, floor = evaluation_pictures("reference"), evaluation_pictures("floor")
    assert len(reference) == CAPTIONS * PER_CAPTION
    backgrounds = reference[:, 0, 0, 0].view(CAPTIONS, PER_CAPTION)  # its red tells the three apart
    varies = (backgrounds.max(1).values > backgrounds.min(1).values).tolist()
    said = [bool(scene.said.background) for scene in scenes]
    assert not any(v for v, s in zip(varies, said, strict=True) if s)
    assert sum(varies) > 0.9 * said.count(False)
    assert not torch.equal(reference, floor)


def test_captions_have_all_phrasings():
    scenes = draw_scenes(60, generator())
    starts = {caption.split()[0] for caption in draw_captions(scenes, generator(1))}
    assert "there" in starts
    assert "a" in starts
    assert starts & set(BACKGROUNDS)
