"""Progressive distillation. Salimans & Ho 2022 (ICLR), arXiv 2202.00512; official code google-research/diffusion_distillation.

Each stage trains a student of N steps from a teacher of 2N; then the student becomes the teacher, and N is halved. With z_t = alpha x +
sigma eps from a real x, u = (i + 1) / N, u' = u - 1 / (2N), u'' = i / N, i uniform, a teacher takes two DDIM steps:

    z' = alpha' x1 + sigma' e1,  z'' = alpha'' x2 + sigma'' e2,   x1, e1 = T(z, u),  x2, e2 = T(z', u')
    x~ = (z'' - rho z) / (alpha'' - rho alpha),  rho = sigma'' / sigma:  with it one DDIM step from u to u'' lands on z''
    L  = w(SNR) |x~ - x^(z, u)|^2,  SNR = alpha^2 / sigma^2;  w = max(1, SNR): truncated SNR

x~ is a weighted mean of x1 and x2 (`shares`), which is how it is computed here: nothing cancels, and where sigma'' = 0 it is x2 itself,
the code's rule for i = 0. On `flow` a DDIM step is an Euler step, and x~ = z - u w~ with w~ the mean of the two velocities.
The student of every N that is asked for is kept: one training gives them all. A sample of N steps is DDIM on the grid of stage N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from distillbench.api import Batch, Claim, Conditions, Context, Ema, Method, MethodInfo, OptimizerConfig, Search, Stage, Turn, knob
from distillbench.diffusion.base import Schedule, Time, broadcast
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import Trig
from distillbench.diffusion.solvers import jump
from distillbench.errors import UsageError
from distillbench.parts.simulation import step_grid
from distillbench.parts.student_by_steps import StudentBySteps

LAST = 2  # stages to this many steps and fewer are the last ones


def step_counts(start: int, asked: tuple[int, ...], factor: int = 2) -> tuple[int, ...]:
    """The N of each stage, falling from start / factor to the smallest one asked for; none that is asked for is leapt over."""
    counts = [start]
    while counts[-1] > min(asked):
        counts.append(max(counts[-1] // factor, *(n for n in asked if n < counts[-1])))
    return tuple(counts[1:])


def interval_times(i: Tensor, steps: int, parts: int) -> Tensor:
    """The times at which a teacher passes through the intervals i (n,) of a grid of `steps`, in `parts` steps: (parts + 1, n), float64."""
    done = torch.arange(parts + 1, dtype=torch.float64, device=i.device) / parts
    return (i + 1 - done[:, None]) / steps


def shares(path: Schedule, times: Tensor, *, last_x0: bool = True) -> Tensor:
    """What each x0 of a DDIM trajectory along falling times (k + 1, n) counts in x~: (k, n), float64, positive, adding up to 1.

    x~ is the x0 with which one DDIM step from the first time lands where the k steps do. A step adds (alpha_s / sigma_s - alpha_t /
    sigma_t) x0 to z / sigma, so each x0 counts by that, here times sigma at the end, which may be 0.
    last_x0: trajectories that end at time 0 count their last x0 alone, which is what a sampler returns. Where sigma(0) = 0 they do anyhow.
    """
    alpha, sigma = path.levels(times)
    end = torch.where(times[-1] > 0, sigma[-1], 0) if last_x0 else sigma[-1]
    reached = alpha * torch.cat([end / sigma[:-1], torch.ones_like(sigma[:1])])
    return reached.diff(dim=0) / (reached[-1] - reached[0])


@torch.no_grad()
def one_step_target(teacher: Denoiser, z: Tensor, times: Tensor, conditions: Conditions, *, guidance_scale: Time | None = None,
                    last_x0: bool = True) -> Tensor:  # fmt: skip
    """x~ (n, *shape): the x0 with which one DDIM step from z at times[0] lands where the teacher's along times (k + 1, n) do."""
    target = torch.zeros_like(z)
    weights = shares(teacher.path, times, last_x0=last_x0)
    for number, (t, s) in enumerate(pairwise(times)):
        prediction = teacher.predict(z, t, conditions, guidance_scale=guidance_scale)
        target = target + broadcast(weights[number], z) * prediction.x0
        if number + 1 < len(weights):
            z = jump(teacher.path, prediction.x0, prediction.eps, s)
    return target


