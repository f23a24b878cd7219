"""Reads a rendered or generated scene of `shapes` and says, attribute by attribute, whether it shows what its caption asks for.

Things are connected regions that differ from the background; a thing's colour is the nearest of the palette to its median, its shape the
template of the same area and centroid that covers it best. The categories are GenEval's (arXiv 2310.11513): object, count, colour,
position, binding; size and background are read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..data.shapes import ANCHORS, BACKGROUNDS, COLOURS, SHAPES, Scene, area, cover
from ..errors import UsageError
from .arrays import Array

CATEGORIES = ("object", "count", "colour", "position", "binding")
ATTRIBUTES = (*CATEGORIES, "size", "background")
LEAST_AREA = 9.0  # pixels; smaller specks are no things
APART = 60.0  # distance from the background, of 255 a channel, at which a pixel belongs to a thing
SIZE_BORDER = 5.2  # radius between small and large


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Seen:
    background: str
    things: tuple[Thing, ...]


@cache
def _palette() -> tuple[Array, Array]:
    return np.array(list(COLOURS.values()), float), np.array(list(BACKGROUNDS.values()), float)


def look(picture: Array) -> Seen:
    """What is in a picture (3, 32, 32) of numbers in 0..255."""
    colours, backgrounds = _palette()
    pixels = np.moveaxis(np.asarray(picture, float), 0, -1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    background = list(BACKGROUNDS)[int(np.linalg.norm(backgrounds - ground, axis=1).argmin())]
    away = np.linalg.norm(pixels - ground, axis=-1)
    regions, count = ndimage.label(away > APART)
    things = []
    for number in range(1, count + 1):
        region = regions == number
        inner = region & (away >= np.quantile(away[region], 0.5))
        colour = np.median(pixels[inner], axis=0)
        covered = np.clip(away / max(np.linalg.norm(colour - ground), 1.0), 0, 1) * ndimage.binary_dilation(region)
        if covered.sum() >= LEAST_AREA:
            name = list(COLOURS)[int(np.linalg.norm(colours - colour, axis=1).argmin())]
            things.append(_thing(name, covered))
    return Seen(background, tuple(things))


def _thing(colour: str, covered: Array) -> Thing:
    """The shape whose template of the same area and centroid differs least from `covered` (32, 32)."""
    total = covered.sum()
    line = np.arange(len(covered)) + 0.5
    x, y = float((covered.sum(0) * line).sum() / total), float((covered.sum(1) * line).sum() / total)
    radii = {shape: float(np.sqrt(total / area(shape, 1.0))) for shape in SHAPES}
    gaps = {shape: np.abs(cover(shape, x, y, radius).numpy() - covered).sum() for shape, radius in radii.items()}
    shape = min(SHAPES, key=lambda name: gaps[name])
    return Thing(colour, shape, x, y, radii[shape])


def judge(scene: Scene, seen: Seen) -> dict[str, bool]:
    """The attributes that the scene's caption states -> whether the picture shows them.

    object: each shape asked for is there.  count: as many things of that shape as asked for, and no others.  colour (one, count): all
    things have it; (two, of one alone): that thing has it.  position: the nearest of the five places, or how the two things stand to
    each other.  binding (two): each shape in its own colour, and nothing else there. An attribute of a thing that is not there is wrong.
    """
    said = scene.said
    shapes = [thing.shape for thing in seen.things]
    found = {"object": all(shape in shapes for _, shape in said.objects)}
    if said.background:
        found["background"] = seen.background == said.background
    if scene.kind == "two":
        return found | _pair(said, seen, found["object"])
    colour, shape = said.objects[0]
    if colour:
        found["colour"] = bool(shapes) and all(thing.colour == colour for thing in seen.things)
    if scene.kind == "count":
        found["count"] = shapes == [shape] * said.number
    if scene.kind == "one" and said.place:
        found["position"] = len(shapes) == 1 and _place(seen.things[0]) == said.place
    if said.size:
        found["size"] = len(shapes) == 1 and (seen.things[0].radius > SIZE_BORDER) == (said.size == "large")
    return found


def _pair(said: Scene, seen: Seen, there: bool) -> dict[str, bool]:
    """What is said of two things beyond their shapes, which are `there` or not."""
    pairs = [(thing.colour, thing.shape) for thing in seen.things]
    coloured = [pair for pair in said.objects if pair[0]]
    found = {"position": there and _stands(said, seen)} if said.place else {}
    if len(coloured) == 2:
        found["binding"] = all(pair in pairs for pair in coloured) and len(pairs) == 2
    elif coloured:
        found["colour"] = coloured[0] in pairs
    return found


def _place(thing: Thing) -> str:
    return min(ANCHORS, key=lambda name: (ANCHORS[name][0] - thing.x) ** 2 + (ANCHORS[name][1] - thing.y) ** 2)


def _stands(scene: Scene, seen: Seen) -> bool:
    """Whether the first thing asked for stands to the second as the caption says: more so along that axis than along the other."""
    first, second = (next(thing for thing in seen.things if thing.shape == shape) for _, shape in scene.objects)
    across, down = second.x - first.x, second.y - first.y
    there = {"left of": across, "right of": -across, "above": down, "below": -down}[scene.place]
    beside = abs(down) if scene.place in ("left of", "right of") else abs(across)
    return there > beside


def attributes(pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, Array]:
    """For pictures uint8 (n, 3, 32, 32): attribute -> (n,) of 1, 0, and NaN where a caption does not state it; `whole`: all of them."""
    if pictures.dtype != torch.uint8 or tuple(pictures.shape[1:]) != (3, 32, 32) or len(pictures) != len(scenes):
        raise UsageError(
            f"scenes are read in uint8 pictures of shape ({len(scenes)}, 3, 32, 32), not {pictures.dtype} {tuple(pictures.shape)}"
        )
    table = {name: np.full(len(scenes), np.nan) for name in (*ATTRIBUTES, "whole")}
    for row, (picture, scene) in enumerate(zip(pictures.numpy(), scenes, strict=True)):
        found = judge(scene, look(picture))
        for name, right in found.items():
            table[name][row] = right
        table["whole"][row] = all(found.values())
    return table


def accuracies(table: dict[str, Array]) -> dict[str, float]:
    """Share of right answers by attribute, and `attributes`: the mean over the five categories, as GenEval's overall score."""
    shares = {name: float(np.nanmean(values)) for name, values in table.items()}
    return {"attributes": float(np.mean([shares[name] for name in CATEGORIES])), **shares}
