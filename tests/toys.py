"""Toys for tests of the loop and the meter: a tiny teacher, endless data, and methods that use every corner of the contract."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distillbench.api import (
    Conditions,
    Context,
    Ema,
    Method,
    MethodInfo,
    OptimizerConfig,
    Samples,
    Stage,
    Student,
    Turn,
    external,
    knob,
)
from distillbench.budget import Budget
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import Flow
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts.shards import Shards
from distillbench.training.loop import Loop
from distillbench.training.meter import Meter, pass_cost

SHAPE = (2,)


def toy_teacher(width: int = 8) -> Denoiser:
    """An untrained network; what it says does not matter here."""
    network = MLP(MLPConfig(width=width, depth=3, classes=4), torch.Generator().manual_seed(1))
    return external(Denoiser(network, Flow(), "velocity"))


class ToySource:
    """Standard normal points with labels."""

    def draw(self, n, generator):
        return torch.randn(n, 2, generator=generator), self.conditions(n, generator)

    def conditions(self, n, generator):
        return Conditions({"label": torch.randint(4, (n,), generator=generator)}, {"label": 4})


class ToyStudent(Student):
    steps = (1,)

    def generate(self, conditions, *, steps, seeds, guidance=None, negative=None):
        return Samples(torch.zeros(len(conditions), 2), 0)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def load(cls, folder: Path):
        return cls()


class Toy(Method):
    """Three stages: record pairs (work), regress on them with an average, then play a game of random rollout length."""

    info = MethodInfo(
        id="toy", version=1, title="A toy", paper="none", year=2024, family="toy", domain=("diffusion",), needs=("real data",),
        data_access="real", steps=(1,),
    )  # fmt: skip
    student_type = ToyStudent

    @dataclass(frozen=True)
    class Config:
        lr: float = knob(1e-2, "learning rate", low=0.0, high=1.0)
        accumulate: int = knob(1, "parts of a batch", low=1)

    def build(self, context: Context) -> None:
        self.teacher = context.teacher
        self.student = context.teacher.copy()
        self.average = context.teacher.copy()
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
        generator = context.generator("critic")
        for parameter in self.critic.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.pairs = Shards(context.folder / "pairs") if context.folder else None
        self.seen = 0
        self.scale = torch.ones(())

    def stages(self) -> list[Stage]:
        fast = OptimizerConfig(lr=self.config.lr, clip=1.0, warmup=0.1, decay="cosine", decay_from=0.5)
        student, critic = {"student": self.student}, {"critic": self.critic}
        pairs = [Turn("pairs", self.record)] if self.pairs is not None else []
        ema = {"average": Ema("student", 10.0, rampup=0.5)}
        regress = Turn("regress", self.regress, student, 1, {"student": fast}, accumulate=self.config.accumulate)
        fool = Turn("fool", self.fool, student, 1, {"student": fast})
        judge = Turn("judge", self.judge, critic, 2, {"critic": OptimizerConfig(lr=1e-2, name="adam")})
        return [
            Stage("regress", 0.5, [*pairs, regress], ema=ema),
            Stage("game", 0.5, [fool, judge], begin=self.start_game, ema=ema),
        ]

    def start_game(self) -> None:
        self.student.load_state_dict(self.average.state_dict())

    def record(self, batch) -> None:
        conditions = batch.conditions()
        z = batch.randn(batch.size, 2)
        self.pairs.append(z=z, x=self.teacher.x0(z, 1.0, conditions), label=conditions.field("label"))
        self.seen += batch.size

    def regress(self, batch):
        x, conditions = batch.data()
        t = batch.rand(batch.size)
        loss = (self.student.velocity(x, t, conditions) - self.teacher.velocity(x, t, conditions) - 0.1).square().mean()
        if self.pairs is None or not len(self.pairs):
            return loss
        pair = self.pairs.read(len(self.pairs) - 1)
        known = Conditions({"label": pair["label"]}, {"label": 4})
        return {"velocity": loss, "pairs": (self.student.x0(pair["z"], 1.0, known) - pair["x"]).square().mean()}

    def generate(self, batch):
        x, conditions = batch.randn(batch.size, 2), batch.conditions()
        for _ in range(int(batch.choice(3, 1)) + 1):
            x = self.student.x0(x, 1.0, conditions)
        return x

    def fool(self, batch):
        return nn.functional.softplus(-self.critic(self.generate(batch))).mean()

    def judge(self, batch):
        real, _ = batch.data()
        with torch.no_grad():
            fake = self.generate(batch)
        real.requires_grad_(True)
        logit = self.critic(real)
        (slope,) = torch.autograd.grad(logit.sum(), real, create_graph=True)
        losses = nn.functional.softplus(self.critic(fake)).mean() + nn.functional.softplus(-logit).mean()
        return {"gan": losses, "r1": 0.1 * slope.square().sum(1).mean()}

    def distilled(self) -> Student:
        return ToyStudent()


def toy_loop(method_class=Toy, *, budget: Budget | None = None, folder: Path | None = None, exact: bool = False, teacher=None,
             config=None, seed: int = 0, **options) -> Loop:  # fmt: skip
    """A built toy in its loop; loop.method is the method."""
    teacher = teacher or toy_teacher()
    method = method_class(config)
    context = Context(teacher, SHAPE, (1,), seed=seed, folder=folder)
    method.build(context)
    one = Conditions({"label": torch.zeros(1, dtype=torch.long)}, {"label": 4})
    return Loop(method, context, ToySource(), budget or Budget("test", 20, "steps"), unit=pass_cost(teacher, SHAPE, one),
                batch_size=16, folder=folder, meter=options.pop("meter", None) or Meter(exact=exact), **options)  # fmt: skip
