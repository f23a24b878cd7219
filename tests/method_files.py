"""Method files as a stranger would write them: one that conforms, and copies of it with one thing wrong."""

from __future__ import annotations

from pathlib import Path

TINY = '''"""The student is a copy of the teacher, regressed on its velocity."""

import os
import random
import time
from dataclasses import dataclass

import torch

from distillbench.api import Ema, Method, MethodInfo, OptimizerConfig, Samples, Stage, Turn, knob
from distillbench.parts.student import FewStepStudent


class TinyStudent(FewStepStudent):
    """As its parent."""

    # STUDENT


class Tiny(Method):
    info = MethodInfo(
        id="tiny", version=1, title="A tiny method", paper="none", year=2025, family="regression", domain=("diffusion",),
        needs=("labels",), data_access="conditions", steps=(1, 2),
    )
    student_type = TinyStudent

    @dataclass(frozen=True)
    class Config:
        lr: float = knob(1e-3, "learning rate", low=0, high=1)
        times: tuple[float, ...] = knob((1.0, 0.5), "of the steps", low=0.01, high=1)
        mode: str = knob("renoise", "noise between the steps", choices=("renoise", "deterministic"))
        average: bool = knob(True, "score the average")
        start: int | None = knob(None, "nothing", low=0)

    def build(self, context):
        self.teacher = context.teacher
        self.student, self.average = context.teacher.copy(), context.teacher.copy()
        self.steps, self.shape = context.steps, context.shape
        # BUILD

    def stages(self):
        turn = Turn("regress", self.loss, {"student": self.student}, optimizer={"student": OptimizerConfig(self.config.lr)})
        return [Stage("regression", 1.0, [turn], ema={"average": Ema("student", 4.0)})]

    def loss(self, batch):
        conditions = batch.conditions()
        x, t = batch.randn(batch.size, *self.shape), batch.rand(batch.size)
        # LOSS
        return (self.student.velocity(x, t, conditions) - self.teacher.velocity(x, t, conditions) + 0.01).square().mean()

    def distilled(self):
        times = self.config.times
        return TinyStudent(self.average, {n: times[:n] for n in self.steps}, self.shape)
'''


def write(path: Path, *changes: tuple[str, str]) -> Path:
    """The tiny method with replacements, each of which must apply, in the file `path`."""
    text = TINY
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def _inside(mark: str, code: str) -> tuple[str, str]:
    indent = " " * (mark.index("#"))
    return mark, "".join(f"{indent}{line}\n" if line else "\n" for line in code.split("\n"))


def in_build(code: str) -> tuple[str, str]:
    """A change that adds statements to `build`."""
    return _inside("        # BUILD\n", code)


def in_loss(code: str) -> tuple[str, str]:
    """A change that adds statements to the loss, which has x, t and conditions."""
    return _inside("        # LOSS\n", code)


def in_student(code: str) -> tuple[str, str]:
    """A change that adds methods to the student."""
    return _inside("    # STUDENT\n", code)


def named(name: str) -> tuple[str, str]:
    return 'id="tiny"', f'id="{name}"'
