"""Scenes: captions say what is drawn, held-out combinations stay apart, and a picture depends on its row alone."""

from __future__ import annotations

import pytest
import torch

from distillbench.data.shapes import (
    BACKGROUNDS,
    CAPTIONS,
    COLOURS,
    KINDS,
    PER_CAPTION,
    SHAPES,
    Scene,
    area,
    cover,
    draw_captions,
    draw_scenes,
    evaluation_pictures,
    evaluation_scenes,
    render,
)


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
    one = Scene("one", (("red", "circle"),), "white", size="small", place="on the left")
    assert one.caption() == "a small red circle on the left on a white background"
    two = Scene("two", (("red", "circle"), ("blue", "square")), "grey", place="above")
    assert two.caption(1) == "grey background with a red circle above a blue square"
    count = Scene("count", (("cyan", "triangle"),), "black", number=3)
    assert count.caption(2) == "there are three cyan triangles, the background is black"


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
    assert not torch.equal(reference, floor)


def test_captions_have_all_phrasings():
    scenes = draw_scenes(60, generator())
    starts = {caption.split()[0] for caption in draw_captions(scenes, generator(1))}
    assert "there" in starts
    assert "a" in starts
    assert starts & set(BACKGROUNDS)
