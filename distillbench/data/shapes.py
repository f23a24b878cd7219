"""Rendered scenes of `shapes`: one or two objects, or a few alike, on a plain background, 32x32 pixels in colour, each with a caption.

Three kinds of scene, as GenEval (arXiv 2310.11513) has them: `one` object with colour, size and place; `two` objects with their colours
and how they stand to each other; `count` objects alike. A caption may leave things open (`a circle on the left`): then many pictures fit
it, and few network evaluations blur between them. A sixth of all combinations of what captions state is held out of training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from ..randomness import generator_for, mix, name_key

SIZE = 32
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (220, 40, 40), "green": (40, 165, 60), "blue": (45, 75, 220), "yellow": (240, 210, 40), "purple": (150, 50, 175),
           "cyan": (60, 205, 215)}  # fmt: skip
BACKGROUNDS = {"white": (245, 245, 245), "grey": (125, 125, 125), "black": (20, 20, 20)}
RADII = {"small": 3.9, "large": 6.6, "two": 4.6, "count": 3.7}  # of a circle, in pixels; give or take JITTER of it
JITTER = 0.08
NUMBERS = {2: "two", 3: "three", 4: "four"}
ANCHORS = {"on the left": (8.5, 16.0), "on the right": (23.5, 16.0), "at the top": (16.0, 8.5), "at the bottom": (16.0, 23.5),
           "in the centre": (16.0, 16.0)}  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
CELLS = ((9.0, 9.0), (23.0, 9.0), (9.0, 23.0), (23.0, 23.0))  # where things that are counted stand
KINDS = ("one", "two", "count")
SHARES = (0.4, 0.35, 0.25)  # of the kinds
HELD_OUT = 6  # one combination in so many
WHAT = {"one": "a {size} {first} {place}", "two": "a {first} {place} a {second}", "count": "{number} {first}s"}
PHRASINGS = ("{what} on a {background} background", "{background} background with {what}",
             "there {verb} {what}, the background is {background}")  # fmt: skip
BARE = ("{what}", "{what}", "there {verb} {what}")  # where the background is left open
OPTIONAL = {"one": ("size", "colour", "place", "background"), "two": ("colour", "second colour", "place", "background"),
            "count": ("colour", "background")}  # fmt: skip
LEFT_OPEN = 0.5  # share of these that the track's captions leave open
COLOUR_NOISE = 10.0  # by which an object's colour differs from the palette's at most, of 255


@dataclass(frozen=True)
class Scene:
    """A scene and what its caption says of it. objects: (colour, shape), two of them in a scene of kind `two`, else one.

    place: a key of ANCHORS (one), one of RELATIONS (two) or "" (count).  size: small or large (one), else "".
    unsaid: those of OPTIONAL[kind] that the caption leaves open.
    """

    kind: str
    objects: tuple[tuple[str, str], ...]
    background: str
    size: str = ""
    place: str = ""
    number: int = 1
    unsaid: frozenset[str] = frozenset()

    @cached_property
    def said(self) -> Scene:
        """The scene as its caption has it: "" for what is left open."""

        def kept(name: str, word: str) -> str:
            return "" if name in self.unsaid else word

        objects = tuple(
            (kept(f"{which}colour", colour), shape) for which, (colour, shape) in zip(("", "second "), self.objects, strict=False)
        )
        return Scene(
            self.kind, objects, kept("background", self.background), kept("size", self.size), kept("place", self.place), self.number
        )  # fmt: skip

    @cached_property
    def held_out(self) -> bool:
        """Whether this combination, as said, is left out of training; the background plays no part in it."""
        said = self.said
        words = "/".join((said.kind, said.size, said.place, str(said.number), *(word for pair in said.objects for word in pair)))
        return mix(name_key(words)) % HELD_OUT == 0

    def caption(self, phrasing: int = 0) -> str:
        """What is said of the scene in words; phrasing 0, 1 or 2."""
        said = self.said
        first, second = (" ".join(pair) for pair in (said.objects * 2)[:2])
        place = said.place or ("with" if self.kind == "two" else "")
        what = WHAT[self.kind].format(size=said.size, first=first, second=second, place=place, number=NUMBERS.get(self.number, ""))
        frame = (PHRASINGS if said.background else BARE)[phrasing]
        verb = "are" if self.kind == "count" else "is"
        text = frame.format(what=what.strip(), verb=verb, background=said.background)
        return " ".join(text.split())


def words() -> list[str]:
    """Every word that occurs in a caption, sorted."""
    known = [*SHAPES, *(f"{shape}s" for shape in SHAPES), *COLOURS, *BACKGROUNDS, *NUMBERS.values(), *ANCHORS, *RELATIONS, "small", "large"]
    frames = re.sub(r"\{\w+\}s?", " ", " ".join((*WHAT.values(), *PHRASINGS)))
    return sorted({word for text in (*known, frames, "is are with") for word in re.findall("[a-z]+", text)})


def _scene(u: Sequence[float], shares: Sequence[float] = SHARES) -> Scene:
    """The scene that eight uniform numbers choose."""

    def pick(options: Sequence, at: int):
        return options[int(u[at] * len(options))]

    kind = "one" if u[0] < shares[0] else "two" if u[0] < shares[0] + shares[1] else "count"
    first = (pick(tuple(COLOURS), 1), pick(SHAPES, 2))
    background = pick(tuple(BACKGROUNDS), 3)
    if kind == "one":
        return Scene(kind, (first,), background, size=pick(("small", "large"), 4), place=pick(tuple(ANCHORS), 5))
    if kind == "count":
        return Scene(kind, (first,), background, number=pick(tuple(NUMBERS), 4))
    second = (pick([c for c in COLOURS if c != first[0]], 4), pick([s for s in SHAPES if s != first[1]], 5))
    return Scene(kind, (first, second), background, place=pick(RELATIONS, 6))


def _uniform(n: int, columns: int, generator: torch.Generator) -> list[list[float]]:
    return torch.rand(n, columns, generator=generator, dtype=torch.float64).tolist()


def draw_scenes(
    n: int, generator: torch.Generator, *, held_out: bool = False, shares: Sequence[float] = SHARES, left_open: float = 0.0
) -> list[Scene]:
    """n scenes, of combinations that training sees or of those held out: training meets neither in words nor in pictures what is held out.

    shares: of the kinds.  left_open: probability that a caption leaves one of OPTIONAL open.
    """
    found: list[Scene] = []
    while len(found) < n:
        drawn = [_scene(u, shares) for u in _uniform(max(n, 64), 8, generator)]
        if left_open:
            drawn = [_opened(scene, u, left_open) for scene, u in zip(drawn, _uniform(len(drawn), 4, generator), strict=True)]
        found += [s for s in drawn if s.held_out == held_out and (held_out or not replace(s, unsaid=frozenset()).held_out)]
    return found[:n]


def _opened(scene: Scene, u: Sequence[float], left_open: float) -> Scene:
    names = OPTIONAL[scene.kind]
    return replace(scene, unsaid=frozenset(name for name, number in zip(names, u, strict=False) if number < left_open))


def redrawn(scene: Scene, generator: torch.Generator) -> Scene:
    """Another scene of which the same is said: what is left open is drawn anew."""
    only = [float(kind == scene.kind) for kind in KINDS]
    while scene.unsaid:
        other = _scene(_uniform(1, 8, generator)[0], only)
        said = scene.said.objects
        pairs = [(colour or new, shape) for (colour, shape), (new, _) in zip(said, other.objects, strict=True)]
        if len({colour for colour, _ in pairs}) == len(pairs):
            return replace(
                scene, objects=tuple(pairs), background=scene.said.background or other.background, size=scene.said.size or other.size,
                place=scene.said.place or other.place,
            )  # fmt: skip
    return scene


def draw_captions(scenes: Sequence[Scene], generator: torch.Generator) -> list[str]:
    """A caption for each scene, its phrasing drawn."""
    phrasings = torch.randint(3, (len(scenes),), generator=generator).tolist()
    return [scene.caption(phrasing) for scene, phrasing in zip(scenes, phrasings, strict=True)]


def fits(scenes: Sequence[Scene], pictures: Sequence[Scene]) -> Tensor:
    """Whether what is said of each of n scenes is true of each of m scenes: bool (n, m). Two things may be named in either order."""
    said = torch.tensor([_codes(scene.said) for scene in scenes])[:, None]
    told = (pictures, [_told_from_the_other(scene) for scene in pictures])
    shown = [torch.tensor([_codes(scene) for scene in way])[None] for way in told]
    return torch.stack([((said == codes) | (said == 0)).all(-1) for codes in shown]).any(0)


def _codes(scene: Scene) -> list[int]:
    """A number for each attribute, 0 where it is ""."""
    options = ("", *KINDS, *COLOURS, *SHAPES, *BACKGROUNDS, "small", "large", *ANCHORS, *RELATIONS)
    first, second = (scene.objects * 2)[:2]
    return [scene.number, *(options.index(word) for word in (scene.kind, scene.background, scene.size, scene.place, *first, *second))]


def _told_from_the_other(scene: Scene) -> Scene:
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    return replace(scene, objects=scene.objects[::-1], place=opposite.get(scene.place, scene.place))


# ---------------------------------------------------------------------- pictures


def cover(shape: str, x: Tensor | float, y: Tensor | float, radius: Tensor | float) -> Tensor:
    """How much of each pixel a shape covers: (n, 32, 32) for x, y, radius (n, 1, 1), or (32, 32) for numbers; edges are one pixel soft.

    The centre is the centroid. A square has the half side 0.9 radius, a triangle the circumradius 1.3 radius, its tip up.
    """
    line = torch.arange(SIZE, dtype=torch.float32) + 0.5
    across, down = line[None, :] - x, line[:, None] - y
    if shape == "circle":
        inside = radius - torch.sqrt(across.square() + down.square())
    elif shape == "square":
        inside = 0.9 * radius - torch.maximum(across.abs(), down.abs())
    else:
        inner = 1.3 * radius / 2
        slope = math.sqrt(3) / 2
        inside = inner - torch.maximum(down, slope * across.abs() - 0.5 * down)
    return (inside + 0.5).clamp(0, 1)


def area(shape: str, radius: float) -> float:
    """Of a shape of that radius, in pixels."""
    return {"circle": math.pi, "square": 1.8**2, "triangle": 3 * math.sqrt(3) / 4 * 1.3**2}[shape] * radius**2


def _places(scene: Scene, u: Sequence[float]) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each thing in the scene, chosen by sixteen uniform numbers."""

    def around(centre: float, spread: float, at: int) -> float:
        return centre + spread * (2 * u[at] - 1)

    radius = RADII[scene.size or scene.kind] * (1 + JITTER * (2 * u[0] - 1))
    if scene.kind == "one":
        x, y = ANCHORS[scene.place]
        return [(around(x, 1.8, 1), around(y, 1.8, 2), radius)]
    if scene.kind == "count":
        order = sorted(range(4), key=lambda i: u[1 + i])[: scene.number]
        return [(around(CELLS[c][0], 2.5, 5 + 2 * k), around(CELLS[c][1], 2.5, 6 + 2 * k), radius) for k, c in enumerate(order)]
    near, far, across, other = around(8.5, 1.3, 1), around(23.5, 1.3, 2), around(16, 5, 3), around(16, 5, 4)
    if scene.place in ("right of", "below"):
        near, far = far, near
    if scene.place in ("left of", "right of"):
        return [(near, across, radius), (far, other, radius)]
    return [(across, near, radius), (other, far, radius)]


