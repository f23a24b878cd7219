"""f-distill. Xu, Nie and Vahdat 2025, arXiv 2502.15681; reference implementation in NVlabs/FastGen, on its DMD2.

DMD2 with its gradient of the reverse KL divergence multiplied, sample by sample, by a weight that makes it the gradient of any
f-divergence D_f(p || q) = E_q[f(p/q)], p the data and q the student, both noised. x = G(x_in, t_k, c), x_t = alpha x + sigma eps:

    ratio       r = clamp(exp(mean_j l_j(x_t)))          l_j: heads on the frozen teacher's features, best at l = ln p/q
    1st norm.   r <- r / b_i                             b_i: average of r in the sample's bin of noise levels
    2nd norm.   h = f''(r) r^2,  h <- h / mean h         over the batch; r and h carry no gradient
    generator   g = h (fake(x_t) - teacher(x_t)) / mean |x - teacher(x_t)|
                L = 1/2 mean (x - sg(x - g))^2  +  lambda_gan mean_j softplus(-l_j(x_t))
    guidance    L = |fake(x_t) - sg x|^2  +  mean_j softplus(l_j(x_t)) + mean_j softplus(-l_j(real_t'))  +  R1

One pass of the teacher gives its mean, the ratio and the GAN's gradient. One generator update is followed by four of the guidance.
The divergences and their h are a table: parts/divergences.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distillbench.api import Batch, Claim, Conditions, Context, MethodInfo, OptimizerConfig, Search, Stage, knob
from distillbench.diffusion.base import broadcast
from distillbench.diffusion.denoiser import Denoiser, Prediction
from distillbench.diffusion.solvers import jump
from distillbench.parts import critics
from distillbench.parts.distribution_matching import fake_score_loss, matching_gradient, surrogate
from distillbench.parts.divergences import DIVERGENCES, RatioBins, density_ratio, matching_weights
from distillbench.parts.noise_levels import karras_level, time_at

from .dmd2 import DMD2

LARGE_BATCH = 256  # from here on ten bins are averaged well by one batch


class FDistill(DMD2):
    info = MethodInfo(
        id="f_distill",
        version=1,
        title="One-step Diffusion Models with f-Divergence Distribution Matching (f-distill)",
        paper="arXiv 2502.15681",
        year=2025,
        family="score distillation",
        domain=("diffusion",),
        needs=("taps", "real data"),
        data_access="real",
        steps=(1, 2, 4),
        trains="a student per step count",
        deviations=(
            "what dmd2 states of its batches, its normaliser's floor, its heads and its warm-up by regression holds here too",
            "the gradient and the noise levels follow FastGen's code, the divergences and the scores to reach the paper",
            "bins are even in the index of the noise level's law (FastGen: in t, where most samples fall into the first)",
            "the averages of the bins keep a history (rho 0.9) for batches below 256 (paper: 0 or 0.5, for batches of 512 and more)",
            "later steps start from the student's own states, as in dmd2 (FastGen: from noised real data, sim=forward)",
            "h is the exact f'' r^2 (FastGen drops constants, which the mean takes out); Pearson's divergence is added",
            "R1 perturbs the noised real example, not the clean one at a noisy time as FastGen does",
            "one head on the middle tap (paper: three for CIFAR-10; heads=3)",
            "the fake score of an x0 network is weighted as in dmd2 (FastGen: not)",
            "rates: default 1e-4 for small networks (paper 5e-7 to 1e-4); they fall to 0 by a cosine (paper: constant)",
            "the average has a half-life of at most a twentieth of the updates so far (paper: 0.9999 of each update)",
            "not claims: that h is small where the scores differ much, and that normalised ratios tame forward KL (both are tests)",
        ),
        claims=(
            Claim(
                "forward KL keeps more modes than reverse KL",
                "f_distill(divergence=kl)",
                "f_distill(divergence=rkl)",
                "coverage",
            ),
            Claim(
                "Jensen-Shannon keeps more modes than reverse KL",
                "f_distill(divergence=js)",
                "f_distill(divergence=rkl)",
                "coverage",
            ),
            Claim(
                "squared Hellinger keeps more modes than reverse KL",
                "f_distill(divergence=sh)",
                "f_distill(divergence=rkl)",
                "coverage",
            ),
            Claim(
                "forward KL keeps the modes' masses better than reverse KL",
                "f_distill(divergence=kl)",
                "f_distill(divergence=rkl)",
                "mode-tv",
            ),
            Claim("it beats the method it extends", "f_distill", "dmd2", "sliced-w2"),
            Claim("one step of the student beats one step of the teacher", "f_distill", "teacher", "in-mode", margin=0.1),
        ),
        tunes=(
            Search("lr", 2e-4, 4e-3, log=True),
            Search("lambda_gan", 1e-3, 1.0, log=True),
            Search("divergence", choices=("js", "kl", "sh")),
        ),
    )

    @dataclass(frozen=True)
    class Config(DMD2.Config):
        divergence: str = knob("js", "f; rkl is dmd2's own, without a ratio", choices=tuple(DIVERGENCES))
        ratio_clamp: tuple[float, ...] = knob((0.1, 20.0), "least and largest ratio", low=1e-4, high=1e4)
        bins: int = knob(10, "of noise levels in which ratios are divided by their average; 0: they are left as they are", low=0, high=1000)
        rho: float | None = knob(None, "what an update keeps of a bin's average; None: 0, or 0.9 for batches below 256", low=0, high=0.999)
        noise: str = knob(
            "shared", "the critic sees the noised samples of the two scores, or dmd2's separate ones", choices=("shared", "separate")
        )
        law: str = knob("uniform", "of noise levels: t uniform, or Karras' levels at a uniform index", choices=("uniform", "karras"))
        data_std: float = knob(1.0, "deviation of the track's data, with which Karras' levels scale", low=1e-3)
        heads: int = knob(1, "of the critic, at as many depths of the network", low=1, high=32)
        r1: float = knob(0.0, "gamma of the approximate R1 penalty on real examples (paper: 1 on CIFAR-10 and SD1.5)", low=0)
        r1_std: float = knob(0.1, "deviation of its perturbation", low=1e-6)
        head_lr: float | None = knob(None, "of the heads, which have an optimiser of their own; None: the fake score's", low=0)
        t_min: float = knob(0.001, "lowest noise level, as a time, or as an index of Karras' levels", low=1e-3, high=1)
        t_max: float = knob(0.999, "highest noise level, likewise", low=1e-3, high=1)
        fake_per_gen: int = knob(4, "guidance updates per generator update (paper's update frequency minus one)", low=1, high=100)
        lambda_gan: float = knob(1e-3, "weight of the generator's GAN loss (ImageNet-64 3e-3, SDXL 5e-3); 0: ratio only", low=0)
        lambda_dis: float = knob(1.0, "weight of the discriminator's loss beside the fake score's", low=0)
        gan_features: str = knob("teacher", "whose features the heads read: teacher (paper's code) or fake", choices=("fake", "teacher"))
        warmup: float = knob(0.0, "share of the training over which both rates rise from 0", low=0, high=1)
        half_life: float = knob(7000.0, "of the moving average that is scored, in generator updates; 0: none", low=0)

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.gan and self.divergence != "rkl":
                raise ValueError(f"divergence {self.divergence} reads its ratio off the discriminator; gan=false leaves rkl only")
            if len(self.ratio_clamp) != 2 or self.ratio_clamp[0] >= self.ratio_clamp[1]:
                raise ValueError(f"ratio_clamp is a lower and an upper bound, not {', '.join(map(str, self.ratio_clamp))}")
            if self.noise == "separate" and self.r1 > 0:
                raise ValueError("r1 is for noise=shared")

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        super().build(context)
        self.taps: tuple[str, ...] = ()
        self.heads = nn.ModuleList()
        if c.gan:
            names, drawn = self.teacher.network.tap_names, context.generator("head")
            self.taps = (self.tap,) if c.heads == 1 else critics.spread_taps(names, c.heads)
            self.heads = nn.ModuleList(critics.make_head(self.teacher.network.tap_shape(tap), drawn) for tap in self.taps)
            self.head = self.heads.to(context.device)
            self.guide = nn.ModuleList([self.fake, self.heads])
        small = (c.batch_size or context.batch_size) < LARGE_BATCH
        self.bins = RatioBins(c.bins, (0.9 if small else 0.0) if c.rho is None else c.rho).to(context.device)

    def _stage(self, name: str, share: float, *, gan: bool, rate: float = 1.0, reset: tuple[str, ...] = ()) -> Stage:
        """dmd2's, with an optimiser for the heads, and plain gradient descent that keeps the averages of the bins."""
        stage = super()._stage(name, share, gan=gan, rate=rate, reset=reset)
        if not gan:
            return stage
        generator, guidance = stage.turns
        of_fake = guidance.optimizer["guide"]
        of_heads = of_fake if self.config.head_lr is None else replace(of_fake, lr=rate * self.config.head_lr)
        guidance = replace(guidance, updates={"fake": self.fake, "heads": self.heads}, optimizer={"fake": of_fake, "heads": of_heads})
        if self.keeps_history:
            kept = OptimizerConfig(self.bins.rate, "sgd", betas=(0.0, 0.0))
            generator = replace(
                generator, updates={**generator.updates, "bins": self.bins}, optimizer={**generator.optimizer, "bins": kept}
            )
        return replace(stage, turns=[generator, guidance])

    @property
    def weighted(self) -> bool:
        return self.config.divergence != "rkl"

    @property
    def keeps_history(self) -> bool:
        return self.weighted and self.config.bins > 0 and self.bins.rho > 0

    def level(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Places (n,) in [0, 1] of the range of noise levels, and their times (n,)."""
        c = self.config
        u = c.t_min + (c.t_max - c.t_min) * batch.rand(batch.size)
        t = u if c.law == "uniform" else time_at(self.teacher.path, karras_level(u), data_std=c.data_std)
        return (u - c.t_min) / (c.t_max - c.t_min), t

    def generator_loss(self, gan: bool, batch: Batch) -> dict[str, Tensor]:
        """L_VSD + lambda_gan L_gen. Before the GAN sets in (gan_start) there is no ratio, and the divergence is reverse KL."""
        c = self.config
        shared = gan and c.noise == "shared" and c.lambda_gan > 0
        x, conditions = self.generate(batch)
        place, t = self.level(batch)
        x_t = jump(self.teacher.path, x, batch.randn(*x.shape), t)
        real, fake, logits = self.scores(x_t, t, conditions, critic=shared or (gan and self.weighted), graph=shared)
        gradient = matching_gradient(x.detach(), real.x0.detach(), fake.x0.detach(), self.teacher.path, t,
                                     weighting=c.weighting, floor=c.norm_floor)  # fmt: skip
        losses: dict[str, Tensor] = {}
        if gan and self.weighted:
            weights, kept = self.weights(logits, place)
            gradient = broadcast(weights, x) * gradient
            if self.keeps_history:
                losses["ratio history"] = kept
        losses["matching"] = c.lambda_dm * surrogate(x, gradient)
        if gan and c.lambda_gan > 0:
            losses["gan"] = c.lambda_gan * critics.generator_loss(logits if shared else self.logits(batch, x, conditions))
        return losses

    def scores(self, x_t: Tensor, t: Tensor, conditions: Conditions, *, critic: bool, graph: bool) -> tuple[Prediction, Prediction, Tensor]:
        """The teacher (guided) and the fake score at x_t, and the logits (n, heads), out of one pass of each network.

        critic: whether logits are wanted, else none (n, 0).  graph: whether they carry a gradient to x_t.
        """
        on_teacher = self.config.gan_features == "teacher"

        def asked(network: Denoiser, scale: float, shows: bool) -> Prediction:
            with torch.set_grad_enabled(shows and graph):
                return network.predict(x_t, t, conditions, guidance_scale=scale, taps=self.taps if shows else ())

        real, fake = asked(self.teacher, self.scale, critic and on_teacher), asked(self.fake, 1.0, critic and not on_teacher)
        if not critic:
            return real, fake, x_t.new_zeros(len(x_t), 0)
        with torch.set_grad_enabled(graph):
            return real, fake, critics.logits_by_depth(self.heads, self.taps, (real if on_teacher else fake).features)

    def weights(self, logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """h (n,) with mean 1 from logits (n, heads) at places (n,), and the loss that keeps the averages of the bins."""
        c = self.config
        ratio, kept = density_ratio(logits, *c.ratio_clamp), logits.new_zeros(())
        if c.bins > 0:
            ratio, kept = self.bins(ratio, place)
        return matching_weights(c.divergence, ratio), kept

    def guidance_loss(self, gan: bool, batch: Batch) -> dict[str, Tensor]:
        """L_fake + lambda_dis (L_dis + r1 R1), on samples that are held fixed; score and critic see the same noised ones."""
        c = self.config
        if c.noise == "separate":
            return super().guidance_loss(gan, batch)
        with torch.no_grad():
            x, conditions = self.generate(batch)
        t, noise = self.level(batch)[1], batch.randn(*x.shape)
        losses = {"fake score": fake_score_loss(self.fake, x, t, noise, conditions)}
        if gan:
            fake = self.judge(jump(self.teacher.path, x, noise, t), t, conditions)
            example, conditions = batch.data()
            t = self.level(batch)[1]
            real_t = jump(self.teacher.path, example, batch.randn(*example.shape), t)
            real = self.judge(real_t, t, conditions)
            losses["discriminator"] = c.lambda_dis * critics.discriminator_loss(real, fake)
            if c.r1 > 0:
                near = self.judge(real_t + c.r1_std * batch.randn(*real_t.shape), t, conditions)
                losses["r1"] = c.lambda_dis * c.r1 * (real - near).square().mean()
        return losses

    def judge(self, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The logits (n, heads) of x_t."""
        seen = self.fake if self.config.gan_features == "fake" else self.teacher
        return critics.logits_by_depth(self.heads, self.taps, seen.features(x_t, t, conditions, self.taps))
