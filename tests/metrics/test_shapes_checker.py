"""The checker: right on clean renders, wrong on each kind of mistake, and on that kind alone where others do not follow from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from distillbench.data.shapes import Scene, draw_scenes, render
from distillbench.errors import UsageError
from distillbench.metrics.shapes_checker import ATTRIBUTES, CATEGORIES, accuracies, attributes, judge, look

ONE = Scene("one", (("red", "circle"),), "white", size="small", place="on the left")
TWO = Scene("two", (("red", "circle"), ("blue", "square")), "grey", place="above")
COUNT = Scene("count", (("cyan", "triangle"),), "black", number=3)


def picture(scene: Scene, seed: int = 0) -> torch.Tensor:
    return render([scene], torch.Generator().manual_seed(seed))


def wrong(asked: Scene, drawn: Scene) -> set[str]:
    """The attributes that are wrong when `drawn` is shown for `asked`, over ten pictures."""
    found = [judge(asked, look(picture(drawn, seed)[0].numpy())) for seed in range(10)]
    assert all(one == found[0] for one in found)
    return {name for name, right in found[0].items() if not right}


def test_its_own_error_rate_on_clean_renders(capsys):
    for held_out in (False, True):
        generator = torch.Generator().manual_seed(5)
        scenes = draw_scenes(1000, generator, held_out=held_out, left_open=0.25)
        shares = accuracies(attributes(render(scenes, generator), scenes))
        with capsys.disabled():
            print(f"\nchecker on 1,000 clean renders, held out: {held_out}: {1 - shares['whole']:.4f} read wrong", end="")
        assert min(shares.values()) >= 0.998


@pytest.mark.parametrize(
    ("asked", "changed", "expected"),
    [
        (ONE, {"objects": (("blue", "circle"),)}, {"colour"}),
        (ONE, {"objects": (("red", "triangle"),)}, {"object"}),
        (ONE, {"place": "at the top"}, {"position"}),
        (ONE, {"size": "large"}, {"size"}),
        (ONE, {"background": "black"}, {"background"}),
        (TWO, {"place": "below"}, {"position"}),
        (TWO, {"place": "left of"}, {"position"}),
        (TWO, {"objects": (("blue", "circle"), ("red", "square"))}, {"binding"}),
        (TWO, {"objects": (("red", "circle"), ("blue", "triangle"))}, {"object", "position", "binding"}),
        (COUNT, {"number": 2}, {"count"}),
        (COUNT, {"number": 4}, {"count"}),
        (COUNT, {"objects": (("red", "triangle"),)}, {"colour"}),
        (COUNT, {"objects": (("cyan", "circle"),)}, {"object", "count"}),
    ],
)
def test_each_mistake_is_seen_as_what_it_is(asked, changed, expected):
    assert wrong(asked, dataclasses.replace(asked, **changed)) == expected


def test_what_a_caption_leaves_open_is_not_asked_for():
    def asked(scene: Scene, *unsaid: str) -> set[str]:
        return set(judge(dataclasses.replace(scene, unsaid=frozenset(unsaid)), look(picture(scene)[0].numpy())))

    assert asked(ONE, "colour", "place", "size", "background") == {"object"}
    assert asked(ONE, "colour") == {"object", "background", "position", "size"}
    assert asked(TWO, "place") == {"object", "background", "binding"}
    assert asked(TWO, "second colour") == {"object", "background", "position", "colour"}
    assert asked(TWO, "colour", "second colour") == {"object", "background", "position"}
    assert asked(COUNT, "colour") == {"object", "background", "count"}
    half = dataclasses.replace(TWO, unsaid=frozenset({"second colour"}))
    assert wrong(half, dataclasses.replace(TWO, objects=(("red", "circle"), ("green", "square")))) == set()
    assert wrong(half, dataclasses.replace(TWO, objects=(("green", "circle"), ("red", "square")))) == {"colour"}


def test_an_empty_picture_has_nothing_right_but_its_background():
    blank = torch.full((1, 3, 32, 32), 245, dtype=torch.uint8)
    found = judge(ONE, look(blank[0].numpy()))
    assert [name for name, right in found.items() if right] == ["background"]


def test_a_third_thing_spoils_a_pair():
    shown = picture(TWO)
    shown[0, :, 14:19, 1:6] = torch.tensor([40, 165, 60], dtype=torch.uint8)[:, None, None]
    assert not judge(TWO, look(shown[0].numpy()))["binding"]


def test_blur_lowers_it_gradually():
    scenes = draw_scenes(200, torch.Generator().manual_seed(0), held_out=True)
    pictures = render(scenes, torch.Generator().manual_seed(1))
    shares = []
    for radius in (0.0, 1.0, 2.0, 4.0):
        blurred = [np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius))) for p in pictures]
        shares.append(accuracies(attributes(torch.from_numpy(np.stack(blurred)).permute(0, 3, 1, 2), scenes))["whole"])
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5


def test_attributes_are_counted_where_captions_state_them():
    table = attributes(torch.cat([picture(ONE), picture(TWO), picture(COUNT)]), [ONE, TWO, COUNT])
    stated = {name: (~np.isnan(values)).tolist() for name, values in table.items()}
    assert stated["binding"] == [False, True, False]
    assert stated["count"] == [False, False, True]
    assert stated["colour"] == [True, False, True]
    assert stated["object"] == stated["background"] == stated["whole"] == [True, True, True]
    shares = accuracies(table)
    assert shares["attributes"] == np.mean([shares[name] for name in CATEGORIES])
    assert set(ATTRIBUTES) < set(shares)


def test_wrong_pictures_are_refused():
    with pytest.raises(UsageError, match="uint8"):
        attributes(torch.zeros(1, 3, 32, 32), [ONE])
    with pytest.raises(UsageError, match="shape"):
        attributes(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [ONE])
