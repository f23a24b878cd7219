"""The tracks `shapes-sd@3` and `shapes-sana@3`: captioned rendered scenes under two diffusers pipelines, checked attribute by attribute.

2,000 samples, four of each of 500 captions whose combinations of attributes no training caption has; half of what a caption could say
it leaves open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..api import Source
from ..conditions import Conditions
from ..data.shapes import CAPTIONS, LEFT_OPEN, Scene, draw_captions, draw_scenes, evaluation_pictures, evaluation_scenes, render
from ..errors import UsageError
from ..metrics.arrays import as_float64
from ..metrics.clip_shapes import clipcos_of
from ..metrics.images import Reference
from ..metrics.score import Score, identity
from ..metrics.shapes_checker import ATTRIBUTES, CATEGORIES, attributes
from ..randomness import generator_for
from ..teachers.cards import read_card
from ..teachers.clip_shapes import cosines
from ..teachers.zoo import zoo_folder
from .facts import FACTS, VALIDATION, TrackFacts
from .text_to_image import AS_IMAGES, CHUNK, PER_PROMPT, PipelineTrack

if TYPE_CHECKING:
    from ..teachers.diffusers import DiffusersTeacher

TRAINING_SCENES = 8192
REFERENCE = "reference.safetensors"  # beside a teacher's pipeline: features of its own samples
ESTIMATORS = {
    "attributes": f"mean of the shares of {', '.join(CATEGORIES)}",
    "whole": "share of images in which all that the caption states is right",
    **{name: f"share of images with the right {name}, of those whose caption states it" for name in ATTRIBUTES},
}


class ShapesSource:
    """Latents of rendered scenes and their embedded captions, drawn with replacement; implements `api.Source`."""

    def __init__(self, teacher: DiffusersTeacher, scenes: int = TRAINING_SCENES):
        generator = generator_for(0, "shapes/source", scenes)
        self._scenes = draw_scenes(scenes, generator, left_open=LEFT_OPEN)
        captions = draw_captions(self._scenes, generator)
        self._teacher = teacher
        self._pictures = generator.get_state()
        distinct = sorted(set(captions))
        number = {caption: row for row, caption in enumerate(distinct)}
        found = teacher.conditions(distinct)
        plain = {name: value for name, value in found.fields.items() if isinstance(value, Tensor)}
        self._embedded = Conditions(plain, {name: found.nulls[name] for name in plain})
        self._rows = torch.tensor([number[caption] for caption in captions])

    @cached_property
    def latents(self) -> Tensor:
        generator = torch.Generator()
        generator.set_state(self._pictures)
        pictures = render(self._scenes, generator)
        return torch.cat([self._teacher.encode(part.float() / 255) for part in pictures.split(CHUNK)])

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        picked = torch.randint(len(self._rows), (n,), generator=generator)
        return self.latents[picked], self._embedded[self._rows[picked]]

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return self._embedded[self._rows[torch.randint(len(self._rows), (n,), generator=generator)]]


class Shapes(PipelineTrack):
    """Held against four other pictures of the same 500 captions."""

    batch_size: ClassVar[int] = 64
    preview: ClassVar[int] = 32
    held_out: ClassVar[bool] = True  # whether the captions' combinations are kept from training
    evaluations: ClassVar[int] = CAPTIONS * PER_PROMPT

    def __init__(self, facts: TrackFacts):
        self.facts = facts  # type: ignore[misc]
        self.teacher_name = facts.name.removesuffix("-validation")
        self.shape = {"shapes-sd": (4, 8, 8), "shapes-sana": (16, 4, 4)}[self.teacher_name]  # type: ignore[misc]

    @cached_property
    def guidance(self) -> float:  # type: ignore[override]
        return float(read_card(zoo_folder(self.teacher_name))["guidance_scale"])

    def opened(self) -> DiffusersTeacher:
        return _opened(self.teacher_name)

    def source(self) -> Source:
        return _source(self.teacher_name)

    def scenes(self) -> list[Scene]:
        return evaluation_scenes(self.held_out)[0]

    def prompts(self) -> list[str]:
        return evaluation_scenes(self.held_out)[1]

    def reference_images(self) -> Tensor:
        return evaluation_pictures("reference", held_out=self.held_out)

    def truth(self) -> Tensor:
        """As latents: what the autoencoder keeps of fresh pictures is all that a student can show."""
        pictures = evaluation_pictures("floor", held_out=self.held_out)
        return torch.cat([self.opened().encode(part.float() / 255) for part in pictures.split(CHUNK)])

    def floor(self) -> list[Score]:
        """Fresh pictures of the same captions, through the autoencoder and back."""
        note = "fresh pictures through the teacher's autoencoder"
        return [dataclasses.replace(score, note=note) for score in self.score(self.truth())]

    def _teacher_reference(self) -> Reference | None:
        card = read_card(zoo_folder(self.teacher_name))["reference"]
        features = as_float64(load_file(zoo_folder(self.teacher_name) / REFERENCE)["features"].float())
        return Reference(features, card["sha256"])

    def look(self, images: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        captions, scenes = self.evaluation_prompts(), self.scenes()
        table = attributes(images, [scenes[row // PER_PROMPT] for row in rows])
        checked = {f"checked {name}": torch.from_numpy(values) for name, values in table.items()}
        return {**super().look(images, rows), "clipcos": cosines(images, [captions[row] for row in rows]), **checked}

    def scores_of(self, looked: Mapping[str, Tensor], how: str = AS_IMAGES) -> list[Score]:
        if len(looked["features"]) != self.evaluations:
            raise UsageError(f"{self.facts.name} is scored on {self.evaluations} images, not {len(looked['features'])}")
        agreed = clipcos_of(looked["clipcos"], self.evaluation_prompts(), seeds=self.evaluation_seeds(), image_steps=(how,))
        return [*super().scores_of(looked, how), agreed, *self._checked(looked, how)]

    def _checked(self, looked: Mapping[str, Tensor], how: str) -> list[Score]:
        """What the checker read; intervals over captions."""
        table = {name.removeprefix("checked "): values.numpy() for name, values in looked.items() if name.startswith("checked ")}
        shares = {name: float(np.nanmean(values)) for name, values in table.items()}
        by_caption = {name: values.reshape(-1, PER_PROMPT).mean(1) for name, values in table.items()}
        spread = {}
        for name, values in by_caption.items():
            stated = values[~np.isnan(values)]
            spread[name] = float(stated.std(ddof=1) / len(stated) ** 0.5)
        shares["attributes"] = float(np.mean([shares[name] for name in CATEGORIES]))
        spread["attributes"] = float(np.sqrt(sum(spread[name] ** 2 for name in CATEGORIES))) / len(CATEGORIES)
        return [self._share(name, shares[name], how).with_interval(spread[name]) for name in ESTIMATORS]

    def _share(self, name: str, value: float, how: str) -> Score:
        what = identity(
            f"{name}/shapes-checker@1", estimator=ESTIMATORS[name], preprocessing=(how,), n_generated=self.evaluations,
            prompts_sha256=self.prompts_sha256(), seeds=self.evaluation_seeds(),
        )  # fmt: skip
        return Score(name, what, value, None, None, self.evaluations, True)


class ShapesValidation(Shapes):
    """What tuning sees: `fd` on captions of training's combinations, from other noise."""

    first_seed: ClassVar[int] = 3_000_000
    held_out: ClassVar[bool] = False

    def look(self, images: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        return PipelineTrack.look(self, images, rows)

    def scores_of(self, looked: Mapping[str, Tensor], how: str = AS_IMAGES) -> list[Score]:
        return PipelineTrack.scores_of(self, looked, how)

    def _teacher_reference(self) -> Reference | None:
        return None


@cache
def _opened(name: str) -> DiffusersTeacher:
    from ..teachers.diffusers import open_pipeline
    from ..teachers.shapes_pipelines import shipped_pipeline

    return open_pipeline(shipped_pipeline(name))


@cache
def _source(name: str) -> ShapesSource:
    return ShapesSource(_opened(name))


def shapes_track(name: str) -> Shapes:
    """`shapes-sd`, `shapes-sana`, or one of their validation splits."""
    return ShapesValidation(VALIDATION[name]) if name in VALIDATION else Shapes(FACTS[name])
