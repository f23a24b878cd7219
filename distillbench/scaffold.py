"""`distillbench new`: the file a new method starts from, a working one that its author changes line by line. No torch here."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from .discovery import discover
from .errors import UsageError

TAKEN = ("all", "teacher", "truth")  # ids that mean something else on a board

TEMPLATE = '''\
"""{title}: the student learns where the teacher's path from noise to sample ends, from every point of that path.

A working method to change, held to the contract by `distillbench check {file}`. It says which loss moves which network; the loop does
the rest (optimisers, averages, metering, checkpoints), so nothing here counts steps, saves files or moves tensors between devices.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from distillbench.api import Claim, Conditions, Ema, Method, MethodInfo, OptimizerConfig, Search, Stage, Turn, knob
from distillbench.diffusion.solvers import ddim, time_grid
from distillbench.parts.student import FewStepStudent

POINTS = 8  # of a path of the teacher; the step counts below divide it


class {class_name}(Method):
    # The card is read without running this file, so it holds literals only.
    info = MethodInfo(
        id="{id}", version=1, title="{title}", paper="none yet", year={year}, family="regression", domain=("diffusion",),
        needs=(),  # such as "real data" or "labels"; a track that lacks one skips the method
        data_access="conditions",  # what training sees: here no real data
        steps=(1, 2, 4),  # the step counts one student is trained for
        claims=(Claim("one step beats one step of the teacher", "{id}", "teacher", "in-mode", steps=1),),
        tunes=(Search("lr", 1e-4, 1e-2, log=True),),  # what `distillbench tune` may search, three knobs at most
    )  # fmt: skip
    student_type = FewStepStudent  # the class that reads a saved student again

    @dataclass(frozen=True)
    class Config:
        lr: float = knob(1e-3, "learning rate", low=0, high=1)  # each knob: default, meaning, range; --set lr=2e-3 changes it

    config: Config

    def build(self, context):
        """Make every network. Whatever must survive a restart is a module, tensor or number on self."""
        self.teacher, self.guidance, self.shape = context.teacher, context.guidance, context.shape
        self.student, self.average = context.teacher.copy(), context.teacher.copy()
        self.times = time_grid(self.teacher.path, POINTS)  # from 1, noise, to 0, clean
        self.grids = {{n: self.times[: -1 : POINTS // n].tolist() for n in context.steps}}  # the times of 1, 2 and 4 steps
        self.paths = max(1, context.batch_size // POINTS)  # a path gives POINTS examples: together a batch of the track's size

    def stages(self):
        """The plan: one stage with all of the budget, one turn in it. The loop freezes every network that `updates` does not name."""
        optimizer = OptimizerConfig(self.config.lr, decay="linear", clip=1.0)
        turn = Turn("regression", self.loss, updates={{"student": self.student}}, optimizer={{"student": optimizer}}, batch_size=self.paths)
        return [Stage("distillation", 1.0, [turn], ema={{"average": Ema("student", half_life=100, rampup=0.05)}})]

    def loss(self, batch):
        """Pure: it changes nothing, and all its chance comes from the batch (noise, times, conditions, or batch.data())."""
        conditions, x = batch.conditions(), batch.randn(batch.size, *self.shape)
        points = []
        with torch.no_grad():  # the teacher's work is charged to the budget like the student's
            for step in pairwise(self.times.tolist()):
                points.append(x)
                x = ddim(self.teacher, x, conditions, step, guidance_scale=self.guidance)
        times = self.times[:-1].to(x.device).repeat_interleave(batch.size)
        ends = self.student.x0(torch.cat(points), times, Conditions.cat([conditions] * POINTS))
        return (ends - torch.cat([x] * POINTS)).square().mean()

    def distilled(self):
        """What is scored: the average, called at the times of a step count, with fresh noise in between."""
        return FewStepStudent(self.average, self.grids, self.shape)
'''

# What the template calls its own; a class of that name would hide it.
_NAMES = set(re.findall(r"\b[A-Z]\w+", "\n".join(line for line in TEMPLATE.splitlines() if " import " in line))) | {"POINTS", "Config"}


def method_text(path: Path, method_id: str | None = None, *, year: int) -> str:
    """The file of a new method called as `path` is. Raises `UsageError` for a name that could not be found, imported or listed."""
    stem = path.stem
    if path.suffix != ".py":
        raise UsageError(f"{path.name!r} is no Python file; write distillbench new {stem or 'my_method'}.py")
    if not (stem.isascii() and stem.isidentifier() and stem.strip("_") and not keyword.iskeyword(stem)):
        raise UsageError(f"{path.name!r} is no name that Python can import; use letters, digits and _, such as my_method.py")
    name = method_id if method_id is not None else stem.strip("_")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name) or name in TAKEN:
        raise UsageError(f"{name!r} cannot be a method's id; give a short name of letters, digits, _ . - with --id")
    if name in discover():
        raise UsageError(f"an installed method is called {name!r} already; choose another file name, or give another name with --id")
    words = [word for word in stem.split("_") if word]
    class_name = "".join(word[0].upper() + word[1:] for word in words)
    if class_name in _NAMES or class_name in ("None", "True", "False"):
        class_name = f"My{class_name}"
    return TEMPLATE.format(title=" ".join(words).capitalize(), file=path.name, class_name=class_name, id=name, year=year)


def write_method(path: Path, method_id: str | None = None, *, year: int) -> None:
    """Write `method_text` to `path`; refuses a file that exists and a folder that does not."""
    text = method_text(path, method_id, year=year)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} exists and is left as it is; choose another name") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror})") from None
