"""Distribution Matching Distillation, DMD. Yin et al. 2023 (CVPR 2024), arXiv 2311.18828. The authors released no code for it; their
code of DMD2 (tianweiy/DMD2) holds the same two losses.

A one-step student descends the KL divergence to the teacher, averaged over noise levels, and is held to the teacher's own map from
noise to samples on a few stored pairs. x = G(z, c) is the teacher's copy called once, x_t = alpha x + sigma eps:

    pairs       (z', c', y'): y' = ODE of the teacher from z', once, before training
    student     g = (fake(x_t) - teacher(x_t)) / mean |x - teacher(x_t)|               eq. 7-8, algorithm 2
                L = 1/2 mean (x - sg(x - g))^2  +  lambda_reg dist(G(z', c'), y')
    fake        L = |fake(x_t') - sg x|^2                                              fresh t', eps' on the same x

Scores say nothing of how much mass a mode has, so the first term alone may lose modes; the second keeps them. Both networks take one
step a cycle, from the weights before it: one turn with an optimiser for each. The fake score is never guided.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

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
from distillbench.diffusion.solvers import SOLVERS, time_grid
from distillbench.errors import NotApplicable
from distillbench.parts.critics import middle_tap
from distillbench.parts.distribution_matching import fake_score_loss, matching_loss
from distillbench.parts.features import feature_loss
from distillbench.parts.pairs import PairStore
from distillbench.parts.simulation import pure_noise
from distillbench.parts.student import FewStepStudent

T_MIN = 1e-3  # the lowest of the paper's 1000 noise levels


class DMD(Method):
    info = MethodInfo(
        id="dmd",
        version=1,
        title="Distribution Matching Distillation (DMD)",
        paper="arXiv 2311.18828",
        year=2023,
        family="score distillation",
        domain=("diffusion",),
        needs=(),
        data_access="teacher samples",
        steps=(1,),
        trains="one student",
        deviations=(
            "no training code of DMD was released: losses follow the paper and the same authors' code of DMD2",
            "pairs are charged: a tenth of the budget, which buys about a tenth as many pairs as the student makes samples",
            "their solver is DPM-Solver++ with 12 steps; the paper's Heun with 18 (or 256) steps buys a third of the pairs or fewer",
            "times are uniform on [0.02, 0.98] and [0.001, 1] of the teacher's own path, the paper's are 1000 discrete levels",
            "the normaliser mean |x - teacher| is held above 0.001, which matters for vectors only; the paper replaces NaN by 0",
            "reg_distance is L2 by default; the paper's is LPIPS (CIFAR-10 FID 2.66, and 2.78 with L2), for which vectors, digits and "
            "latents have no network",
            "in the place of LPIPS (reg_distance=features): the squared distance of the frozen teacher's middle features, scaled to unit "
            "length, of both samples under the same noise; LPIPS sums several layers of VGG with learned weights, on clean images",
            "with several fake updates per student update (not the paper's) each draws its own batch; with one both losses share their x",
            "the paired samples are not added to the batch of distribution matching (paper: on LAION alone)",
            "t_max is one for the whole training (paper: lowered from 0.98 to 0.5 late in the run with guidance 8)",
            "with start below 1 (not the paper's) the student is given sigma(start) z, and pairs still begin at time 1 with the same z",
            "rates: default 1e-3 for small networks (paper 2e-6 to 5e-5); they fall to 0 by a cosine: a budget ends (paper: constant)",
            "warm-up is 0.25 % of the training of the student (paper: 500 of 20,000 to 350,000 updates)",
            "dropout and augmentation within the network are left out",
            "ablations are compared at equal compute, pairs included; the paper's at equal updates of the student. Regression alone is "
            "cheap and takes about 3.7 times as many updates, and in two dimensions the teacher's map is easy to fit, so that claim may "
            "well fail on mixture2d",
            "not claims: that a start on one mode keeps its mode without the regression (shown by a test), FID of the paper's tables",
        ),
        claims=(
            Claim("one step of the student beats one step of the teacher", "dmd", "teacher", "sliced-w2"),
            Claim("one step of the student beats one step of the teacher", "dmd", "teacher", "in-mode", margin=0.1),
            Claim("with the regression beats distribution matching alone", "dmd", "dmd(lambda_reg=0)", "sliced-w2"),
            Claim("the regression keeps modes", "dmd", "dmd(lambda_reg=0)", "mode-tv"),
            Claim("with distribution matching beats the regression alone", "dmd", "dmd(lambda_dm=0)", "sliced-w2"),
            Claim("without a fake score samples collapse", "dmd(lambda_reg=0)", "dmd(lambda_reg=0,fake=none)", "coverage"),
            Claim("the normaliser of each sample beats the weight sigma/alpha", "dmd", "dmd(weighting=sigma/alpha)", "sliced-w2"),
            Claim("the normaliser of each sample beats the weight sigma^3/alpha", "dmd", "dmd(weighting=sigma^3/alpha)", "sliced-w2"),
        ),
        tunes=(Search("lr", 3e-4, 4e-3, log=True), Search("lambda_reg", 0.1, 10.0, log=True), Search("fake_lr", 5e-4, 5e-3, log=True)),
    )
    student_type = FewStepStudent

    @dataclass(frozen=True)
    class Config:
        lambda_reg: float = knob(0.25, "weight of the regression on pairs (unconditional CIFAR-10: 0.5); 0: no pairs are made", low=0)
        lambda_dm: float = knob(1.0, "weight of distribution matching; 0: regression alone, without a fake score", low=0)
        reg_distance: str = knob("l2", "of the regression: mean squared error, or features of the teacher", choices=("l2", "features"))
        feature_time: float = knob(0.3, "noise level at which the teacher's features are read; 0: of clean samples", low=0, high=1)
        tap: str | None = knob(None, "which features of the teacher; None: the middle of the network")
        pair_share: float = knob(0.1, "share of the budget for the pairs; 0: pairs are made as they are used", low=0, high=0.9)
        n_pairs: int | None = knob(None, "most pairs; None: as many as their share buys (papers: 25,000 to 12 million)", low=1)
        solver: str = knob("dpmpp_2m", "of the pairs (CIFAR-10: heun)", choices=("dpmpp_2m", "heun", "euler", "ddim"))
        ode_steps: int = knob(12, "of that solver (CIFAR-10: 18, ImageNet-64: 256)", low=1, high=1000)
        pair_ratio: float = knob(1.0, "pairs in an update, as a share of its batch (LAION: 0.5)", low=0.01, high=1)
        start: float = knob(1.0, "the time at which the student is called; 0.8 on flow is a better start than pure noise", low=0.1, high=1)
        fake: str = knob("trained", "the fake score: on the student's samples, or none (x itself, SDS)", choices=("trained", "none"))
        fake_per_gen: int = knob(1, "updates of the fake score per update of the student; above 1 in turns of their own", low=1, high=100)
        weighting: str = knob("inv_l1", "of the gradient g", choices=("inv_l1", "sigma/alpha", "sigma^3/alpha", "none"))
        norm_floor: float = knob(1e-3, "least value of the normaliser of inv_l1 (paper: none)", low=1e-9)
        t_min: float = knob(0.02, "lowest noise level of distribution matching", low=T_MIN, high=1)
        t_max: float = knob(0.98, "highest noise level of distribution matching", low=T_MIN, high=1)
        guidance: float | None = knob(None, "of the teacher, for scores and pairs (Stable Diffusion: 3, 8); None: the track's")
        lr: float = knob(1e-3, "of the student (paper: 2e-6 to 5e-5)", low=0)
        fake_lr: float | None = knob(None, "of the fake score; None: lr (paper)", low=0)
        decay: str = knob("cosine", "of both rates, to 0 at the end (paper: constant)", choices=("constant", "linear", "cosine"))
        decay_from: float = knob(0.0, "share of the training after which the decay begins", low=0, high=1)
        warmup: float = knob(0.0025, "share of the training over which both rates rise from 0", low=0, high=1)
        betas: tuple[float, ...] = knob((0.9, 0.999), "of AdamW", low=0, high=1)
        weight_decay: float = knob(0.01, "of AdamW", low=0)
        clip: float | None = knob(10.0, "largest gradient norm of each network", low=1e-9)
        batch_size: int | None = knob(None, "None: the track's", low=1)
        half_life: float = knob(0.0, "of the moving average that is scored, in student updates; 0: none (paper)", low=0)

        def __post_init__(self) -> None:
            if self.lambda_reg == 0 and self.lambda_dm == 0:
                raise ValueError("lambda_reg=0 with lambda_dm=0 leaves the student nothing to learn from")
            if self.t_min >= self.t_max:
                raise ValueError(f"t_min {self.t_min} is not below t_max {self.t_max}")
            if len(self.betas) != 2:
                raise ValueError(f"betas are two numbers, not {len(self.betas)}")

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        if tuple(context.steps) != (1,):
            raise ContractError(f"dmd trains a student of one step, not of {', '.join(map(str, context.steps))}")
        self.grid, self.shape = (c.start,), context.shape
        self.scale = context.guidance if c.guidance is None else c.guidance
        self.teacher: Denoiser = context.teacher
        self.student, self.average = self.teacher.copy(), self.teacher.copy()
        self.fake = self.teacher.copy() if c.fake == "trained" and c.lambda_dm else None
        self.tap = ""
        if c.lambda_reg and c.reg_distance == "features":
            if "taps" not in self.teacher.network.capabilities:
                raise NotApplicable("reg_distance=features needs a network that shows its hidden features")
            self.tap = c.tap or middle_tap(self.teacher)
            self.teacher.network.tap_shape(self.tap)  # says which taps there are, should there be no such one
        self.pairs = PairStore(None if context.folder is None else context.folder / "pairs", device=context.device)

    def stages(self) -> list[Stage]:
        c = self.config
        share = c.pair_share if c.lambda_reg else 0.0
        stages = [Stage("train", 1 - share, self._turns(), ema={"average": Ema("student", c.half_life, rampup=0.05)})]
        if share:
            stages.insert(0, Stage("pairs", share, [Turn("pairs", self.make, batch_size=c.batch_size)], done=self.enough))
        return stages

    def _turns(self) -> list[Turn]:
        c = self.config
        moved = partial(OptimizerConfig, betas=(c.betas[0], c.betas[1]), weight_decay=c.weight_decay, clip=c.clip, warmup=c.warmup,
                        decay=c.decay, decay_from=c.decay_from)  # fmt: skip
        student, fake = moved(c.lr), moved(c.lr if c.fake_lr is None else c.fake_lr)
        if self.fake is not None and c.fake_per_gen == 1:
            return [Turn("both", self.both_turn, {"student": self.student, "fake": self.fake},
                         optimizer={"student": student, "fake": fake}, batch_size=c.batch_size)]  # fmt: skip
        turns = [Turn("student", self.student_turn, {"student": self.student}, optimizer={"student": student}, batch_size=c.batch_size)]
        if self.fake is not None:
            turns.append(Turn("fake", self.fake_turn, {"fake": self.fake}, repeat=c.fake_per_gen, optimizer={"fake": fake},
                              batch_size=c.batch_size))  # fmt: skip
        return turns

    # ------------------------------------------------------------ pairs

    def enough(self) -> bool:
        return self.config.n_pairs is not None and self.pairs.count() >= self.config.n_pairs

    def make(self, batch: Batch) -> None:
        """Work: a batch of pairs."""
        self.pairs.append(*self.solved(batch))

    @torch.no_grad()
    def solved(self, batch: Batch) -> tuple[Tensor, Tensor, Conditions]:
        """Fresh noise z and conditions, and what the guided teacher's ODE makes of them."""
        c, conditions, z = self.config, batch.conditions(), batch.randn(batch.size, *self.shape)
        times = time_grid(self.teacher.path, c.ode_steps)
        y = SOLVERS[c.solver](self.teacher, pure_noise(self.teacher, (1.0,), z), conditions, times, guidance_scale=self.scale)
        return z, y, conditions

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Conditions]:
        """Stored pairs, or, where their share bought none, new ones; as many as pair_ratio says."""
        n = max(1, round(self.config.pair_ratio * batch.size))
        z, y, conditions = self.pairs.draw(batch) if self.pairs.count() else self.solved(batch)
        return z[:n], y[:n], conditions[:n]

    # ------------------------------------------------------------ losses

    def both_turn(self, batch: Batch) -> dict[str, Tensor]:
        """All losses of a cycle on one x; each reaches its own network only."""
        x, conditions = self.generate(batch)
        return {
            "matching": self.matching(batch, x, conditions),
            **({"regression": self.regression(batch)} if self.config.lambda_reg else {}),
            "fake score": self.fake_loss(batch, x, conditions),
        }

    def student_turn(self, batch: Batch) -> dict[str, Tensor]:
        c, losses = self.config, {}
        if c.lambda_dm:
            losses["matching"] = self.matching(batch, *self.generate(batch))
        if c.lambda_reg:
            losses["regression"] = self.regression(batch)
        return losses

    def fake_turn(self, batch: Batch) -> dict[str, Tensor]:
        """The student is frozen in this turn, so its samples carry no graph."""
        return {"fake score": self.fake_loss(batch, *self.generate(batch))}

    def one_step(self, z: Tensor, conditions: Conditions) -> Tensor:
        """G(z, c), as at inference."""
        return self.student.x0(pure_noise(self.student, self.grid, z), self.grid[0], conditions)

    def generate(self, batch: Batch) -> tuple[Tensor, Conditions]:
        conditions = batch.conditions()
        return self.one_step(batch.randn(batch.size, *self.shape), conditions), conditions

    def matching(self, batch: Batch, x: Tensor, conditions: Conditions) -> Tensor:
        """lambda_dm L_DM: its gradient at x is lambda_dm g / x.numel(), and neither score gets one."""
        c = self.config
        t = c.t_min + (c.t_max - c.t_min) * batch.rand(batch.size)
        return c.lambda_dm * matching_loss(x, t, batch.randn(*x.shape), conditions, self.teacher, self.fake, guidance_scale=self.scale,
                                           weighting=c.weighting, floor=c.norm_floor)  # fmt: skip

    def regression(self, batch: Batch) -> Tensor:
        """lambda_reg dist(G(z', c'), y') on pairs, a minibatch of their own."""
        c, (z, y, conditions) = self.config, self.drawn(batch)
        mine = self.one_step(z, conditions)
        if c.reg_distance == "l2":
            return c.lambda_reg * (mine - y).square().mean()
        return c.lambda_reg * feature_loss(self.teacher, self.tap, mine, y, batch.randn(*y.shape), c.feature_time, conditions)

    def fake_loss(self, batch: Batch, x: Tensor, conditions: Conditions) -> Tensor:
        """L_f on x, which is held fixed, over all noise levels."""
        assert self.fake is not None
        t = T_MIN + (1 - T_MIN) * batch.rand(batch.size)
        return fake_score_loss(self.fake, x, t, batch.randn(*x.shape), conditions)

    def distilled(self) -> FewStepStudent:
        return FewStepStudent(self.average, {1: self.grid}, self.shape)
