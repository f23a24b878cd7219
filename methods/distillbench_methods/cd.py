"""Consistency distillation. Song et al. 2023 (ICML), arXiv 2303.01469, and, with param=vp and w_range, latent consistency models,
Luo et al. 2023, arXiv 2310.04378; official code openai/consistency_models and luosiallen/latent-consistency-model.

The student f, a copy of the teacher, learns to map every point of a trajectory of the teacher's probability flow to its clean end. On a
falling grid t_0 > ... > t_N = t_min, with x_t = alpha x + sigma eps from a real x, t = t_n, s = t_{n + skip}, n uniform:

    x_s     one solver step of the frozen teacher from x_t, guided: cond + w (cond - uncond)              (Luo, eq. 14)
    L       E d( f(x_t, t, w), sg f_target(x_s, s, w) ), d the pseudo-Huber distance                      (Song, eq. 7)
    target  mu target + (1 - mu) f after each update; mu = 0: f itself                                    (Song, eq. 8)

f(x, t_min) = x, so at the clean end of the grid the target is x_s itself. A sample takes one call of f, or several with fresh noise
between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.api import Batch, Claim, Context, ContractError, Ema, Method, MethodInfo, OptimizerConfig, Search, Stage, Turn, knob
from distillbench.diffusion.solvers import jump
from distillbench.errors import UsageError
from distillbench.parts.consistency import (
    ConsistencyFunction,
    ConsistencyStudent,
    consistency_grid,
    consistency_path,
    distance,
    half_life,
    inference_times,
    ode_step,
)


class ConsistencyDistillation(Method):
    info = MethodInfo(
        id="cd",
        version=1,
        title="Consistency distillation (CD, latent consistency models)",
        paper="arXiv 2303.01469, arXiv 2310.04378",
        year=2023,
        family="consistency",
        domain=("diffusion",),
        needs=("real data",),
        data_access="real",
        steps=(1, 2, 4, 8),
        trains="one student",
        deviations=(
            "the default path is trig with f = x0; the papers' are edm (Song) and vp (Luo), to be had by param",
            "the network keeps its own input scaling and time input; edm's scalings act on the raw output that its x0 implies",
            "vp without a table of the teacher's own: DDPM's 1000 levels; a sample starts from sigma noise instead of unit noise",
            "edm on a network of another noise schedule is the x0 at equal signal-to-noise ratio",
            "LPIPS, the best distance of Song et al. [memory], is left out: no perceptual network on vectors; pseudo-Huber by default",
            "the guidance input is the network's own (64 features), the papers' has 256 or 512",
            "inference times follow the rule of latent consistency models on every grid; the greedy search of Song et al. is left out",
            "rates: default 3e-4 for small networks (papers 8e-6 to 4e-4 [memory] with RAdam [memory], 1e-6 for Stable Diffusion)",
            "the half-life of the average that is scored is at most 5 % of the updates so far",
            "the constant 0.00054 sqrt(dimension) of huber_sample and mu = 0 of CIFAR-10 are [memory]",
            "not claims: that quality rises from 1 to 2 to 4 steps (claims hold at one step count), that scm beats cd (needs scm)",
        ),
        claims=(
            Claim("one step beats one DDIM step of the teacher", "cd", "teacher", "sliced-w2", steps=1),
            Claim("two steps beat two DDIM steps of the teacher", "cd", "teacher", "sliced-w2", steps=2),
            Claim("four steps beat four DDIM steps of the teacher", "cd", "teacher", "sliced-w2", steps=4),
            Claim("one step beats one DDIM step of the teacher", "cd", "teacher", "in-mode", steps=1),
            Claim("two steps beat two DDIM steps of the teacher", "cd", "teacher", "in-mode", steps=2),
            Claim("four steps beat four DDIM steps of the teacher", "cd", "teacher", "in-mode", steps=4),
            Claim(
                "on a fine grid, long teacher steps converge sooner than short ones",
                "cd(points=1000,skip=20)",
                "cd(points=1000,skip=1)",
                "sliced-w2",
            ),
            Claim("a very coarse grid is biased", "cd", "cd(points=8)", "sliced-w2"),
        ),
        tunes=(
            Search("lr", 2e-4, 1e-2, log=True),
            Search("points", 8, 64, log=True),
            Search("spacing", choices=("uniform", "log_snr", "karras")),
        ),
    )
    student_type = ConsistencyStudent

    @dataclass(frozen=True)
    class Config:
        param: str = knob("trig", "the path and the boundary scalings", choices=("trig", "flow", "vp", "edm"))
        points: int = knob(50, "N, noise levels of the grid (Song: 18 for CIFAR-10, 40 for ImageNet-64)", low=2, high=4096)
        skip: int = knob(1, "how many grid points a teacher step goes down", low=1, high=4096)
        spacing: str = knob("log_snr", "of the grid on trig, flow and edm (Song: karras)", choices=("uniform", "log_snr", "karras"))
        solver: str = knob("ddim", "of the teacher's step (Song: heun, twice the teacher's cost)", choices=("ddim", "heun"))
        metric: str = knob("huber", "by element, by sample, or mean square", choices=("huber", "huber_sample", "l2"))
        c: float | None = knob(None, "of the pseudo-Huber distance; None: 0.001, by sample 0.00054 sqrt(dimension)", low=1e-12)
        weighting: str = knob("uniform", "of the loss; interval: 1 / (t - s), as FastGen has it", choices=("uniform", "interval"))
        target_ema: float = knob(
            0.95, "mu, what the target keeps of itself at each update; 0: the student, without a copy", low=0, high=0.999
        )
        w: float | None = knob(None, "guidance, w = scale - 1; None: the track's scale", low=0)
        w_range: tuple[float, ...] = knob((), "draw w between these two and give it to the student (Luo: 5,15); empty: fixed", low=0)
        sigma_data: float = knob(0.5, "deviation of the data in the edm scalings", low=1e-3)
        lr: float = knob(3e-4, "learning rate", low=0)
        optimizer: str = knob("adamw", "which optimiser (Song: radam)", choices=("adamw", "adam", "radam"))
        betas: tuple[float, ...] = knob((0.9, 0.999), "of the optimiser", low=0, high=0.99999)
        weight_decay: float = knob(0.0, "of the optimiser", low=0)
        clip: float | None = knob(1.0, "largest norm of the gradient", low=1e-9)
        warmup: float = knob(0.0, "share of the training over which the rate rises from 0", low=0, high=1)
        decay: str = knob("constant", "of the rate, to 0 at the end", choices=("constant", "linear", "cosine"))
        decay_from: float = knob(0.5, "share of the training after which the decay begins", low=0, high=1)
        batch_size: int | None = knob(None, "None: the track's", low=1)
        half_life: float = knob(693.0, "of the average that is scored, in updates (693: a decay of 0.999); 0: none", low=0)
        rampup: float = knob(0.05, "the half-life is at most this share of the updates so far", low=1e-4, high=10)

        def __post_init__(self) -> None:
            if len(self.betas) != 2:
                raise ValueError(f"betas are two numbers, not {len(self.betas)}")
            if self.w_range and (len(self.w_range) != 2 or self.w_range[0] >= self.w_range[1]):
                raise ValueError(f"w_range is two rising numbers, or empty, not {self.w_range}")
            if self.w_range and self.w is not None and not self.w_range[0] <= self.w <= self.w_range[1]:
                raise ValueError(f"w = {self.w}, at which the student is scored, lies outside w_range {self.w_range}")
            if self.solver == "heun" and self.param == "vp":
                raise ValueError("solver=heun needs a smooth path: param trig, flow or edm, not vp")
            if self.skip >= self.points:
                raise ValueError(f"skip {self.skip} leaps over the whole grid of {self.points} points")

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        path = consistency_path(c.param, context.teacher.schedule)
        self.times = consistency_grid(path, c.points, c.spacing).to(context.device)
        self.grids = {n: inference_times(self.times, n) for n in context.steps}
        self.shape = context.shape
        self.w = context.guidance - 1 if c.w is None else c.w
        self.teacher = context.teacher.on(path)
        network = context.teacher.network
        if c.w_range:
            if "guidance input" not in network.capabilities:
                raise ContractError("cd with w_range needs a network that takes the guidance scale as an input; this teacher's does not")
            if not c.w_range[0] <= self.w <= c.w_range[1]:
                raise UsageError(f"cd: the track's guidance is w = {self.w:g}, outside w_range; widen it or set w to what is to be scored")
            network = network.with_guidance_input()
        self.student = ConsistencyFunction(self.teacher.with_network(network).copy(), c.sigma_data)
        self.average = self.student.copy()
        self.target = self.student.copy() if c.target_ema else self.student

    def stages(self) -> list[Stage]:
        c = self.config
        optimizer = OptimizerConfig(c.lr, c.optimizer, (c.betas[0], c.betas[1]), weight_decay=c.weight_decay, clip=c.clip,
                                    warmup=c.warmup, decay=c.decay, decay_from=c.decay_from)  # fmt: skip
        turn = Turn("consistency", self.loss, {"student": self.student}, optimizer={"student": optimizer}, batch_size=c.batch_size)
        averages = {"average": Ema("student", c.half_life, c.rampup)}
        if c.target_ema:
            averages["target"] = Ema("student", half_life(c.target_ema))
        return [Stage("distillation", 1.0, [turn], ema=averages)]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The mean of d( f(x_t, t), f_target(x_s, s) ), as what the noisy, the middle and the clean third of the grid add to it."""
        c = self.config
        x, conditions = batch.data()
        last = len(self.times) - 1
        n = batch.choice(last, batch.size)
        t, s = self.times[n], self.times[(n + c.skip).clamp(max=last)]
        x_t = jump(self.teacher.path, x, batch.randn(*x.shape), t)
        w: float | Tensor = self.w
        shown = None
        if c.w_range:
            shown = w = c.w_range[0] + (c.w_range[1] - c.w_range[0]) * batch.rand(batch.size)
        with torch.no_grad():
            x_s = ode_step(self.teacher, x_t, t, s, conditions, solver=c.solver, guidance_scale=1 + w)
            target = self.target(x_s, s, conditions, guidance=shown)
        losses = distance(self.student(x_t, t, conditions, guidance=shown), target, c.metric, c.c)
        if c.weighting == "interval":
            losses = losses / (t - s)
        third = 3 * n // last
        return {name: losses[third == k].sum() / batch.size for k, name in enumerate(("noisy", "middle", "clean"))}

    def distilled(self) -> ConsistencyStudent:
        return ConsistencyStudent(self.average.denoiser, self.grids, self.shape, sigma_data=self.config.sigma_data,
                                  guidance_input=self.w if self.config.w_range else None)  # fmt: skip