def render(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Pictures uint8 (n, 3, 32, 32). Exact places, sizes and colours are drawn within what the captions say."""
    draws = torch.rand(len(scenes), 16, generator=generator, dtype=torch.float64).tolist()
    tints = COLOUR_NOISE * (2 * torch.rand(len(scenes), 2, 3, generator=generator) - 1)
    pictures = torch.stack([torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32) for scene in scenes])
    pictures = pictures[:, :, None, None].repeat(1, 1, SIZE, SIZE)
    jobs: dict[str, list[tuple[int, float, float, float, Tensor]]] = {shape: [] for shape in SHAPES}
    for row, (scene, u) in enumerate(zip(scenes, draws, strict=True)):
        for k, (x, y, radius) in enumerate(_places(scene, u)):
            which = k if scene.kind == "two" else 0
            colour, shape = scene.objects[which]
            jobs[shape].append((row, x, y, radius, torch.tensor(COLOURS[colour]) + tints[row, which]))
    for shape, todo in jobs.items():
        for row, x, y, radius, tint in todo:
            mask = cover(shape, x, y, radius)
            pictures[row] = torch.lerp(pictures[row], tint.clamp(0, 255)[:, None, None], mask)
    return pictures.round().to(torch.uint8)


# ---------------------------------------------------------------------- what is scored

CAPTIONS, PER_CAPTION = 500, 4


@cache
def evaluation_scenes(held_out: bool = True) -> tuple[list[Scene], list[str]]:
    """500 scenes and their captions, all different; not held out: those that tuning sees."""
    generator = generator_for(0, "shapes/evaluation", int(held_out))
    drawn = draw_scenes(8 * CAPTIONS, generator, held_out=held_out, left_open=LEFT_OPEN)
    distinct = dict(zip(draw_captions(drawn, generator), drawn, strict=True))
    captions = list(distinct)[:CAPTIONS]
    return [distinct[caption] for caption in captions], captions


def evaluation_pictures(name: str, *, held_out: bool = True) -> Tensor:
    """Four pictures of each of these captions, uint8 (2000, 3, 32, 32), others for each name ("reference", "floor")."""
    generator = generator_for(0, f"shapes/{name}", 0)
    scenes = [redrawn(scene, generator) for scene in evaluation_scenes(held_out)[0] for _ in range(PER_CAPTION)]
    return render(scenes, generator)
