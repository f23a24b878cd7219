"""TrigFlow and continuous-time consistency: the wrapper of any denoiser, the tangent, its normalisation, the loss.

Lu & Song 2024, arXiv 2410.11081. With d = sigma_data, z = d eps and the angle t in [0, pi/2]:

    x_t = cos t x0 + sin t z          dx/dt = d F(x_t / d, t)          f(x, t) = cos t x - sin t d F(x / d, t)

F is what a network that predicts the velocity would output: F = cos t eps - sin t x0 / d, read from whatever the network does predict.
The student is constant along the teacher's trajectories where df/dt = 0, dx/dt being the teacher's. Times cos t, with the unstable part
weighed by r, that derivative is the tangent

    g = -cos^2 t (d F - dx/dt) - r (cos t sin t x_t + d J),      J = cos t sin t dF/dt, one Jacobian-vector product,

and the loss moves F along g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..conditions import Conditions
from ..diffusion.base import Schedule, Time, as_time, broadcast, require
from ..diffusion.denoiser import Denoiser
from ..diffusion.derivatives import time_derivative
from ..diffusion.schedules import Trig
from ..diffusion.solvers import jump
from ..errors import UsageError, unknown

HALF_PI = math.pi / 2
LATEST = HALF_PI - 1e-4  # of training angles: at pi/2 cos t removes the tangent, and normalising would leave noise
TANGENTS = ("norm", "clip", "none")
FOUR_STEPS = (HALF_PI, 1.3, 1.1, 0.6)
STEP = 1e-3  # of the central differences, in units of cos t sin t


@dataclass(frozen=True)
class TrigPath(Schedule):
    """alpha = cos(pi t / 2), sigma = noise sin(pi t / 2): `Trig` for data whose standard deviation is `noise`."""

    name: ClassVar[str] = "trig_path"
    noise: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.noise < math.inf, self, f"noise must be above 0, got {self.noise}")

    def alpha(self, t: Time) -> Tensor:
        return Trig().alpha(t)

    def sigma(self, t: Time) -> Tensor:
        return self.noise * Trig().sigma(t)

    def d_alpha(self, t: Time) -> Tensor:
        return Trig().d_alpha(t)

    def d_sigma(self, t: Time) -> Tensor:
        return self.noise * Trig().d_sigma(t)

    def _inverse(self, log_snr: Tensor) -> Tensor:
        return Trig()._inverse(log_snr + 2 * math.log(self.noise))


@dataclass(frozen=True)
class TrigFlow:
    """The convention of x_t: z has deviation `sigma_data`, and x0 is `unit` times the data.

    unit 1 (scm): tan t = sigma / (sigma_data alpha) on the teacher's path.  unit = sigma_data (SANA-Sprint): tan t = sigma / alpha, so
    that sigma_data scales x_t, g and the loss, but the angle depends on the flow's tau alone: tau = sin t / (sin t + cos t).
    Denoisers are given on `path`.
    """

    sigma_data: float = 1.0
    unit: float = 1.0

    @property
    def path(self) -> Schedule:
        noise = self.sigma_data / self.unit
        return Trig() if noise == 1 else TrigPath(noise)

    def noised(self, data: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t (n, *shape) at angles t, float or float64 (n,), from data in their own unit."""
        return self.unit * jump(self.path, data, eps, t / HALF_PI)

    def output(self, denoiser: Denoiser, x_t: Tensor, t: Time, conditions: Conditions, **options: Any) -> tuple[Tensor, Tensor | None]:
        """F (n, *shape), and the log-variance (n,) of a network that has the head.  options: as in `Denoiser.predict`."""
        prediction = denoiser.predict(x_t / self.unit, t / HALF_PI, conditions, **options)
        return self._from_velocity(prediction.velocity), prediction.log_variance

    def clean(self, denoiser: Denoiser, x_t: Tensor, t: Time, conditions: Conditions, **options: Any) -> Tensor:
        """f(x_t, t) in the data's unit, (n, *shape): what the denoiser calls x0."""
        return denoiser.x0(x_t / self.unit, t / HALF_PI, conditions, **options)

    def derivative(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditions: Conditions, slope: Tensor, *, method: str = "exact",
                   **options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        """F and J = cos t sin t dF/dt along dx/dt = slope, each (n, *shape); method: exact (forward mode) or fd (central differences)."""
        if method not in ("exact", "fd"):
            raise unknown("way to J", method, ("exact", "fd"))
        rate = t.cos() * t.sin()
        velocity, change = time_derivative(
            denoiser, x_t / self.unit, t / HALF_PI, conditions, broadcast(rate, slope) * slope / self.unit, rate / HALF_PI,
            method="jvp" if method == "exact" else "finite_difference", h=STEP, **options,
        )  # fmt: skip
        return self._from_velocity(velocity), self._from_velocity(change)

    def _from_velocity(self, velocity: Tensor) -> Tensor:
        return velocity * (self.unit / (HALF_PI * self.sigma_data))  # path time is the angle over pi/2

    def path_times(self, angles: Sequence[float]) -> tuple[float, ...]:
        """The times on `Trig()`, on which students are kept, of the noise levels at these angles."""
        noise = self.sigma_data / self.unit
        return tuple(math.atan2(noise * math.sin(t), math.cos(t)) / HALF_PI for t in angles)


# ---------------------------------------------------------------- angles


def lognormal_angles(normal: Tensor, mean: float, std: float, sigma_data: float) -> Tensor:
    """t = atan(e^(mean + std normal) / sigma_data), float64 (n,), at most pi/2 - 1e-4: the exponential is a noise level of EDM's."""
    return torch.atan(torch.exp(mean + std * normal.double()) / sigma_data).clamp(max=LATEST)


def sampling_angles(steps: int, middle: float, grid: Sequence[float] = ()) -> tuple[float, ...]:
    """The angles at which a student of `steps` steps is called, falling from pi/2.

    `grid` where it has as many; else pi/2 and `middle` for two steps, pi/2, 1.3, 1.1, 0.6 for four, evenly spaced for other counts.
    """
    if steps == len(grid):
        return tuple(grid)
    if steps == 2:
        return (HALF_PI, middle)
    return FOUR_STEPS if steps == 4 else tuple(HALF_PI * (1 - k / steps) for k in range(steps))


def check_grid(grid: Sequence[float]) -> None:
    """Refuse angles that do not fall within (0, pi/2]."""
    if any(not 0 < t <= HALF_PI for t in grid) or any(a <= b for a, b in pairwise(grid)):
        raise UsageError(f"the angles of a grid fall strictly, from at most pi/2 to above 0, not {tuple(grid)}")


# ---------------------------------------------------------------- tangent and loss


def tangent(x_t: Tensor, t: Tensor, output: Tensor, j: Tensor, slope: Tensor, sigma_data: float, r: float = 1.0) -> Tensor:
    """g = -cos^2 t (d F - dx/dt) - r (cos t sin t x_t + d J), of the shape of x_t; slope is the teacher's dx/dt."""
    cos, sin = t.cos(), t.sin()
    stable = broadcast(cos * cos, x_t) * (sigma_data * output - slope)
    return -stable - r * (broadcast(cos * sin, x_t) * x_t + sigma_data * j)


def tamed(g: Tensor, kind: str = "norm", c: float = 0.1) -> Tensor:
    """norm: g / (|g| + c) with the length of each sample.  clip: every entry into [-1, 1].  none: g."""
    if kind == "norm":
        length = g.flatten(1).norm(dim=1)
        return g / broadcast(length + c, g)
    if kind == "clip":
        return g.clamp(-1, 1)
    if kind == "none":
        return g
    raise unknown("treatment of the tangent", kind, TANGENTS)


def moving_loss(output: Tensor, g: Tensor, log_variance: Tensor | None = None, prior: Tensor | None = None) -> dict[str, Tensor]:
    """mean of prior e^-v (F - sg F - g)^2, and mean v, the log-variance: the terms whose sum is minimised.

    The gradient with respect to F is -2 prior e^-v g / (n dimension). Without v it is absent; prior (n,) is 1 unless given.
    """
    losses = (output - output.detach() - g).square().flatten(1).mean(1)
    if prior is not None:
        losses = prior.to(losses) * losses
    if log_variance is None:
        return {"consistency": losses.mean()}
    return {"consistency": (torch.exp(-log_variance) * losses).mean(), "log variance": log_variance.mean()}


def consistency_terms(flow: TrigFlow, student: Denoiser, teacher: Denoiser, x_t: Tensor, t: Tensor, conditions: Conditions, *,
                      r: float = 1.0, kind: str = "norm", c: float = 0.1, weighted: bool = True, prior: bool = False, jvp: str = "exact",
                      guidance_scale: Time | None = None, guidance: Time | None = None) -> dict[str, Tensor]:  # fmt: skip
    """The loss of continuous-time consistency at x_t (n, *shape) and angles t, float64 (n,), as named terms.

    guidance_scale: of the teacher.  guidance: what a guidance-conditioned student is told.  weighted: with the student's log-variance.
    prior: times 1 / (sigma_data tan t), which g holds already; the released code of SANA-Sprint has it twice.
    """
    with torch.no_grad():
        slope = flow.sigma_data * flow.output(teacher, x_t, t, conditions, guidance_scale=guidance_scale)[0]
        _, j = flow.derivative(student, x_t, t, conditions, slope, method=jvp, guidance=guidance)
    output, log_variance = flow.output(student, x_t, t, conditions, guidance=guidance)
    with torch.no_grad():
        g = tamed(tangent(x_t, t, output, j, slope, flow.sigma_data, r), kind, c)
    weight = 1 / (flow.sigma_data * as_time(t).tan()) if prior else None
    return moving_loss(output, g, log_variance if weighted else None, weight)