def loss_weight(kind: str, path: Schedule, t: Tensor) -> Tensor:
    """w(SNR) before |x~ - x^|^2 at times t (n,) above 0, float64: snr is the loss in eps, v_mse that in v where alpha^2 + sigma^2 = 1."""
    alpha, sigma = path.levels(t)
    snr = (alpha / sigma).square()
    return {"constant": torch.ones_like(snr), "snr": snr, "snr_trunc": snr.clamp_min(1), "v_mse": 1 + snr}[kind]


class ProgressiveDistillation(Method):
    info = MethodInfo(
        id="progressive",
        version=1,
        title="Progressive distillation",
        paper="arXiv 2202.00512",
        year=2022,
        family="progressive",
        domain=("diffusion",),
        needs=("real data",),
        data_access="real",
        steps=(1, 2, 4, 8),
        trains="one student",
        deviations=(
            "times are uniform on the teacher's own path by default (on a flow DDIM is Euler); the paper's cosine path is path=trig",
            "trig runs to log-SNR infinity at both ends, the code's cosine to -20 and 20",
            "SNR is alpha^2 / sigma^2 on every path; on a flow v_mse is then not the loss in the flow's own velocity",
            "snr is exactly 0 at u = 1: under it the stage to one step leaves the two-step student as it is",
            "x~ is computed as the weighted mean of the teacher's x0, algebraically the code's formula and its rule for i = 0",
            "the first teacher takes 32 steps (paper 1024 to 8192): more leave each stage few updates under these budgets",
            "stages are shares of compute, not 50,000 updates each; the last two count double, as in the paper [memory]",
            "networks predict what the teacher's do; x0 and eps are first fitted to the teacher (fit_share), the papers' teachers are "
            "trained so; the blended head `both` needs twice the output channels and is left out",
            "guidance is folded into the first stage (later teachers are guided students); the two-stage recipe of Meng et al. is left out",
            "rates: default 1e-3 for small networks (code 5e-5 and 1e-4); optimisers start afresh in each stage [memory]",
            "direct keeps each step count's compute: the stages between two counts become one, after the same student of the count above",
            "the samples are not clipped to the data's range",
            "not claims: that quality falls most from 2 to 1 steps (claims hold at one step count), the published FIDs (other data)",
        ),
        claims=(
            Claim("one step beats one DDIM step of the teacher", "progressive", "teacher", "sliced-w2", steps=1),
            Claim("two steps beat two DDIM steps of the teacher", "progressive", "teacher", "sliced-w2", steps=2),
            Claim("four steps beat four DDIM steps of the teacher", "progressive", "teacher", "sliced-w2", steps=4),
            Claim("one step beats one DDIM step of the teacher", "progressive", "teacher", "in-mode", steps=1),
            Claim("two steps beat two DDIM steps of the teacher", "progressive", "teacher", "in-mode", steps=2),
            Claim("four steps beat four DDIM steps of the teacher", "progressive", "teacher", "in-mode", steps=4),
            Claim(
                "truncated SNR beats plain SNR, the loss in eps, at one step", "progressive", "progressive(loss_weight=snr)", "sliced-w2"
            ),
            Claim(
                "SNR + 1 (the loss in v) beats plain SNR at one step",
                "progressive(loss_weight=v_mse)",
                "progressive(loss_weight=snr)",
                "sliced-w2",
            ),
            Claim(
                "a network that predicts eps fails at one step, one that predicts x0 does not",
                "progressive(prediction=x0)",
                "progressive(prediction=eps)",
                "sliced-w2",
            ),
            Claim(
                "halving beats regression on the first teacher's whole trajectory at four steps",
                "progressive",
                "progressive(direct=true)",
                "sliced-w2",
                steps=4,
            ),
            Claim(
                "halving beats regression on the first teacher's whole trajectory at two steps",
                "progressive",
                "progressive(direct=true)",
                "sliced-w2",
                steps=2,
            ),
        ),
        tunes=(
            Search("lr", low=3e-4, high=1e-2, log=True),
            Search("start_steps", choices=(16, 32, 64)),
            Search("last_weight", low=1.0, high=4.0),
        ),
    )
    student_type = StudentBySteps

    @dataclass(frozen=True)
    class Config:
        start_steps: int = knob(32, "steps of the first teacher, a power of 2 (ImageNet-64 1024, CIFAR-10 8192)", low=2, high=8192)
        end_steps: int | None = knob(None, "steps of the last student; None: the fewest asked for (paper 1)", low=1, high=4096)
        halving_factor: int = knob(2, "by how much a stage divides the steps; 4 skips stages, but no student asked for", low=2, high=4)
        path: str = knob("teacher", "whose time and DDIM steps: the teacher's own path, or the paper's cosine", choices=("teacher", "trig"))
        loss_weight: str = knob("snr_trunc", "of the error in x0, by SNR", choices=("constant", "snr", "snr_trunc", "v_mse"))
        boundary_rule: str = knob(
            "x2", "target of the last step: the teacher's last x0, or x~ as elsewhere; the same on flow and trig", choices=("x2", "formula")
        )
        prediction: str = knob("teacher", "of the students; x0, eps: first fitted to the teacher", choices=("teacher", "x0", "eps"))
        fit_share: float = knob(0.2, "share of the budget for that fit", low=0.01, high=0.9)
        direct: bool = knob(False, "no stages between the step counts asked for: regress on start_steps / N steps of the first teacher")
        last_weight: float = knob(2.0, "budget of each stage to 2 steps and to 1, that of the others being 1", low=0.05, high=20)
        guidance: float | None = knob(None, "guidance scale of the first teacher; None: the track's")
        lr: float = knob(1e-3, "learning rate (paper: the teacher's)", low=0)
        lr_anneal: str = knob("linear", "of the rate, to 0 within each stage", choices=("constant", "linear", "cosine"))
        reset_optimizer: bool = knob(True, "start the optimiser afresh in each stage")
        betas: tuple[float, ...] = knob((0.9, 0.999), "of Adam", low=0, high=0.99999)
        clip: float | None = knob(1.0, "largest norm of the gradient", low=1e-9)
        batch_size: int | None = knob(None, "None: the track's (CIFAR-10 128, ImageNet-64 2048)", low=1)
        half_life: float = knob(0.0, "of the average that is handed on and scored, in updates; 0: none (paper)", low=0)

        def __post_init__(self) -> None:
            if self.start_steps & (self.start_steps - 1):
                raise ValueError(f"start_steps is a power of 2, not {self.start_steps}")
            if self.halving_factor == 3:
                raise ValueError("halving_factor is 2 or 4, not 3")
            if len(self.betas) != 2:
                raise ValueError(f"betas are two numbers, not {len(self.betas)}")

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        end = min(context.steps) if c.end_steps is None else c.end_steps
        for n in (end, *context.steps):
            if n & (n - 1) or not end <= n < c.start_steps:
                raise UsageError(f"progressive has no student of {n} steps: ask for powers of 2 from {end} (end_steps) to below "
                                 f"{c.start_steps} (start_steps), or change these knobs")  # fmt: skip
        self.asked = tuple(sorted({end, *context.steps}, reverse=True))
        self.kept_steps = tuple(context.steps)
        self.shape = context.shape
        self.scale = context.guidance if c.guidance is None else c.guidance
        own = context.teacher
        self.teacher: Denoiser = own if c.path == "teacher" else own.on(Trig())
        kind = own.prediction if c.prediction == "teacher" else c.prediction
        self.student = Denoiser(self.teacher.copy().network, own.schedule, kind, path=self.teacher.path)
        self.average = self.student.copy() if c.half_life else self.student
        self.parent = self.student.copy()  # the teacher of all stages but the first
        self.kept = nn.ModuleDict({str(n): self.student.copy() for n in self.kept_steps})

    def stages(self) -> list[Stage]:
        """A stage for each N; with `direct` one for each N that is asked for, with the budget of all since the last such N."""
        c = self.config
        counts = step_counts(c.start_steps, self.asked, c.halving_factor)
        weights = [c.last_weight if n <= LAST else 1.0 for n in counts]
        fit = c.fit_share if c.prediction != "teacher" else 0.0
        stages = [self._stage("fit", fit, self.fit_loss, None)] if fit else []
        before, share = c.start_steps, 0.0
        for n, weight in zip(counts, weights, strict=True):
            share += (1 - fit) * weight / sum(weights)
            if c.direct and n not in self.asked:
                continue
            first = c.direct or before == c.start_steps
            loss = partial(self.loss, n, (c.start_steps if c.direct else before) // n, first)
            stages.append(self._stage(f"to {n} step{'s' * (n > 1)}", share, loss, n))
            before, share = n, 0.0
        return stages

    def _stage(self, name: str, share: float, loss: Callable[[Batch], dict[str, Tensor]], steps: int | None) -> Stage:
        c = self.config
        optimizer = OptimizerConfig(c.lr, "adam", (c.betas[0], c.betas[1]), clip=c.clip, decay=c.lr_anneal)
        turn = Turn(
            "distil" if steps else "fit", loss, {"student": self.student}, optimizer={"student": optimizer}, batch_size=c.batch_size
        )
        return Stage(name, share, [turn], end=partial(self.hand_on, steps), reset=("distil",) if c.reset_optimizer else (),
                     ema={"average": Ema("student", c.half_life, rampup=0.05)} if c.half_life else {})  # fmt: skip

    def hand_on(self, steps: int | None) -> None:
        """The student, or its average, becomes the next teacher, the next student's start, and what is kept for `steps`."""
        weights = self.average.state_dict()
        held = [self.kept[str(steps)]] if steps in self.kept_steps else []
        for module in (self.student, self.parent, *held):
            module.load_state_dict(weights)

    def loss(self, steps: int, parts: int, first: bool, batch: Batch) -> dict[str, Tensor]:
        """The mean of w |x~ - x^|^2 over intervals of the grid of `steps`, of which the teacher takes each in `parts` steps."""
        c = self.config
        x, conditions = batch.data()
        times = interval_times(batch.choice(steps, batch.size), steps, parts)
        z = jump(self.teacher.path, x, batch.randn(*x.shape), times[0])
        teacher, scale = (self.teacher, self.scale) if first else (self.parent, None)
        target = one_step_target(teacher, z, times, conditions, guidance_scale=scale, last_x0=c.boundary_rule == "x2")
        return {f"{steps} steps": self._error(z, times[0], conditions, target, c.loss_weight)}

    def fit_loss(self, batch: Batch) -> dict[str, Tensor]:
        """What stands for a teacher trained to predict x0 or eps: the student imitates the teacher at all times above 0."""
        x, conditions = batch.data()
        t = 1 - batch.rand(batch.size)
        z = jump(self.teacher.path, x, batch.randn(*x.shape), t)
        with torch.no_grad():
            told = self.teacher.predict(z, t, conditions, guidance_scale=self.scale)
        if self.student.prediction == "eps":
            return {"fit": (self.student.eps(z, t, conditions) - told.eps).square().mean()}
        return {"fit": self._error(z, t, conditions, told.x0, "snr_trunc")}

    def _error(self, z: Tensor, t: Tensor, conditions: Conditions, target: Tensor, weight: str) -> Tensor:
        squares = (self.student.x0(z, t, conditions) - target).flatten(1).square().mean(1)
        return (loss_weight(weight, self.teacher.path, t).to(squares) * squares).mean()

    def distilled(self) -> StudentBySteps:
        networks = {n: cast(Denoiser, self.kept[str(n)]) for n in self.kept_steps}
        return StudentBySteps(networks, {n: step_grid(n) for n in networks}, self.shape)
