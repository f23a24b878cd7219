"""Hyper-SD (Ren et al. 2024, arXiv 2404.13686) on the contract: a sketch, checked but not benchmarked.

Consistency within k = 8, 4, 2, 1 segments in turn; adapters for a reward, merged; distribution matching for one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import relu

from distillbench.api import Batch, Conditions, Context, Ema, Method, MethodInfo, OptimizerConfig, Stage, Turn
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.solvers import jump
from distillbench.networks.lora import merge_adapters
from distillbench.parts.critics import logits, make_head, middle_tap
from distillbench.parts.distribution_matching import fake_score_loss, matching_loss
from distillbench.parts.simulation import pure_noise
from distillbench.parts.student import FewStepStudent


class HyperSD(Method):
    info = MethodInfo(
        id="hyper_sd", version=1, title="Hyper-SD", paper="arXiv 2404.13686", year=2024, family="consistency", domain=("diffusion",),
        needs=("real data", "taps", "lora"), data_access="real", steps=(1, 2, 4, 8),
        deviations=("all weights are trained, adapters carry the reward only", "fresh noise at every step of sampling (eta = 1)"),
    )  # fmt: skip
    student_type = FewStepStudent

    @dataclass(frozen=True)
    class Config:
        """segments, points (of the solver), mse and adversarial (weights, ours: the paper prints none): one entry a stage."""

        segments: tuple[int, ...] = (8, 4, 2, 1)
        points: tuple[int, ...] = (64, 32, 16, 8)
        mse: tuple[float, ...] = (1.0, 1.0, 0.5, 0.1)
        adversarial: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)
        feedback: float = 0.1  # share
        one_step: float = 0.2  # share
        rank: int = 8
        hinge: float = 0.0
        fakes: int = 5
        lr: float = 5e-4
        critic_lr: float = 1e-3
        half_life: float = 13.5  # 0.95 an update

    config: Config

    def build(self, context: Context) -> None:
        self.teacher: Denoiser = context.teacher
        self.student, self.average, self.solver, self.fake = (self.teacher.copy() for _ in range(4))
        self.tuned = self.teacher.with_network(self.teacher.network.lora(self.config.rank, context.generator("adapters")))
        self.tap = middle_tap(self.teacher)
        self.critic = make_head(self.teacher.network.tap_shape(self.tap), context.generator("critic"))
        self.shape, self.guidance, self.steps = context.shape, context.guidance, context.steps

    def stages(self) -> list[Stage]:
        c, ema = self.config, {"average": Ema("student", self.config.half_life)}
        student, critic = {"student": OptimizerConfig(c.lr)}, {"critic": OptimizerConfig(c.critic_lr)}
        stages = []
        for i, k in enumerate(c.segments):
            turns = [Turn("critic", partial(self.judge, i), {"critic": self.critic}, optimizer=critic)] if c.adversarial[i] else []
            turns.append(Turn("student", partial(self.consistency, i), {"student": self.student}, optimizer=student))
            share = (1.0 - c.feedback - c.one_step) / len(c.segments)
            stages.append(Stage(f"{k} segments", share, turns, end=self.next_solver, ema=ema))
        reward = Turn("feedback", self.feedback, {"adapters": self.tuned}, optimizer={"adapters": OptimizerConfig(c.lr)})
        fake = Turn("fake", self.denoise, {"fake": self.fake}, repeat=c.fakes, optimizer={"fake": OptimizerConfig(c.lr)})
        sharpen = Turn("one step", self.match, {"student": self.student}, optimizer=student)
        stages.append(Stage("feedback", c.feedback, [reward], begin=self.adapt, end=self.merge))
        stages.append(Stage("one step", c.one_step, [fake, sharpen], ema=ema))
        return stages

    def next_solver(self) -> None:
        self.solver.load_state_dict(self.average.state_dict())

    def adapt(self) -> None:
        self.tuned.network.load_state_dict(self.average.network.state_dict(), strict=False)  # the base; the adapters stay

    def merge(self) -> None:
        for target in (self.student, self.average):
            target.network.load_state_dict(merge_adapters(self.tuned.network))

    def pair(self, i: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Conditions]:
        """Student jump from t_n, EMA jump from the solver's t_{n-1}, both to a random end in the segment (Algorithm 1); end; conditions."""
        path, k, points = self.teacher.path, self.config.segments[i], self.config.points[i]
        x, conditions = batch.data()
        n = 1 + batch.choice(points, batch.size)
        t, before = n.double() / points, ((n - 1).double() / points).clamp_min(1e-3)
        start = ((n * k + points - 1) // points - 1).double() / k
        end = start + (before - start) * batch.rand(batch.size)
        x_t = jump(path, x, batch.randn(*x.shape), t)
        with torch.no_grad():
            solver, scale = (self.teacher, self.guidance) if i == 0 else (self.solver, None)
            step = solver.predict(x_t, t, conditions, guidance_scale=scale)
            there = self.average.predict(jump(path, step.x0, step.eps, before), before, conditions)
        here = self.student.predict(x_t, t, conditions)
        return jump(path, here.x0, here.eps, end), jump(path, there.x0, there.eps, end), end, conditions

    def logit(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return logits(self.teacher, self.critic, self.tap, x, t, conditions)

    def judge(self, i: int, batch: Batch) -> Tensor:
        """Hinge: relu(1 + D(student's jump)) + relu(1 - D(target))."""
        made, target, end, conditions = self.pair(i, batch)
        return (relu(1 + self.logit(made, end, conditions)) + relu(1 - self.logit(target, end, conditions))).mean()

    def consistency(self, i: int, batch: Batch) -> dict[str, Tensor]:
        made, target, end, conditions = self.pair(i, batch)
        terms = {"mse": self.config.mse[i] * (made - target).square().mean()}
        if self.config.adversarial[i]:
            terms["adversarial"] = self.config.adversarial[i] * relu(1 - self.logit(made, end, conditions)).mean()
        return terms

    def feedback(self, batch: Batch) -> Tensor:
        """relu(hinge - r(x_0')), gradient through the last prediction only. r = -mean x^2 stands in: the context has no reward."""
        conditions, late = batch.conditions(), 0.2 + 0.6 * batch.rand(batch.size)
        with torch.no_grad():
            first = self.tuned.predict(pure_noise(self.tuned, (1.0,), batch.randn(batch.size, *self.shape)), 1.0, conditions)
        x = self.tuned.x0(jump(self.teacher.path, first.x0, first.eps, late), late, conditions)
        return relu(self.config.hinge + x.square().flatten(1).mean(1)).mean()

    def samples(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Conditions]:
        conditions = batch.conditions()
        x = self.student.x0(pure_noise(self.student, (1.0,), batch.randn(batch.size, *self.shape)), 1.0, conditions)
        return x, 0.02 + 0.96 * batch.rand(batch.size), batch.randn(*x.shape), conditions

    def denoise(self, batch: Batch) -> Tensor:
        """Fit the fake score to one-step samples."""
        with torch.no_grad():
            x, t, noise, conditions = self.samples(batch)
        return fake_score_loss(self.fake, x, t, noise, conditions)

    def match(self, batch: Batch) -> Tensor:
        """Distribution matching towards the segment-consistent model, not the teacher (the paper's lower score error)."""
        return matching_loss(*self.samples(batch), self.solver, self.fake)

    def distilled(self) -> FewStepStudent:
        return FewStepStudent(self.average, {n: tuple(1.0 - j / n for j in range(n)) for n in self.steps}, self.shape)
