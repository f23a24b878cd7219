"""Improved Distribution Matching Distillation, DMD2. Yin et al. 2024 (NeurIPS), arXiv 2405.14867; official code tianweiy/DMD2.

The student G is a copy of the teacher, called at a few fixed times t_1 > ... > t_N; between them its x0 is noised afresh.
A second copy, the fake score, is kept fitted to the student's samples. With x = G(x_in, t_k, c), x_t = alpha x + sigma eps:

    generator   g = (fake(x_t) - teacher(x_t)) / mean |x - teacher(x_t)|               DMD, arXiv 2311.18828, eq. 7-8
                L = 1/2 mean (x - sg(x - g))^2  +  lambda_gan softplus(-l(x_t))         l: head on the fake score's features
    guidance    L = |fake(x_t) - sg x|^2  +  lambda_dis (softplus(l(x_t)) + softplus(-l(real_t)))

Two time scales (section 4.2): each generator update is followed by R guidance updates. x_in is what the student itself
produces in steps 1 ... k - 1 from pure noise (backward simulation, section 4.5), with one random k for the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench.api import (
    Batch,
    Claim,
    Conditions,
    Context,
    ContractError,
    Ema,
    Method,
    MethodInfo,
    OptimizerConfig,
    Search,
    Stage,
    Turn,
    knob,
)
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.solvers import jump
from distillbench.parts import critics
from distillbench.parts.distribution_matching import fake_score_loss, matching_loss
from distillbench.parts.simulation import simulated_input, step_grid
from distillbench.parts.student import FewStepStudent

T_MIN = 1e-3  # the lowest of the 1000 noise levels of the paper


class DMD2(Method):
    info = MethodInfo(
        id="dmd2",
        version=2,
        title="Improved Distribution Matching Distillation (DMD2)",
        paper="arXiv 2405.14867",
        year=2024,
        family="score distillation",
        domain=("diffusion",),
        needs=("taps", "real data"),
        data_access="real",
        steps=(1, 2, 4),
        trains="a student per step count",
        deviations=(
            "each turn draws its own batch; the official code gives the generator's batch also to the guidance update after it",
            "times are uniform on [0.001, 1] (0.02 to 0.98 for matching), the paper's are 1000 discrete levels",
            "the normaliser mean |x - teacher| is held above 0.001, which matters for vectors only; the paper replaces NaN by 0",
            "the head sits on the middle tap, an MLP on vectors; on maps the paper's convolutions with at most 8 groups instead of 32",
            "rates: default 1e-4 for small networks (paper 5e-7 to 1e-5 for networks of 0.3 to 2.6 billion weights)",
            "the rates fall to 0 by a cosine: a budget ends, where the paper's long runs hold them (decay=constant)",
            "warm-up is 0.25 % of the training (paper: 500 of 200,000 updates)",
            "the one-step SDXL warm-up by regression on teacher samples is left out",
        ),
        claims=(
            Claim(
                "five guidance updates per generator update beat one (no GAN)",
                "dmd2(fake_per_gen=5,gan=false)",
                "dmd2(fake_per_gen=1,gan=false)",
                "sliced-w2",
            ),
            Claim("the GAN term on real data corrects the teacher's errors", "dmd2", "dmd2(gan=false)", "sliced-w2"),
            Claim("backward simulation beats noised real data as input", "dmd2", "dmd2(sim=forward)", "sliced-w2", steps=4),
            Claim("distribution matching with the GAN beats the GAN alone", "dmd2", "dmd2(lambda_dm=0)", "sliced-w2"),
            Claim("one step of the student beats one step of the teacher", "dmd2", "teacher", "in-mode", margin=0.1),
        ),
        tunes=(
            Search("lr", 2e-4, 4e-3, log=True),
            Search("lambda_gan", 3e-3, 3.0, log=True),
            Search("batch_size", choices=(128, 256)),
        ),
    )
    student_type = FewStepStudent

    @dataclass(frozen=True)
    class Config:
        fake_per_gen: int = knob(5, "R, guidance updates per generator update (SD1.5: 10)", low=1, high=100)
        lambda_dm: float = knob(1.0, "weight of distribution matching; 0 leaves the GAN alone", low=0)
        gan: bool = knob(True, "train with the GAN term on real data; false: no data is drawn")
        lambda_gan: float = knob(3e-3, "weight of the generator's GAN loss (ImageNet-64 3e-3, SDXL 5e-3)", low=0)
        lambda_dis: float = knob(1e-2, "weight of the discriminator's loss beside the fake score's", low=0)
        gan_start: float = knob(0.0, "share of the budget before the GAN term sets in (the paper's long run: about 0.7)", low=0, high=0.99)
        gan_rate: float = knob(0.25, "what multiplies both rates once the GAN sets in; read only if gan_start > 0", low=0)
        gan_t_max: float = knob(1.0, "the discriminator sees noise levels up to this", low=T_MIN, high=1)
        gan_features: str = knob("fake", "whose features the head reads: fake (paper) or teacher (FastGen)", choices=("fake", "teacher"))
        tap: str | None = knob(None, "which features; None: the middle of the network")
        t_min: float = knob(0.02, "lowest noise level of distribution matching", low=T_MIN, high=1)
        t_max: float = knob(0.98, "highest noise level of distribution matching", low=T_MIN, high=1)
        weighting: str = knob("inv_l1", "of the gradient g", choices=("inv_l1", "sigma/alpha", "sigma^3/alpha", "none"))
        norm_floor: float = knob(1e-3, "least value of the normaliser of inv_l1 (paper: none)", low=1e-9)
        guidance: float | None = knob(None, "guidance scale of the teacher; None: the track's")
        sim: str = knob("backward", "inputs of later steps: the student's own states, or noised real data", choices=("backward", "forward"))
        grid: tuple[float, ...] = knob((), "times of the steps, falling from 1; empty: evenly spaced", low=T_MIN, high=1)
        shift: float = knob(
            1.0, "above 1 moves evenly spaced times towards noise (flow image teachers: 3), below 1 towards data", low=0.1, high=20
        )
        lr: float = knob(1e-4, "of the generator", low=0)
        fake_lr: float | None = knob(None, "of the fake score and the head; None: lr", low=0)
        decay: str = knob(
            "cosine", "of both rates, to 0 at the end (paper: constant, on long runs)", choices=("constant", "linear", "cosine")
        )
        decay_from: float = knob(0.0, "share of the training after which the decay begins", low=0, high=1)
        warmup: float = knob(0.0025, "share of the training over which both rates rise from 0", low=0, high=1)
        betas: tuple[float, ...] = knob((0.9, 0.999), "of AdamW", low=0, high=1)
        weight_decay: float = knob(0.01, "of AdamW", low=0)
        clip: float | None = knob(10.0, "largest norm of the generator's gradient, and of fake score and head together", low=1e-9)
        batch_size: int | None = knob(None, "None: the track's", low=1)
        half_life: float = knob(0.0, "of the moving average that is scored, in generator updates; 0: none (paper)", low=0)

        def __post_init__(self) -> None:
            if not self.gan and self.lambda_dm == 0:
                raise ValueError("gan=false with lambda_dm=0 leaves the generator nothing to learn from")
            if self.t_min >= self.t_max:
                raise ValueError(f"t_min {self.t_min} is not below t_max {self.t_max}")
            if len(self.betas) != 2:
                raise ValueError(f"betas are two numbers, not {len(self.betas)}")

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        if len(context.steps) != 1:
            raise ContractError(
                f"{self.info.id} trains one student per step count: train it for each of {', '.join(map(str, context.steps))} by itself"
            )
        steps = context.steps[0]
        if c.grid and len(c.grid) != steps:
            raise ContractError(f"{self.info.id}: the knob grid has {len(c.grid)} times for a student of {steps} steps; give {steps}")
        self.grid = c.grid or step_grid(steps, c.shift)
        self.shape = context.shape
        self.scale = context.guidance if c.guidance is None else c.guidance
        self.teacher: Denoiser = context.teacher
        self.student, self.average, self.fake = self.teacher.copy(), self.teacher.copy(), self.teacher.copy()
        self.head: nn.Module = nn.Identity()
        self.tap = ""
        if c.gan:
            self.tap = c.tap or critics.middle_tap(self.teacher)
            self.head = critics.make_head(self.teacher.network.tap_shape(self.tap), context.generator("head")).to(context.device)
        self.guide = nn.ModuleList([self.fake, self.head])  # one optimiser: their losses meet in the same weights

    def stages(self) -> list[Stage]:
        c = self.config
        if not c.gan:
            return [self._stage("matching", 1.0, gan=False)]
        if c.gan_start == 0:
            return [self._stage("joint", 1.0, gan=True)]
        second = self._stage("joint", 1.0 - c.gan_start, gan=True, rate=c.gan_rate, reset=("generator", "guidance"))
        return [self._stage("matching", c.gan_start, gan=False), second]

    def _stage(self, name: str, share: float, *, gan: bool, rate: float = 1.0, reset: tuple[str, ...] = ()) -> Stage:
        c = self.config
        moved = partial(OptimizerConfig, betas=(c.betas[0], c.betas[1]), weight_decay=c.weight_decay, clip=c.clip, warmup=c.warmup,
                        decay=c.decay, decay_from=c.decay_from)  # fmt: skip
        generator = Turn(
            "generator", partial(self.generator_loss, gan), {"student": self.student},
            optimizer={"student": moved(rate * c.lr)}, batch_size=c.batch_size,
        )  # fmt: skip
        guidance = Turn(
            "guidance", partial(self.guidance_loss, gan), {"guide": self.guide}, repeat=c.fake_per_gen,
            optimizer={"guide": moved(rate * (c.lr if c.fake_lr is None else c.fake_lr))}, batch_size=c.batch_size,
        )  # fmt: skip
        return Stage(name, share, [generator, guidance], reset=reset, ema={"average": Ema("student", c.half_life, rampup=0.05)})

    def generate(self, batch: Batch) -> tuple[Tensor, Conditions]:
        """x = G(x_in, t_k, c) for one random k of the whole batch; the gradient flows through this last call only."""
        k = int(batch.choice(len(self.grid)))

        def noise(_: int) -> Tensor:
            return batch.randn(batch.size, *self.shape)

        if k == 0 or self.config.sim == "backward":
            conditions = batch.conditions()
            x_in = simulated_input(self.student, self.grid, k, conditions, noise)
        else:
            real, conditions = batch.data()
            x_in = jump(self.student.path, real, noise(k), self.grid[k])
        return self.student.x0(x_in, self.grid[k], conditions), conditions

    def generator_loss(self, gan: bool, batch: Batch) -> dict[str, Tensor]:
        """L_DM + lambda_gan L_gan. Both scores and the head are frozen; the GAN's gradient passes through them into x."""
        c = self.config
        x, conditions = self.generate(batch)
        losses = {}
        if c.lambda_dm > 0:
            t = c.t_min + (c.t_max - c.t_min) * batch.rand(batch.size)
            matching = matching_loss(x, t, batch.randn(*x.shape), conditions, self.teacher, self.fake,
                                     guidance_scale=self.scale, weighting=c.weighting, floor=c.norm_floor)  # fmt: skip
            losses["matching"] = c.lambda_dm * matching
        if gan:
            losses["gan"] = c.lambda_gan * critics.generator_loss(self.logits(batch, x, conditions))
        return losses

    def guidance_loss(self, gan: bool, batch: Batch) -> dict[str, Tensor]:
        """L_fake + lambda_dis L_dis, on samples that are held fixed."""
        with torch.no_grad():
            x, conditions = self.generate(batch)
        t = T_MIN + (1 - T_MIN) * batch.rand(batch.size)
        losses = {"fake score": fake_score_loss(self.fake, x, t, batch.randn(*x.shape), conditions)}
        if gan:
            real = self.logits(batch, *batch.data())
            losses["discriminator"] = self.config.lambda_dis * critics.discriminator_loss(real, self.logits(batch, x, conditions))
        return losses

    def logits(self, batch: Batch, x: Tensor, conditions: Conditions) -> Tensor:
        """The head's opinion of x, noised to a random level."""
        t = T_MIN + (self.config.gan_t_max - T_MIN) * batch.rand(batch.size)
        return self.judge(jump(self.teacher.path, x, batch.randn(*x.shape), t), t, conditions)

    def judge(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        seen = self.fake if self.config.gan_features == "fake" else self.teacher
        return critics.logits(seen, self.head, self.tap, x_t, t, conditions)

    def distilled(self) -> FewStepStudent:
        return FewStepStudent(self.average, {len(self.grid): self.grid}, self.shape)
