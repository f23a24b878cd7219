"""Multi-Student Distillation (Song et al. 2024, arXiv 2410.23274) on the contract: a sketch, checked but not benchmarked.

K one-step students, each for its part of the conditions: distribution matching, then the same with a critic on real data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from distillbench.api import (
    Batch,
    Conditions,
    Context,
    ContractError,
    Ema,
    Method,
    MethodInfo,
    OptimizerConfig,
    Samples,
    Stage,
    Student,
    Turn,
)
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.solvers import jump
from distillbench.parts.critics import discriminator_loss, generator_loss, logits, make_head, middle_tap
from distillbench.parts.distribution_matching import fake_score_loss, matching_loss
from distillbench.parts.simulation import pure_noise
from distillbench.parts.student import FewStepStudent


class RoutedStudent(Student):
    """K one-step students and a table from label to student: one evaluation, whatever K."""

    steps = (1,)

    def __init__(self, students: Sequence[FewStepStudent], route: Tensor):
        self.students, self.route = students, route.cpu()

    def generate(self, conditions: Conditions, *, steps: int, seeds: Sequence[int], guidance: float | None = None,
                 negative: Conditions | None = None) -> Samples:  # fmt: skip
        part = self.route[conditions.field("label").cpu()]
        rows = [(part == k).nonzero().flatten() for k in range(len(self.students))]
        made = [
            s.generate(conditions[r], steps=steps, seeds=[seeds[i] for i in r.tolist()]).x for s, r in zip(self.students, rows, strict=True)
        ]
        return Samples(torch.cat(made)[torch.argsort(torch.cat(rows))], evaluations=1)

    def save(self, folder: Path) -> None:
        for k, student in enumerate(self.students):
            student.save(folder / str(k))
        (folder / "route.json").write_text(json.dumps(self.route.tolist()))

    @classmethod
    def load(cls, folder: Path) -> RoutedStudent:
        route = torch.tensor(json.loads((folder / "route.json").read_text()))
        return cls([FewStepStudent.load(folder / str(k)) for k in range(int(route.max()) + 1)], route)


class MSD(Method):
    info = MethodInfo(
        id="msd", version=1, title="Multi-Student Distillation", paper="arXiv 2410.23274", year=2024, family="score distillation",
        domain=("diffusion",), needs=("labels", "real data", "taps"), data_access="real", steps=(1,),
        deviations=("matching on two time scales instead of the regression on pairs", "one pre-training shared by all smaller students"),
    )  # fmt: skip
    student_type = RoutedStudent

    @dataclass(frozen=True)
    class Config:
        """width: of the students; None is the teacher's, another one is first trained as a denoiser."""

        students: int = 4
        width: int | None = None
        pretraining: float = 0.3
        adversarial: float = 0.2
        fakes: int = 5
        lr: float = 1e-4
        late_lr: float = 2.5e-5
        generator_weight: float = 3e-3
        critic_weight: float = 1e-2
        half_life: float = 700.0

    config: Config

    def build(self, context: Context) -> None:
        c, teacher = self.config, context.teacher
        if context.catalog is None or not 1 <= c.students <= len(context.catalog):
            raise ContractError(f"msd needs a list of at least {c.students} conditions to cut into parts")
        labels = context.catalog.field("label")
        self.route = torch.zeros(int(labels.max()) + 1, dtype=torch.int64)
        self.route[labels] = torch.arange(len(labels)) * c.students // len(labels)  # consecutive, equal to within one
        self.teacher: Denoiser = teacher
        start = teacher if c.width is None else teacher.with_network(teacher.network.resized(c.width, context.generator("students")))
        self.students, self.averages, self.fakes = (
            nn.ModuleList(source.copy() for _ in range(c.students)) for source in (start, start, teacher)
        )
        self.tap, generator = middle_tap(teacher), context.generator("heads")
        self.heads = nn.ModuleList(make_head(teacher.network.tap_shape(self.tap), generator) for _ in range(c.students))
        self.shape, self.guidance = context.shape, context.guidance
        self.part_size = max(1, context.batch_size // c.students)  # B/K each, so that K students see what one would

    def stages(self) -> list[Stage]:
        c = self.config
        small = c.pretraining if c.width is not None else 0.0
        first = Turn("pretraining", self.copy_teacher, {"student": self.students[0]}, optimizer={"student": OptimizerConfig(c.lr)})
        stages = [Stage("pretraining", small, [first], end=self.share)] if small else []
        stages.append(self.stage("matching", 1.0 - small - c.adversarial, c.lr, critic=False))
        stages.append(self.stage("adversarial", c.adversarial, c.late_lr, critic=True))
        return stages

    def stage(self, name: str, share: float, lr: float, critic: bool) -> Stage:
        c, turns, rate = self.config, [], OptimizerConfig(lr)
        for k in range(c.students):
            judges: dict[str, nn.Module] = {"fake": self.fakes[k]} | ({"head": self.heads[k]} if critic else {})
            fake, student = partial(self.judge, k, critic), partial(self.match, k, critic)
            turns.append(Turn(f"fake {k}", fake, judges, repeat=c.fakes, optimizer=dict.fromkeys(judges, rate), batch_size=self.part_size))
            moved: dict[str, nn.Module] = {"student": self.students[k]}
            turns.append(Turn(f"student {k}", student, moved, optimizer={"student": rate}, batch_size=self.part_size))
        return Stage(name, share, turns, ema={f"averages.{k}": Ema(f"students.{k}", c.half_life) for k in range(c.students)})

    def share(self) -> None:
        for network in [*list(self.students)[1:], *self.averages]:
            network.load_state_dict(self.students[0].state_dict())

    def within(self, k: int, conditions: Conditions) -> Tensor:
        return self.route[conditions.field("label")] == k

    def trio(self, k: int) -> tuple[Denoiser, Denoiser, nn.Module]:
        return cast(Denoiser, self.students[k]), cast(Denoiser, self.fakes[k]), self.heads[k]

    def times(self, batch: Batch) -> Tensor:
        return 0.02 + 0.96 * batch.rand(batch.size)

    def samples(self, k: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Conditions]:
        """One-step samples of student k for its part, times and noise to look at them, conditions."""
        student, conditions = self.trio(k)[0], batch.conditions(partial(self.within, k))
        x = student.x0(pure_noise(student, (1.0,), batch.randn(batch.size, *self.shape)), 1.0, conditions)
        return x, self.times(batch), batch.randn(*x.shape), conditions

    def logit(self, k: int, x: Tensor, conditions: Conditions, batch: Batch) -> Tensor:
        _, fake, head = self.trio(k)
        t = self.times(batch)
        return logits(fake, head, self.tap, jump(fake.path, x, batch.randn(*x.shape), t), t, conditions)

    def copy_teacher(self, batch: Batch) -> Tensor:
        """TSM: E |student(x_t) - sg teacher(x_t)|^2 on real x_0 of every part."""
        (x, conditions), t = batch.data(), self.times(batch)
        x_t = jump(self.teacher.path, x, batch.randn(*x.shape), t)
        with torch.no_grad():
            target = self.teacher.x0(x_t, t, conditions)
        return (self.trio(0)[0].x0(x_t, t, conditions) - target).square().mean()

    def judge(self, k: int, critic: bool, batch: Batch) -> dict[str, Tensor]:
        """Fit the fake score to the student's samples; with a critic also tell them from real data, both within the part."""
        with torch.no_grad():
            x, t, noise, conditions = self.samples(k, batch)
        terms = {"denoising": fake_score_loss(self.trio(k)[1], x, t, noise, conditions)}
        if critic:
            real, its = batch.data(partial(self.within, k))
            parted = discriminator_loss(self.logit(k, real, its, batch), self.logit(k, x, conditions, batch))
            terms["critic"] = self.config.critic_weight * parted
        return terms

    def match(self, k: int, critic: bool, batch: Batch) -> dict[str, Tensor]:
        """Reverse KL to the teacher on the part; with a critic also its generator loss."""
        x, t, noise, conditions = self.samples(k, batch)
        terms = {"matching": matching_loss(x, t, noise, conditions, self.teacher, self.trio(k)[1], guidance_scale=self.guidance)}
        if critic:
            terms["adversarial"] = self.config.generator_weight * generator_loss(self.logit(k, x, conditions, batch))
        return terms

    def distilled(self) -> RoutedStudent:
        grid = {1: (1.0,)}
        return RoutedStudent([FewStepStudent(cast(Denoiser, a), grid, self.shape) for a in self.averages], self.route)
