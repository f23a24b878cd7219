"""Continuous-time consistency distillation, sCM (sCD). Lu & Song 2024 (ICLR 2025), arXiv 2410.11081; no official code was found.

The student f, a copy of the teacher, is made constant along the trajectories of the teacher's probability flow without a solver: the
derivative of f along them is one Jacobian-vector product. With x_t = cos t x0 + sin t z, d = sigma_data, F the network's velocity:

    dx/dt = d F_teacher(x_t / d, t), guided             J = cos t sin t dF/dt along it, of the student's F
    g     = -cos^2 t (d F - dx/dt) - r (cos t sin t x_t + d J),    r from 0 to 1 at the start               (algorithm 1)
    g    <- g / (|g| + c)                                                                                   (section 4)
    L     = e^w(t) / D |F - sg F - g|^2 - w(t),    w = -log variance, learnt

Times are t = atan(e^tau / d), tau normal. A sample takes one call of f at pi/2, or several with fresh noise between them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distillbench.api import Batch, Claim, Context, ContractError, Ema, Method, MethodInfo, OptimizerConfig, Search, Stage, Turn, knob
from distillbench.diffusion.schedules import Trig
from distillbench.errors import UsageError
from distillbench.parts.student import FewStepStudent
from distillbench.parts.trigflow import TrigFlow, check_grid, consistency_terms, lognormal_angles, sampling_angles


class ContinuousConsistency(Method):
    info = MethodInfo(
        id="scm",
        version=2,
        title="Continuous-time consistency distillation (sCM, sCD)",
        paper="arXiv 2410.11081",
        year=2024,
        family="consistency",
        domain=("diffusion",),
        needs=("real data", "log variance", "jvp"),
        data_access="real",
        steps=(1, 2, 4),
        trains="one student",
        deviations=(
            "times default to a mean log tan t of -0.3 with sigma_data 1, for data of deviation near 1: the paper's -1.0 at 0.5",
            "the teacher is taken as it is: no TrigFlow teacher is trained, F is read from it at equal signal-to-noise ratio",
            "the networks keep their time features and normalisation; the paper's slower embedding and pixel-normalised AdaGN are left out",
            "the log-variance head is linear on the time's sinusoids (diffusers' networks: on the time embedding) and moves nothing else;"
            " where it moved the time embedding too, as one on the network's own does, training on digits drifted away",
            "the warm-up of r is a tenth of the training (paper: 10,000 updates)",
            "samples start from pure noise at pi/2 (paper: atan(80 / sigma_data), where tan t is 80 to 160)",
            "the rate falls linearly over the second half (paper: constant, or as 1 / sqrt(t) late); times near the data are searched,"
            " since training drifts away where few are drawn there",
            "the half-life of the average that is scored is at most 5 % of the updates so far",
            "an embedded guidance scale enters as the network's own guidance input, not as the paper's positional embedding",
            "the weight 1 / (sigma_data tan t) is in g once; FastGen and SANA multiply by it again, which a learnt weight undoes",
            "the length of g is over all dimensions, as in the paper; FastGen divides it by sqrt(dimension) first",
            "the published results and the inertness of the learnt weight are known from the papers' texts, not from runs of their code",
            "not claims: that two steps beat one and come near the teacher's many (claims hold at one step count), that the warm-up"
            " removes spikes without a change of quality, equal updates as cd (here: equal compute), paired error",
        ),
        claims=(
            Claim("a normalised tangent beats the raw one", "scm", "scm(tangent=none)", "sliced-w2"),
            Claim("a clipped tangent beats the raw one", "scm(tangent=clip)", "scm(tangent=none)", "sliced-w2"),
            Claim("the learnt weighting helps in one step", "scm", "scm(adaptive_weight=false)", "sliced-w2"),
            Claim("the learnt weighting helps in two steps", "scm", "scm(adaptive_weight=false)", "sliced-w2", steps=2),
            Claim("no discretisation: one step is nearer to the teacher than cd's", "scm", "cd", "fidelity-w2"),
            Claim("modes keep their mass better than under distribution matching", "scm", "dmd2", "mode-tv"),
            Claim("one step beats one step of the teacher", "scm", "teacher", "in-mode", steps=1),
            Claim("two steps beat two steps of the teacher", "scm", "teacher", "in-mode", steps=2),
            Claim("four steps beat four steps of the teacher", "scm", "teacher", "in-mode", steps=4),
        ),
        tunes=(
            Search("lr", 3e-5, 2e-3, log=True),
            Search("p_mean", -1.6, 0.0),
            Search("c", 0.01, 1.0, log=True),
        ),
    )
    student_type = FewStepStudent

    @dataclass(frozen=True)
    class Config:
        sigma_data: float = knob(1.0, "d, deviation of the data (paper: 0.5 by scaling)", low=1e-3, high=1e3)
        p_mean: float = knob(-0.3, "mean of tau = log(d tan t), small is towards data (paper: -1.0 to -0.8 at d = 0.5)", low=-10, high=10)
        p_std: float = knob(1.4, "deviation of tau (paper: 1.4 to 1.6)", low=1e-3, high=10)
        tangent: str = knob("norm", "what is done to g", choices=("norm", "clip", "none"))
        c: float = knob(0.1, "in g / (|g| + c), read where tangent is norm", low=1e-6)
        warmup_r: float = knob(0.1, "H, share of the training over which r rises from 0 to 1; 0: none", low=0, high=1)
        adaptive_weight: bool = knob(True, "learn the log-variance of the loss at each t")
        guidance: str = knob("fixed", "the student learns one scale, or takes it as an input", choices=("fixed", "embedded"))
        scale: float | None = knob(None, "guidance scale of the teacher, at which the student is scored; None: the track's", low=0)
        scale_range: tuple[float, ...] = knob((1.0, 2.0), "embedded: scales are drawn between these two", low=0)
        jvp: str = knob("exact", "forward mode, or central differences along the flow", choices=("exact", "fd"))
        t_mid: float = knob(1.1, "the angle of the second of two steps", low=0.01, high=1.57)
        grid: tuple[float, ...] = knob((), "angles of the student of as many steps, falling from pi/2; empty: the usual ones")
        lr: float = knob(1e-4, "learning rate (paper: 6.5e-5 to 1e-4)", low=0)
        optimizer: str = knob("adam", "which optimiser (paper, CIFAR-10: radam)", choices=("adam", "radam", "adamw"))
        betas: tuple[float, ...] = knob((0.9, 0.99), "of the optimiser", low=0, high=0.99999)
        eps: float = knob(1e-8, "of the optimiser (paper, EDM2: 1e-11)", low=1e-16)
        weight_decay: float = knob(0.0, "of the optimiser", low=0)
        clip: float | None = knob(1.0, "largest norm of the gradient", low=1e-9)
        decay: str = knob("linear", "of the rate, to 0 at the end", choices=("constant", "linear", "cosine"))
        decay_from: float = knob(0.5, "share of the training after which the decay begins", low=0, high=1)
        batch_size: int | None = knob(None, "None: the track's", low=1)
        half_life: float = knob(693.0, "of the average that is scored, in updates (693: a decay of 0.999); 0: none", low=0)
        rampup: float = knob(0.05, "the half-life is at most this share of the updates so far", low=1e-4, high=10)

        def __post_init__(self) -> None:
            if len(self.betas) != 2:
                raise ValueError(f"betas are two numbers, not {len(self.betas)}")
            if len(self.scale_range) != 2 or self.scale_range[0] >= self.scale_range[1]:
                raise ValueError(f"scale_range is two rising numbers, not {self.scale_range}")
            check_grid(self.grid)

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        self.flow = TrigFlow(c.sigma_data)
        self.shape = context.shape
        self.scale = context.guidance if c.scale is None else c.scale
        self.grids = {n: self.flow.path_times(sampling_angles(n, c.t_mid, c.grid)) for n in context.steps}
        self.teacher = context.teacher.on(self.flow.path)
        network = context.teacher.network
        if c.guidance == "embedded":
            if "guidance input" not in network.capabilities:
                raise ContractError("scm with guidance=embedded needs a network that takes the guidance scale; this teacher's does not")
            if not c.scale_range[0] <= self.scale <= c.scale_range[1]:
                raise UsageError(f"scm: the student is scored at scale {self.scale:g}, outside scale_range; widen it or set scale")
            network = network.with_guidance_input()
        if c.adaptive_weight:
            network = network.with_log_variance()
        self.student = self.teacher.with_network(network).copy()
        self.average = self.student.copy()

    def stages(self) -> list[Stage]:
        c = self.config
        optimizer = OptimizerConfig(c.lr, c.optimizer, (c.betas[0], c.betas[1]), eps=c.eps, weight_decay=c.weight_decay, clip=c.clip,
                                    decay=c.decay, decay_from=c.decay_from)  # fmt: skip
        turn = Turn("consistency", self.loss, {"student": self.student}, optimizer={"student": optimizer}, batch_size=c.batch_size)
        return [Stage("distillation", 1.0, [turn], ema={"average": Ema("student", c.half_life, c.rampup)})]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """L of one batch, its two terms apart."""
        c = self.config
        x, conditions = batch.data()
        t = lognormal_angles(batch.randn(batch.size), c.p_mean, c.p_std, c.sigma_data)
        x_t = self.flow.noised(x, batch.randn(*x.shape), t)
        scale: float | Tensor = self.scale
        shown = None
        if c.guidance == "embedded":
            low, high = c.scale_range
            shown = scale = low + (high - low) * batch.rand(batch.size)
        r = min(1.0, batch.progress / c.warmup_r) if c.warmup_r > 0 else 1.0
        return consistency_terms(self.flow, self.student, self.teacher, x_t, t, conditions, r=r, kind=c.tangent, c=c.c,
                                 weighted=c.adaptive_weight, jvp=c.jvp, guidance_scale=scale, guidance=shown)  # fmt: skip

    def distilled(self) -> FewStepStudent:
        return FewStepStudent(self.average.on(Trig()), self.grids, self.shape,
                              guidance_input=self.scale if self.config.guidance == "embedded" else None)  # fmt: skip
