"""SANA-Sprint. Chen et al. 2025 (ICCV 2025), arXiv 2503.09641; official code NVlabs/Sana.

A flow-matching teacher is read as a TrigFlow model by an exact change of its input and output; the student, a copy of it that is also
told the guidance scale, learns from continuous-time consistency and from a hinge GAN on noised samples. In units of x0 = d y,
y the data, d = sigma_data, with tan t = tau / (1 - tau):

    L_scm   mean of e^-v(t) (F - sg F - g)^2 / (d tan t) + v(t), g the normalised tangent of arXiv 2410.11081 (parts/trigflow)
    L_adv   -mean D(x0 noised to s),   x0 = f(x_t', t'), t' = pi/2 with probability p, else drawn as t           (LADD, arXiv 2403.12015)
    student L_scm + lambda L_adv                                       lambda = 0.5
    D       (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2      fakes: the student's x0, and real x0 with another's condition

D is one head for each of several blocks of the frozen teacher. A student and a discriminator update alternate, each on its own batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench.api import Batch, Claim, Conditions, Context, Ema, Method, MethodInfo, OptimizerConfig, Search, Stage, Turn, knob
from distillbench.diffusion.schedules import Trig
from distillbench.diffusion.solvers import jump
from distillbench.parts import critics
from distillbench.parts.student import FewStepStudent
from distillbench.parts.trigflow import HALF_PI, TrigFlow, check_grid, consistency_terms, lognormal_angles, sampling_angles

HEAD_SHARE = 4  # a head is this much narrower than the features it reads, unless its width is given


class SanaSprint(Method):
    info = MethodInfo(
        id="sana_sprint",
        version=2,
        title="SANA-Sprint (continuous-time consistency and latent adversarial distillation)",
        paper="arXiv 2503.09641",
        year=2025,
        family="consistency",
        domain=("diffusion",),
        needs=("real data", "taps", "guidance input", "log variance", "jvp"),
        data_access="real",
        steps=(1, 2, 4),
        trains="one student",
        deviations=(
            "the first stage, a short fine-tuning of the teacher to a time input in [0, 1] and normalised queries and keys, is left out:"
            " the teachers here take such a time from the start, and their attention is what they were trained with",
            "teachers of another kind than flow are read at equal signal-to-noise ratio, which is the paper's transform on flow",
            "the guidance scales are 8/9, 1 and 10/9 of the track's, as 4, 4.5 and 5 are of 4.5; where that is 1 the teacher is guided by"
            " scales around 1, so that the input is exercised",
            "the network embeds the scale as its guidance input does (a SANA transformer after times 0.1), zero at first",
            "pairs of a real sample and another's condition are left out where the two conditions are equal, as labels often are",
            "inside, a head is a quarter as wide as its features (paper: as wide); on vectors it has no norm and a kernel of 1",
            "power iteration advances once a cycle instead of at each forward pass",
            "AdamW at rates for small networks, falling linearly over the second half, clipped at 1 (paper: CAME, 2e-6, 0.1), float32",
            "scored is a moving average of at most 5 % of the updates (paper: none)",
            "the warm-up of r is a fifth of the training: 4,000 of 20,000 counted steps, student's and discriminator's",
            "p_mean is the paper's 0.0; the released configuration has 0.2",
            "a gradient that is not finite stops the run (released code: skips the update); the R1 penalty, off there, is left out",
            "the log-variance head moves nothing but itself (released code: the time embedding too), as in scm",
            "the published results were not reproduced",
            "not claims: that the transform is lossless and that a time input of 1000 tau spoils the tangent (tested as analytic facts, in"
            " tests/parts/test_trigflow.py), that embedding the scale helps (these tracks score an unguided teacher)",
        ),
        claims=(
            Claim("both losses beat consistency alone", "sana_sprint", "sana_sprint(losses=scm)", "sliced-w2"),
            Claim("consistency alone beats the GAN alone", "sana_sprint(losses=scm)", "sana_sprint(losses=ladd)", "sliced-w2"),
            Claim("pure noise in half of the GAN's inputs sharpens one step", "sana_sprint", "sana_sprint(max_time_prob=0)", "in-mode"),
            Claim("pure noise in half of the GAN's inputs helps one step", "sana_sprint", "sana_sprint(max_time_prob=0)", "sliced-w2"),
            Claim("a GAN weight of 0.5 beats 0.1 in two steps", "sana_sprint", "sana_sprint(adv_lambda=0.1)", "sliced-w2", steps=2),
            Claim("a GAN weight of 0.5 beats 1 in two steps", "sana_sprint", "sana_sprint(adv_lambda=1)", "sliced-w2", steps=2),
            Claim("one step beats one step of the teacher", "sana_sprint", "teacher", "in-mode", steps=1),
            Claim("two steps beat two steps of the teacher", "sana_sprint", "teacher", "in-mode", steps=2),
            Claim("four steps beat four steps of the teacher", "sana_sprint", "teacher", "in-mode", steps=4),
        ),
        tunes=(
            Search("lr", 3e-5, 2e-3, log=True),
            Search("p_mean", -2.0, 0.2),
            Search("adv_lambda", 0.03, 1.0, log=True),
        ),
    )
    student_type = FewStepStudent

    @dataclass(frozen=True)
    class Config:
        losses: str = knob("both", "consistency and the GAN, or one of them", choices=("both", "scm", "ladd"))
        adv_lambda: float = knob(0.5, "weight of the GAN in the student's loss", low=0)
        max_time_prob: float = knob(0.5, "p, share of the GAN's inputs that are pure noise", low=0, high=1)
        cfg_embed: bool = knob(True, "tell the student the guidance scale; false: it learns the track's")
        scales: tuple[float, ...] = knob((8 / 9, 1.0, 10 / 9), "scales that it is told, as multiples of the one it is scored at", low=0)
        guidance: float | None = knob(None, "scale of the teacher, at which the student is scored; None: the track's (paper: 4.5)", low=0)
        sigma_data: float = knob(0.5, "d, the unit of x_t, of the tangent and of p_mean", low=1e-3, high=1e3)
        p_mean: float = knob(0.0, "mean of log(d tan t) (released: 0.2)", low=-10, high=10)
        p_std: float = knob(1.6, "its deviation", low=1e-3, high=10)
        d_mean: float = knob(-0.6, "mean of log(d tan s), s the noise of what the discriminator sees", low=-10, high=10)
        d_std: float = knob(1.0, "its deviation", low=1e-3, high=10)
        c: float = knob(0.1, "in g / (|g| + c)", low=1e-6)
        warmup_r: float = knob(0.2, "share of the training over which r rises from 0 to 1; 0: none", low=0, high=1)
        adaptive_weight: bool = knob(True, "learn the log-variance, beside the weight 1 / (d tan t); false: neither")
        misaligned: bool = knob(True, "real samples with another's condition are fakes too")
        heads: int = knob(4, "at most so many blocks of the teacher are read, from early to the last", low=1, high=64)
        taps: tuple[str, ...] = knob((), "which blocks; empty: spread over the network")
        head_width: int | None = knob(None, "inside a head; None: a quarter of its features (paper: all)", low=1, high=65536)
        jvp: str = knob("exact", "forward mode, or central differences along the flow", choices=("exact", "fd"))
        t_mid: float = knob(1.3, "the angle of the second of two steps (ablations: 1.0)", low=0.01, high=1.57)
        grid: tuple[float, ...] = knob((), "angles of the student of as many steps, falling from pi/2; empty: the usual ones")
        lr: float = knob(1e-4, "of the student", low=0)
        d_lr: float | None = knob(None, "of the heads; None: lr", low=0)
        betas: tuple[float, ...] = knob((0.9, 0.99), "of the student's AdamW", low=0, high=0.99999)
        d_betas: tuple[float, ...] = knob((0.5, 0.99), "of the heads' AdamW", low=0, high=0.99999)
        weight_decay: float = knob(0.0, "of both", low=0)
        clip: float | None = knob(1.0, "largest norm of a gradient", low=1e-9)
        decay: str = knob("linear", "of both rates, to 0 at the end (paper: constant)", choices=("constant", "linear", "cosine"))
        decay_from: float = knob(0.5, "share of the training after which the decay begins", low=0, high=1)
        batch_size: int | None = knob(None, "None: the track's", low=1)
        half_life: float = knob(693.0, "of the average that is scored, in the student's updates; 0: none (paper)", low=0)
        rampup: float = knob(0.05, "the half-life is at most this share of the updates so far", low=1e-4, high=10)

        def __post_init__(self) -> None:
            if len(self.betas) != 2 or len(self.d_betas) != 2:
                raise ValueError("betas and d_betas are two numbers each")
            if not self.scales:
                raise ValueError("scales are empty; give at least one, such as 1")
            check_grid(self.grid)

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        self.flow = TrigFlow(c.sigma_data, unit=c.sigma_data)
        self.shape = context.shape
        self.scale = context.guidance if c.guidance is None else c.guidance
        self.grids = {n: self.flow.path_times(sampling_angles(n, c.t_mid, c.grid)) for n in context.steps}
        self.teacher = context.teacher.on(self.flow.path)
        network = context.teacher.network
        self.taps: tuple[str, ...] = ()
        if c.losses != "scm":
            self.taps = c.taps or critics.spread_taps(network.tap_names, c.heads)
        shapes = [network.tap_shape(tap) for tap in self.taps]
        generator = context.generator("heads")
        self.heads = nn.ModuleList(
            critics.TokenHead(shape, c.head_width or max(1, shape[0] // HEAD_SHARE), generator).to(context.device) for shape in shapes
        )
        if c.cfg_embed:
            network = network.with_guidance_input()
        if c.adaptive_weight and c.losses != "ladd":
            network = network.with_log_variance()
        self.student = self.teacher.with_network(network).copy()
        self.average = self.student.copy()

    def stages(self) -> list[Stage]:
        c = self.config
        moved = partial(OptimizerConfig, weight_decay=c.weight_decay, clip=c.clip, decay=c.decay, decay_from=c.decay_from)
        student = Turn("student", self.student_loss, {"student": self.student}, batch_size=c.batch_size,
                       optimizer={"student": moved(c.lr, betas=(c.betas[0], c.betas[1]))})  # fmt: skip
        turns = [student]
        if c.losses != "scm":
            rate = c.lr if c.d_lr is None else c.d_lr
            turns.append(Turn("discriminator", self.discriminator_loss, {"heads": self.heads}, batch_size=c.batch_size,
                              optimizer={"heads": moved(rate, betas=(c.d_betas[0], c.d_betas[1]))}))  # fmt: skip
            turns.append(Turn("spectral norm", self.refresh))
        return [Stage("distillation", 1.0, turns, ema={"average": Ema("student", c.half_life, c.rampup)})]

    def student_loss(self, batch: Batch) -> dict[str, Tensor]:
        """L_scm + lambda L_adv; the teacher and the heads are frozen, the GAN's gradient passes through them into x0."""
        c = self.config
        x, conditions = batch.data()
        losses: dict[str, Tensor] = {}
        if c.losses != "ladd":
            t = self.angles(batch)
            x_t = self.flow.noised(x, batch.randn(*x.shape), t)
            told, scale = self.guide(batch)
            r = min(1.0, batch.progress / c.warmup_r) if c.warmup_r > 0 else 1.0
            losses |= consistency_terms(
                self.flow, self.student, self.teacher, x_t, t, conditions, r=r, c=c.c, weighted=c.adaptive_weight,
                prior=c.adaptive_weight, jvp=c.jvp, guidance_scale=scale, guidance=told,
            )  # fmt: skip
        if c.losses != "scm":
            seen = self.logits(batch, self.generate(batch, x, conditions), conditions)
            losses["adversarial"] = c.adv_lambda * critics.hinge_generator_loss(seen)
        return losses

    def discriminator_loss(self, batch: Batch) -> Tensor:
        """The hinge loss; each of the real, the generated and the misaligned has its own noise and its own s."""
        x, conditions = batch.data()
        with torch.no_grad():
            made = self.generate(batch, x, conditions)
        real, fake = self.logits(batch, x, conditions), self.logits(batch, made, conditions)
        if not self.config.misaligned:
            return critics.hinge_discriminator_loss(real, fake)
        wrong = self.logits(batch, x.roll(1, 0), conditions)
        counts = torch.cat([torch.ones(batch.size), differs(conditions, 1).cpu()])
        return critics.hinge_discriminator_loss(real, torch.cat([fake, wrong]), counts)

    def refresh(self, batch: Batch) -> None:
        """The heads' singular vectors follow the weights."""
        critics.refresh_spectral(self.heads)

    def angles(self, batch: Batch) -> Tensor:
        """t, float64 (n,)."""
        return lognormal_angles(batch.randn(batch.size), self.config.p_mean, self.config.p_std, self.config.sigma_data)

    def guide(self, batch: Batch) -> tuple[Tensor | None, float | Tensor]:
        """What the student is told, and the scale at which the teacher is guided."""
        if not self.config.cfg_embed:
            return None, self.scale
        scales = self.scale * torch.tensor(self.config.scales, dtype=torch.float64)
        w = scales[batch.choice(len(scales), batch.size).cpu()]
        return w, w

    def generate(self, batch: Batch, x: Tensor, conditions: Conditions) -> Tensor:
        """The student's x0 (n, *shape), in the data's unit, from real data noised to t': pure noise with probability p."""
        pure = batch.rand(batch.size) < self.config.max_time_prob
        t = torch.where(pure, HALF_PI, self.angles(batch))
        x_t = self.flow.noised(x, batch.randn(*x.shape), t)
        return self.flow.clean(self.student, x_t, t, conditions, guidance=self.guide(batch)[0])

    def logits(self, batch: Batch, x: Tensor, conditions: Conditions) -> Tensor:
        """The heads' opinion (n, tokens) of x, noised to a random s."""
        c = self.config
        s = lognormal_angles(batch.randn(batch.size), c.d_mean, c.d_std, c.sigma_data) / HALF_PI
        x_s = jump(self.flow.path, x, batch.randn(*x.shape), s)
        return critics.token_logits(self.teacher, self.heads, self.taps, x_s, s, conditions)

    def distilled(self) -> FewStepStudent:
        return FewStepStudent(self.average.on(Trig()), self.grids, self.shape,
                              guidance_input=self.scale if self.config.cfg_embed else None)  # fmt: skip


def differs(conditions: Conditions, shift: int) -> Tensor:
    """For each of n conditions, whether it is another than that of the row `shift` before it: (n,) of 0 and 1."""
    same = torch.ones(len(conditions), dtype=torch.bool)
    for value in conditions.fields.values():
        if isinstance(value, Tensor):
            same = same.to(value.device) & (value == value.roll(shift, 0)).reshape(len(value), -1).all(1)
        else:
            same = same & torch.tensor([value[i] == value[i - shift] for i in range(len(value))], device=same.device)
    return 1 - same.float()
