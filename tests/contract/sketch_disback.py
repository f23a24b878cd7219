"""Distribution Backtracking (Zhang et al. 2024, arXiv 2408.15991) on the contract: a sketch, checked but not benchmarked.

Record how the teacher degrades while it learns the untrained student's samples; then distil towards the records in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from distillbench.api import Batch, Conditions, Context, Ema, Method, MethodInfo, OptimizerConfig, Stage, Turn
from distillbench.diffusion.denoiser import Denoiser
from distillbench.parts.distribution_matching import fake_score_loss, matching_loss
from distillbench.parts.simulation import pure_noise
from distillbench.parts.student import FewStepStudent


class DisBack(Method):
    info = MethodInfo(
        id="disback", version=1, title="Distribution Backtracking", paper="arXiv 2408.15991", year=2024,
        family="score distillation", domain=("diffusion",), needs=(), data_access="conditions", steps=(1,),
    )  # fmt: skip
    student_type = FewStepStudent

    @dataclass(frozen=True)
    class Config:
        """nodes: recorded networks, 0 is Diff-Instruct.  recording: share of the budget.  backtracking: share of the way back to node 1."""

        nodes: int = 5
        recording: float = 0.1
        backtracking: float = 0.3
        fakes: int = 1
        lr: float = 1e-4
        fake_lr: float = 3e-4
        half_life: float = 700.0

    config: Config

    def build(self, context: Context) -> None:
        self.teacher: Denoiser = context.teacher
        self.student, self.average, self.fake = self.teacher.copy(), self.teacher.copy(), self.teacher.copy()
        self.nodes = nn.ModuleList(self.teacher.copy() for _ in range(self.config.nodes))
        self.shape, self.guidance = context.shape, context.guidance

    def stages(self) -> list[Stage]:
        c = self.config
        record = Turn("fake", self.denoise, {"fake": self.fake}, optimizer={"fake": OptimizerConfig(c.fake_lr)})
        back = Turn("fake", self.denoise, {"fake": self.fake}, repeat=c.fakes, optimizer=record.optimizer)
        stages = [Stage(f"record {n + 1}", c.recording / c.nodes, [record], end=partial(self.keep, n)) for n in range(c.nodes)]
        # The last record is the fake score itself: the way back starts at the one before it and ends at the teacher.
        back_to = list(reversed(range(c.nodes - 1)))
        left = 1.0 - sum(stage.share for stage in stages) - (c.backtracking if back_to else 0.0)
        targets = [(f"node {n + 1}", c.backtracking / len(back_to), partial(self.node, n)) for n in back_to]
        for name, share, target in [*targets, ("teacher", left, partial(self.node, -1))]:
            follow = Turn("student", partial(self.match, target), {"student": self.student}, optimizer={"student": OptimizerConfig(c.lr)})
            stages.append(Stage(name, share, [back, follow], ema={"average": Ema("student", c.half_life)}))
        return stages

    def keep(self, n: int) -> None:
        self.nodes[n].load_state_dict(self.fake.state_dict())

    def node(self, n: int) -> Denoiser:
        return cast(Denoiser, self.nodes[n]) if n >= 0 else self.teacher

    def samples(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Conditions]:
        """One-step samples, times and noise to look at them, conditions."""
        conditions = batch.conditions()
        start = pure_noise(self.student, (1.0,), batch.randn(batch.size, *self.shape))
        x = self.student.x0(start, 1.0, conditions)
        return x, 0.02 + 0.96 * batch.rand(batch.size), batch.randn(*x.shape), conditions

    def denoise(self, batch: Batch) -> Tensor:
        """Fit the fake score to the student's samples; the recording is this very loss while the student stands still."""
        with torch.no_grad():
            x, t, noise, conditions = self.samples(batch)
        return fake_score_loss(self.fake, x, t, noise, conditions)

    def match(self, target: Callable[[], Denoiser], batch: Batch) -> Tensor:
        """Reverse KL to the present node, normalised as in DMD."""
        return matching_loss(*self.samples(batch), target(), self.fake, guidance_scale=self.guidance)

    def distilled(self) -> FewStepStudent:
        return FewStepStudent(self.average, {1: (1.0,)}, self.shape)
