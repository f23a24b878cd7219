"""A text-to-image track of 24 pictures of 16 x 16 pixels around a toy pipeline: `toy-sd@1`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from distillbench import tracks
from distillbench.teachers.diffusers import DiffusersTeacher, open_pipeline
from distillbench.tracks.facts import FACTS
from distillbench.tracks.text_to_image import PipelineTrack
from toy_pipelines import toy_sd

NAME = "toy-sd"
PROMPTS = ["a", "b", "c", "d", "e", "f"]
TOY_FACTS = dataclasses.replace(
    FACTS["shapes-sd"],
    id=f"{NAME}@1",
    title="toys",
    columns=("fd", "kid", "precision", "recall", "density", "coverage", "diversity", "vendi"),
)


class ToyTrack(PipelineTrack):
    facts = TOY_FACTS
    shape = (4, 8, 8)
    batch_size = 4
    evaluations = 4 * len(PROMPTS)
    guidance = 2.0
    preview = 5
    chunk: ClassVar[int] = 10  # no whole number of prompts, and no whole number of chunks

    def __init__(self, folder: Path, prompts: list[str] = PROMPTS):
        self.folder, self._prompts = toy_sd(folder), prompts
        self._opened = open_pipeline(self.folder)

    def opened(self) -> DiffusersTeacher:
        return self._opened

    def prompts(self) -> list[str]:
        return self._prompts

    def reference_images(self) -> Tensor:
        return torch.randint(256, (20, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)

    def source(self):
        raise NotImplementedError

    def floor(self):
        raise NotImplementedError

    def truth(self) -> Tensor:
        raise NotImplementedError


def register(monkeypatch, track: PipelineTrack) -> None:
    """Known by its name for the length of a test."""
    known = tracks._made
    monkeypatch.setitem(FACTS, track.facts.name, track.facts)
    monkeypatch.setattr(tracks, "_made", lambda name, *given: track if name == track.facts.name else known(name, *given))
