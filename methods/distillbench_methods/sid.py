"""SiD, Score identity Distillation. Zhou et al. 2024 (ICML), arXiv 2404.04057; official code mingyuanzhou/SiD.

Extends diff_instruct: the same student, fake score and turns; what the student descends is another distance between the same two scores.
In the place of the KL divergence stands Fisher's, the mean square of the scores' gap. The student's own score is only known through the
fake score; to use that estimate on both sides of the square (L1) leaves a gradient that cannot move a displaced student. The identity
E <u(x_t), student's score> = E <u(x_t), score of x_t given x> lets the sample itself stand in on one side (L2). At a noised sample x_t,
with D the denoisers' means of x0 and alpha a number:

    L1 = |D_teacher - D_fake|^2      L2 = <D_teacher - D_fake, D_teacher - x>      (equal in expectation, their gradients are not)
    student   L = lsg E [ L2 - alpha L1 ] / omega      omega = sg mean |x - D_teacher|, one number a sample

Only omega and the weights are held: the gradient reaches x as such and through x_t through both scores. With alpha > 1 a student that is
wider than the data, in variance at a level by more than alpha / (alpha - 1), is pushed wider still (omega = 1; the paper's omega tightens
that bound). On Gaussians with alpha = 1 the gradient is diff_instruct's times 1 - dD_fake/dx_t for the mean, twice that for the width.

With text, SiD-LSG (Zhou et al. 2024, arXiv 2406.01561) guides: kappa1 is the fake score's scale in its own loss, kappa2 = kappa3 its scale
in the student's, kappa4 the teacher's; "long and short" takes all equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distillbench.api import Batch, Claim, Conditions, Context, MethodInfo, Search, knob
from distillbench.diffusion.base import Schedule, broadcast
from distillbench.diffusion.solvers import jump
from distillbench.parts.distribution_matching import mean_per_sample

from .diff_instruct import DiffInstruct


class SiD(DiffInstruct):
    info = MethodInfo(
        id="sid",
        version=1,
        title="SiD (score identity distillation, Fisher divergence)",
        paper="arXiv 2404.04057",
        year=2024,
        family="score distillation",
        domain=("diffusion",),
        needs=(),
        data_access="conditions",
        steps=(1,),
        trains="one student",
        deviations=(
            "works on the teacher's own path at equal sigma / alpha; noise levels are the paper's (for deviation 0.5) times data_std",
            "alpha is 1.0, the paper's for AFHQ and text and the safer one for small networks; CIFAR-10, ImageNet and FFHQ have 1.2",
            "half of the fake score's noise levels are drawn by the student's law (fake_law=lognormal: the paper's), which the lognormal "
            "hardly meets above 10: small networks do not get by there on the teacher's weights",
            "the fake score's loss is in what the network itself predicts, which weighs levels as the teacher's training did; the code's "
            "weight is EDM's (sigma^2 + 0.25) / (0.5 sigma)^2 on x0, with text that of eps, or snr / (snr + 1) on v",
            "the networks here have no dropout; no augmentation of the fake score's samples",
            "gradients and samples that are not finite stop the run with a message; the code drops such samples and replaces the gradients",
            "a guided track is matched long and short (SiD-LSG) at its scale, with the noise levels above (code: {20..979}), and "
            "kappa2 = kappa3 as in the code; a condition is dropped after its sample was made, in the code before",
            "rates: default 3e-4 and 1e-3 for small networks (paper 1e-5 for both); they fall to 0 by a cosine, as a budget ends "
            "(decay=constant: the paper's)",
            "the average's half-life is 700 updates, at most 5 % of those so far (paper: 500,000 images, the same 5 %)",
            "beta1 is 0 for both networks (paper: 0.9 for FFHQ's student)",
            "from memory, unverified: what the paper's ablation of alpha gave (0.5 to 1.2 work, 1.5 does not)",
            "the paper compares with Diff-Instruct at equal updates, the claim here is at equal compute: fewer updates",
            "not claims: the logarithm of the distance falls linearly in that of the images seen (a curve), FID of the paper's tables",
        ),
        claims=(
            Claim("one step of the student beats one step of the teacher", "sid", "teacher", "sliced-w2"),
            Claim("one step of the student beats one step of the teacher", "sid", "teacher", "in-mode", margin=0.1),
            Claim("alpha 1 beats alpha 0, the projected estimator alone", "sid", "sid(alpha=0.0)", "sliced-w2"),
            Claim("alpha 1 beats alpha -0.5", "sid", "sid(alpha=-0.5)", "sliced-w2"),
            Claim("alpha 1.5 is unstable or worse", "sid", "sid(alpha=1.5)", "sliced-w2"),
            Claim("the naive Fisher loss does not move a displaced student", "sid", "sid(estimator=naive)", "sliced-w2"),
            Claim("Fisher's divergence beats the integral KL of Diff-Instruct", "sid", "diff_instruct", "sliced-w2"),
        ),
        tunes=(
            Search("lr", 1e-4, 3e-3, log=True),
            Search("fake_lr", 3e-4, 1e-2, log=True),
            Search("sigma_init", 1.0, 10.0, log=True),
        ),
    )

    @dataclass(frozen=True)
    class Config(DiffInstruct.Config):
        alpha: float = knob(1.0, "weight of L1 against L2 (paper: 1.2 for pixels, 1.0 for AFHQ and text)", low=-10, high=10)
        estimator: str = knob("combined", "combined: L2 - alpha L1; naive: L1 alone", choices=("combined", "naive"))
        lsg: float = knob(100.0, "scale of the student's loss; under Adam it acts through eps and clip only", low=1e-9)
        law: str = knob("karras", "of the noise levels of the student's loss", choices=("lognormal", "karras"))
        fake_law: str = knob("both", "of those of the fake score's loss; both: one half each (paper: lognormal)",
                             choices=("lognormal", "karras", "both"))  # fmt: skip
        level_cut: float = knob(0.8, "karras levels go up to this share of their index (tmax / 1000)", low=0.01, high=1)
        weighting: str = knob("inv_l1", "1 / omega: inv_l1 is the paper's, none 1, alpha^2/sigma^2 one over sigma^2 / alpha^2",
                              choices=("inv_l1", "none", "alpha^2/sigma^2"))  # fmt: skip
        norm_floor: float = knob(1e-5, "least omega of inv_l1", low=1e-12)
        fake: str = knob("trained", "the fake score: without one there is no Fisher divergence", choices=("trained",))
        guide_fake: bool = knob(True, "long and short: kappa1 and kappa2 are kappa4 unless given; off: 1 unless given")
        kappa1: float | None = knob(None, "guidance scale of the fake score in its own loss; None: as guide_fake says")
        kappa2: float | None = knob(None, "guidance scale of the fake score in the student's loss (= kappa3); None: as guide_fake says")

    config: Config

    def build(self, context: Context) -> None:
        super().build(context)
        c = self.config
        by_default = self.fake_scale
        self.fake_scale = by_default if c.kappa2 is None else c.kappa2
        self.train_scale = by_default if c.kappa1 is None else c.kappa1

    def fake_turn(self, batch: Batch) -> dict[str, Tensor]:
        """L_psi: denoising of the student's samples; with kappa1 it is the guided prediction that denoises."""
        guided = (self.fake_scale, self.train_scale) != (1.0, 1.0)
        drop = self.config.null_prob if guided else 0.0
        return {"fake score": self.denoising(batch, drop=drop, guidance_scale=self.train_scale)}

    def student_loss(self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions) -> Tensor:
        """L_theta, summed over elements, averaged over samples; it may be negative."""
        c = self.config
        assert self.fake is not None
        x_t = jump(self.teacher.path, x, noise, t)
        real = self.teacher.x0(x_t, t, conditions, guidance_scale=self.scale)
        fake = self.fake.x0(x_t, t, conditions, guidance_scale=self.fake_scale)
        gap = real - fake
        other = gap if c.estimator == "naive" else real - x - c.alpha * gap
        weight = one_over_omega(x, real, self.teacher.path, t, c.weighting, c.norm_floor)
        return c.lsg * (weight * gap * other).flatten(1).sum(1).mean()


def one_over_omega(x: Tensor, real: Tensor, path: Schedule, t: Tensor, weighting: str, floor: float) -> Tensor | float:
    """The weight of each sample, () or (n, 1, ..., 1), through which no gradient passes. real: the teacher's mean of x0."""
    if weighting == "inv_l1":
        return 1 / mean_per_sample((x - real).abs()).clamp_min(floor).detach()
    return 1.0 if weighting == "none" else broadcast((path.alpha(t) / path.sigma(t)) ** 2, x)
