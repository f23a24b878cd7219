"""Diff-Instruct. Luo et al. 2023 (NeurIPS), arXiv 2305.18455; official code pkulwj1994/diff_instruct.

One-step distillation without data: descend the integral over noise levels of KL(student_t || teacher_t). The student x = G(z, c) is the
teacher's copy D(sigma_init z, sigma_init, c). The student's score is learnt by a second copy of the teacher, the fake score, by denoising
the student's samples. At x_t = alpha x + sigma eps, with D the denoisers' means of x0:

    fake      L = E denoising loss of D_fake on sg x                             z, t, eps drawn for it
    student   L = E sum over elements of  sg[ w (D_fake(x_t) - D_teacher(x_t)) ] x     z, t, eps drawn afresh; w = 1

w = 1 on means of x0 weighs the divergence at each level by sigma^2 / alpha^2; w = alpha^2 / sigma^2 is the divergence's own gradient.
One cycle is an update of the fake score, then one of the student.
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
from distillbench.parts.distribution_matching import fake_score_loss, matching_loss
from distillbench.parts.noise_levels import karras_level, lognormal_level, time_at
from distillbench.parts.simulation import pure_noise
from distillbench.parts.student import FewStepStudent


class DiffInstruct(Method):
    info = MethodInfo(
        id="diff_instruct",
        version=1,
        title="Diff-Instruct (integral KL divergence)",
        paper="arXiv 2305.18455",
        year=2023,
        family="score distillation",
        domain=("diffusion",),
        needs=(),
        data_access="conditions",
        steps=(1,),
        trains="one student",
        deviations=(
            "works on the teacher's own path at equal sigma / alpha; noise levels are the paper's (for deviation 0.5) times data_std",
            "sigma_init 2.5 is SiD's and, from memory, the paper's; the released command has 1.0",
            "the fake score's loss is in what the network itself predicts, which weighs levels as the teacher's training did; the code's "
            "weight is EDM's (sigma^2 + 0.25) / (0.5 sigma)^2 on x0",
            "the networks here have no dropout, so no mask is shared between the scores; the fake score's samples are not augmented",
            "gradients that are not finite stop the run with a message; the code replaces them by 0 and 1e5 and clips nothing",
            "a guided teacher is matched by an unguided fake score (DMD's convention) unless guide_fake is set (SwiftBrush's); the "
            "paper has no guidance",
            "rates: default 3e-4 and 1e-3 for small networks (paper 1e-5 for both); they fall to 0 by a cosine, as a budget ends "
            "(decay=constant: the paper's)",
            "the average's half-life is 700 updates, at most 5 % of those so far (paper: 500,000 images, the same 5 %)",
            "from memory, unverified: conditional CIFAR-10 FID, the experiments on GAN generators, which are left out",
            "not claims: fewer updates with sid or DMD's normaliser (claims are at equal budget), recovery of a missing mode "
            "by f_distill (a figure of the report)",
        ),
        claims=(
            Claim("one step of the student beats one step of the teacher", "diff_instruct", "teacher", "sliced-w2"),
            Claim("one step of the student beats one step of the teacher", "diff_instruct", "teacher", "in-mode", margin=0.1),
            Claim("a learnt fake score beats none (SDS)", "diff_instruct", "diff_instruct(fake=none)", "sliced-w2"),
            Claim("without a fake score (SDS) diversity collapses", "diff_instruct", "diff_instruct(fake=none)", "coverage"),
            Claim("DMD's normaliser beats w = 1", "diff_instruct(weighting=inv_l1)", "diff_instruct", "sliced-w2"),
        ),
        tunes=(
            Search("lr", 1e-4, 3e-3, log=True),
            Search("fake_lr", 3e-4, 1e-2, log=True),
            Search("sigma_init", 1.0, 10.0, log=True),
        ),
    )
    student_type = FewStepStudent

    @dataclass(frozen=True)
    class Config:
        sigma_init: float = knob(2.5, "noise level at which the student is called (code: 1.0)", low=1e-3, high=1000)
        law: str = knob("lognormal", "of the noise levels of the student's loss", choices=("lognormal", "karras"))
        fake_law: str = knob("lognormal", "of those of the fake score's loss; both: one half each", choices=("lognormal", "karras", "both"))
        level_mean: float = knob(-1.2, "of the logarithm of lognormal levels")
        level_std: float = knob(1.2, "of the logarithm of lognormal levels", low=1e-3)
        level_cut: float = knob(1.0, "karras levels go up to this share of their index (SiD: 0.8)", low=0.01, high=1)
        data_std: float = knob(1.0, "deviation of the track's data, with which all levels scale", low=1e-3)
        weighting: str = knob("none", "w: none is 1, inv_l1 is DMD's, alpha^2/sigma^2 the divergence's own",
                              choices=("none", "inv_l1", "alpha^2/sigma^2"))  # fmt: skip
        norm_floor: float = knob(1e-3, "least value of the normaliser of inv_l1", low=1e-9)
        fake: str = knob("trained", "the fake score: trained on the student's samples, or none (SDS)", choices=("trained", "none"))
        fake_per_student: int = knob(1, "updates of the fake score per update of the student", low=1, high=100)
        guidance: float | None = knob(None, "guidance scale of the teacher; None: the track's")
        guide_fake: bool = knob(False, "guide the fake score like the teacher in the student's loss")
        null_prob: float = knob(0.1, "chance that an example of a guided fake score's loss has no conditions", low=0, high=1)
        lr: float = knob(3e-4, "of the student (paper: 1e-5)", low=0)
        fake_lr: float | None = knob(1e-3, "of the fake score (paper: 1e-5); None: lr", low=0)
        betas: tuple[float, ...] = knob((0.0, 0.999), "of Adam", low=0, high=0.99999)
        clip: float | None = knob(None, "largest gradient norm of each network (paper: none)", low=1e-9)
        decay: str = knob("cosine", "of both rates, to 0 at the end", choices=("constant", "linear", "cosine"))
        batch_size: int | None = knob(None, "None: the track's", low=1)
        half_life: float = knob(700.0, "of the moving average that is scored, in student updates; 0: none", low=0)

        def __post_init__(self) -> None:
            if len(self.betas) != 2:
                raise ValueError(f"betas are two numbers, not {len(self.betas)}")

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        if tuple(context.steps) != (1,):
            raise ContractError(f"{self.info.id} trains a student of one step, not of {', '.join(map(str, context.steps))}")
        self.shape = context.shape
        self.scale = context.guidance if c.guidance is None else c.guidance
        self.fake_scale: float = self.scale if c.guide_fake else 1.0
        self.teacher: Denoiser = context.teacher
        self.grid = (time_at(self.teacher.path, c.sigma_init, data_std=c.data_std).item(),)
        self.student, self.average = self.teacher.copy(), self.teacher.copy()
        self.fake = None if c.fake == "none" else self.teacher.copy()

    def stages(self) -> list[Stage]:
        return [self.distillation("distillation", 1.0)]

    def distillation(self, name: str, share: float) -> Stage:
        """Updates of the fake score, then one of the student."""
        c = self.config
        moved = partial(OptimizerConfig, name="adam", betas=(c.betas[0], c.betas[1]), clip=c.clip, decay=c.decay, over="training")
        turns = [Turn("student", self.student_turn, {"student": self.student}, optimizer={"student": moved(c.lr)}, batch_size=c.batch_size)]
        if self.fake is not None:
            rate = moved(c.lr if c.fake_lr is None else c.fake_lr)
            fake = Turn("fake score", self.fake_turn, {"fake": self.fake}, repeat=c.fake_per_student, optimizer={"fake": rate},
                        batch_size=c.batch_size)  # fmt: skip
            turns.insert(0, fake)
        return Stage(name, share, turns, ema={"average": Ema("student", c.half_life, rampup=0.05)})

    def generate(self, batch: Batch) -> tuple[Tensor, Conditions]:
        """x = G(z, c), as at inference."""
        conditions = batch.conditions()
        z = batch.randn(batch.size, *self.shape)
        return self.student.x0(pure_noise(self.student, self.grid, z), self.grid[0], conditions), conditions

    def times(self, law: str, batch: Batch) -> Tensor:
        """Path times (n,) of noise levels drawn from a law."""
        c = self.config
        if law == "both":
            lognormal = batch.rand(batch.size) < 0.5
            return torch.where(lognormal, self.times("lognormal", batch), self.times("karras", batch))
        if law == "karras":
            level = karras_level(c.level_cut * batch.rand(batch.size))
        else:
            level = lognormal_level(batch.randn(batch.size), mean=c.level_mean, std=c.level_std)
        return time_at(self.teacher.path, level, data_std=c.data_std)

    def fake_turn(self, batch: Batch) -> dict[str, Tensor]:
        """L_fake. Guidance also asks the fake score for that of all samples together, so then some lose their conditions."""
        return {"fake score": self.denoising(batch, drop=self.config.null_prob if self.fake_scale != 1 else 0.0)}

    def denoising(self, batch: Batch, *, drop: float, guidance_scale: float = 1.0) -> Tensor:
        """The fake score's loss on samples that carry no graph, as the student is frozen; a share `drop` of them is without conditions."""
        assert self.fake is not None
        x, conditions = self.generate(batch)
        t, noise = self.times(self.config.fake_law, batch), batch.randn(*x.shape)
        if drop > 0:
            conditions = conditions.dropped(batch.rand(batch.size) < drop)
        return fake_score_loss(self.fake, x, t, noise, conditions, guidance_scale=guidance_scale)

    def student_turn(self, batch: Batch) -> dict[str, Tensor]:
        x, conditions = self.generate(batch)
        t = self.times(self.config.law, batch)
        return {"matching": self.student_loss(x, t, batch.randn(*x.shape), conditions)}

    def student_loss(self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions) -> Tensor:
        """L_G: its gradient at x is w (D_fake - D_teacher) / n, summed over elements; neither score gets one."""
        c = self.config
        loss = matching_loss(x, t, noise, conditions, self.teacher, self.fake, guidance_scale=self.scale,
                             fake_guidance_scale=self.fake_scale, weighting=c.weighting, floor=c.norm_floor)  # fmt: skip
        return x[0].numel() * loss

    def distilled(self) -> FewStepStudent:
        return FewStepStudent(self.average, {1: self.grid}, self.shape)
