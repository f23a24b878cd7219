"""Endpoint: the student learns where the teacher's path from noise to sample ends, from every point of that path.

A working method to change, held to the contract by `distillbench check endpoint.py`. It says which loss moves which network; the loop does
the rest (optimisers, averages, metering, checkpoints), so nothing here counts steps, saves files or moves tensors between devices.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from distillbench.api import Claim, Conditions, Ema, Method, MethodInfo, OptimizerConfig, Search, Stage, Turn, knob
from distillbench.diffusion.solvers import ddim, time_grid
from distillbench.parts.student import FewStepStudent

POINTS = 8  # of a path of the teacher; the step counts below divide it


class Endpoint(Method):
    # The card is read without running this file, so it holds literals only.
    info = MethodInfo(
        id="endpoint", version=1, title="Endpoint", paper="none yet", year=2026, family="regression", domain=("diffusion",),
        needs=(),  # such as "real data" or "labels"; a track that lacks one skips the method
        data_access="conditions",  # what training sees: here no real data
        steps=(1, 2, 4),  # the step counts one student is trained for
        claims=(Claim("one step beats one step of the teacher", "endpoint", "teacher", "in-mode", steps=1),),
        tunes=(Search("lr", 1e-4, 1e-2, log=True),),  # what `distillbench tune` may search, three knobs at most
    )  # fmt: skip
    student_type = FewStepStudent  # the class that reads a saved student again

    @dataclass(frozen=True)
    class Config:
        lr: float = knob(4e-3, "learning rate", low=0, high=1)  # each knob: default, meaning, range; --set lr=2e-3 changes it

    config: Config

    def build(self, context):
        """Make every network. Whatever must survive a restart is a module, tensor or number on self."""
        self.teacher, self.guidance, self.shape = context.teacher, context.guidance, context.shape
        self.student, self.average = context.teacher.copy(), context.teacher.copy()
        self.times = time_grid(self.teacher.path, POINTS)  # from 1, noise, to 0, clean
        self.grids = {n: self.times[: -1 : POINTS // n].tolist() for n in context.steps}  # the times of 1, 2 and 4 steps
        self.paths = max(1, context.batch_size // POINTS)  # a path gives POINTS examples: together a batch of the track's size

    def stages(self):
        """The plan: one stage with all of the budget, one turn in it. The loop freezes every network that `updates` does not name."""
        optimizer = OptimizerConfig(self.config.lr, decay="linear", clip=1.0)
        turn = Turn("regression", self.loss, updates={"student": self.student}, optimizer={"student": optimizer}, batch_size=self.paths)
        return [Stage("distillation", 1.0, [turn], ema={"average": Ema("student", half_life=100, rampup=0.05)})]

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
        return (ends - torch.cat([x] * POINTS)).abs().mean()

    def distilled(self):
        """What is scored: the average, called at the times of a step count, with fresh noise in between."""
        return FewStepStudent(self.average, self.grids, self.shape)
