"""Progressive Volume Distillation (Fang et al. 2023, arXiv 2211.15977) on the contract: a sketch, checked but not benchmarked.

Convert a radiance field into another architecture: match volume features, then points, then pixels, on random rays.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from distillbench.api import Batch, Conditions, Context, Method, MethodInfo, OptimizerConfig, Samples, Stage, Student, Turn


class Field(nn.Module, ABC):
    """What the radiance domain offers: block 1 `volume`, block 2 `heads`, both behind one forward."""

    volume: nn.Module
    heads: nn.Module

    @abstractmethod
    def forward(self, x: Tensor, direction: Tensor, depth: str) -> Mapping[str, Tensor]:
        """At points (m, 3): features (m, 16), the first the log-density; with a depth beyond "features" also colour (m, 3)."""

    @abstractmethod
    def other(self, kind: str, generator: torch.Generator) -> Field:
        """A fresh field of another architecture with heads of the same shapes."""

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Field: ...


def render(field: Field, rays: Conditions, jitter: Tensor, background: Tensor, config: PVD.Config, depth: str) -> dict[str, Tensor]:
    """Field values at the samples of each ray and, with depth "pixels", C = sum w c + (1 - sum w) background."""
    samples = jitter.shape[1]
    edges = torch.arange(samples, device=jitter.device)
    at = config.near + (config.far - config.near) * (edges + jitter) / samples
    direction = rays.field("direction")[:, None].expand(-1, samples, -1)
    x = rays.field("origin")[:, None] + at[..., None] * direction
    values = field(x.flatten(0, 1), direction.flatten(0, 1), depth)
    found = {name: value.unflatten(0, (-1, samples)) for name, value in values.items()}
    found["log density"] = found["features"][..., 0].clamp(config.clip_min, config.clip_max)
    if depth == "pixels":
        spacing = torch.diff(at, dim=1, append=torch.full_like(at[:, :1], config.far))
        optical = found["log density"].exp() * spacing
        weight = torch.exp(-(optical.cumsum(1) - optical)) * -torch.expm1(-optical)
        found["pixels"] = (weight[..., None] * found["colour"]).sum(1) + (1 - weight.sum(1, keepdim=True)) * background
    return found


class FieldStudent(Student):
    """A field; one sample is the colour of one ray on white."""

    steps = (1,)

    def __init__(self, field: Field, config: PVD.Config):
        self.field, self.config = field, config

    def generate(self, conditions: Conditions, *, steps: int, seeds: Sequence[int], guidance: float | None = None,
                 negative: Conditions | None = None) -> Samples:  # fmt: skip
        with torch.no_grad():
            middle = torch.full((len(conditions), self.config.samples), 0.5)
            colours = render(self.field, conditions, middle, torch.ones(3), self.config, "pixels")["pixels"]
        return Samples(colours, evaluations=self.config.samples)

    def save(self, folder: Path) -> None:
        self.field.save(folder)

    @classmethod
    def load(cls, folder: Path) -> FieldStudent:
        return cls(Field.load(folder), PVD.Config())


class PVD(Method):
    info = MethodInfo(
        id="pvd", version=1, title="Progressive Volume Distillation", paper="arXiv 2211.15977", year=2023, family="field conversion",
        domain=("radiance",), needs=(), data_access="conditions", steps=(1,),
    )  # fmt: skip
    student_type = FieldStudent

    @dataclass(frozen=True)
    class Config:
        """shares: of features, points, pixels.  w_*: weights of the unsquared norms; that of the features falls by exp(-decay) in all."""

        student: str = "vm"
        shares: tuple[float, float, float] = (1 / 15, 1 / 10, 5 / 6)
        w_features: float = 0.002
        decay: float = 150.0  # 0.995 an update, 30000 updates
        w_points: float = 0.002
        lr: float = 1e-2
        heads_lr: float = 1e-3
        train_heads: bool = True
        samples: int = 48
        near: float = 2.0
        far: float = 6.0
        clip_min: float = -2.0
        clip_max: float = 7.0

    config: Config

    def build(self, context: Context) -> None:
        self.teacher: Field = context.teacher
        self.student = self.teacher.other(self.config.student, context.generator("student")).to(context.device)
        self.student.heads.load_state_dict(self.teacher.heads.state_dict())

    def stages(self) -> list[Stage]:
        c, stages = self.config, []
        rate = partial(OptimizerConfig, betas=(0.9, 0.99), eps=1e-15, decay="cosine", floor=7e-3, over="training")
        for depth, share in zip(("features", "points", "pixels"), c.shares, strict=True):
            moved, rates = {"volume": self.student.volume}, {"volume": rate(c.lr)}
            if depth != "features" and c.train_heads:
                moved["heads"], rates["heads"] = self.student.heads, rate(c.heads_lr)
            stages.append(Stage(depth, share, [Turn("student", partial(self.loss, depth), moved, optimizer=rates)]))
        return stages

    def loss(self, depth: str, batch: Batch) -> dict[str, Tensor]:
        """Frobenius norms of the differences in features, then also log-densities and colours, then also pixels (Eqs. of section 3)."""
        c, rays = self.config, batch.conditions()
        jitter, background = batch.rand(batch.size, c.samples, dtype=torch.float32), batch.rand(batch.size, 3, dtype=torch.float32)
        made = render(self.student, rays, jitter, background, c, depth)
        with torch.no_grad():
            target = render(self.teacher, rays, jitter, background, c, depth)
        fading = c.w_features * math.exp(-c.decay * batch.overall)
        weights = {"features": fading}
        if depth != "features":
            weights |= {"log density": c.w_points, "colour": c.w_points}
        if depth == "pixels":
            weights["pixels"] = 1.0
        return {name: weight * vector_norm(made[name] - target[name]) for name, weight in weights.items()}

    def distilled(self) -> FieldStudent:
        return FieldStudent(self.student, self.config)
