"""What consistency methods share: the consistency function, its grids, one ODE step of a teacher, distances, sampling.

A consistency function f maps every point of one probability-flow trajectory to that trajectory's clean end, so that f(x, t_min) = x
(Song et al. 2023, arXiv 2303.01469). Here f(x, t) = c_skip(t) x + c_out(t) x0(x, t), x0 being what a denoiser predicts on its path:

    trig, flow   c_skip = 0, c_out = 1; the denoiser is exact at t_min = 0
    vp           c_skip = 1/4 / (s^2 + 1/4), c_out = s / sqrt(s^2 + 1/4), s = 10 i, i = 0 ... T - 1 (Luo et al. 2023, arXiv 2310.04378)
    edm          Song's scalings of the raw network output h, with h replaced by the x0 that it implies (see `scalings`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from ..api import Conditions, Samples
from ..diffusion.base import Schedule, Time, as_time, broadcast
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import EDM, Flow, Trig, VPTable
from ..diffusion.solvers import jump, time_grid
from ..errors import UsageError, unknown
from ..randomness import sample_noise
from .student import FewStepStudent

PARAMS = ("trig", "flow", "vp", "edm")
SOLVERS = ("ddim", "heun")
METRICS = ("huber", "huber_sample", "l2")
TIMESTEP_SCALING = 10.0  # of the integer step in the vp scalings
ICT_HUBER = 0.00054  # c / sqrt(dimension) of the huber_sample form


# ---------------------------------------------------------------- paths and grids


def ddpm_table() -> tuple[float, ...]:
    """The 1000 levels of DDPM: betas from 1e-4 to 0.02 (Ho et al. 2020)."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return tuple(accumulate((1 - betas).tolist(), mul))


def consistency_path(param: str, schedule: Schedule) -> Schedule:
    """The path that a consistency function of this kind lives on; `schedule` is the teacher's.

    vp: the teacher's own table if it has one, else DDPM's.  edm: sigma itself is the time (affinely), as in Karras et al. 2022.
    """
    if param == "vp":
        return schedule if isinstance(schedule, VPTable) else VPTable(ddpm_table())
    if param not in PARAMS:
        raise unknown("parameterisation", param, PARAMS)
    return {"trig": Trig(), "flow": Flow(), "edm": EDM(rho=1.0)}[param]


def clean_time(path: Schedule) -> float:
    """t_min, where f is the identity: integer step 0 of a table, else 0 (sigma_min on edm)."""
    return 1 / len(path.alphas_cumprod) if isinstance(path, VPTable) else 0.0


def ddim_steps(points: int, total: int = 1000) -> list[int]:
    """The integer steps j total / points - 1, j = points ... 1, falling: 999, 979, ..., 19 for 50."""
    return [j * total // points - 1 for j in range(points, 0, -1)]


def consistency_grid(path: Schedule, points: int, spacing: str = "log_snr") -> Tensor:
    """The N = `points` times that training draws from, falling, and t_min after them; float64.

    vp: the DDIM grid, whatever `spacing`.  edm: `points` counts sigma_min, as in the papers (karras: their spacing).
    trig, flow: `spacing` as in `time_grid`, from 1.
    """
    if isinstance(path, VPTable):
        total = len(path.alphas_cumprod)
        if points > total // 2:
            raise UsageError(f"a grid of {points} points is too fine for {total} integer steps; take at most {total // 2}")
        return torch.tensor([*ddim_steps(points, total), 0], dtype=torch.float64).add(1).div(total)
    return time_grid(path, points - 1 if isinstance(path, EDM) else points, spacing)


def inference_times(grid: Tensor, steps: int) -> tuple[float, ...]:
    """The times of `steps` steps: positions floor(linspace(0, N, steps, without the end)) of a falling grid of N times and t_min.

    999, 759, 499, 259 for 4 of the 50-point DDIM grid. This is the rule of latent consistency models.
    """
    count = len(grid) - 1
    if not 1 <= steps <= count:
        raise UsageError(f"a grid of {count} times gives no {steps} steps; raise `points`")
    return tuple(grid[i * count // steps].item() for i in range(steps))


# ---------------------------------------------------------------- the consistency function


def scalings(path: Schedule, t: Time, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip and c_out before x and before the predicted x0, float64, of the shape of t; exactly 1 and 0 at t_min on vp and edm.

    edm: Song's f = a x + b h with a = d^2 / ((sigma - sigma_min)^2 + d^2), b = d (sigma - sigma_min) / sqrt(sigma^2 + d^2), d = sigma_data,
    where h is what Karras' x0 = d^2 / (sigma^2 + d^2) x + sigma d / sqrt(sigma^2 + d^2) h says it is.
    """
    t = as_time(t)
    if isinstance(path, VPTable):
        s = TIMESTEP_SCALING * (t * len(path.alphas_cumprod) - 1).clamp_min(0)
        return 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt()
    if isinstance(path, EDM):
        sigma, variance = path.sigma(t), sigma_data**2
        rest = sigma - path.sigma(0.0)
        out = rest / sigma
        return variance / (rest**2 + variance) - out * variance / (sigma**2 + variance), out
    return torch.zeros_like(t), torch.ones_like(t)


class ConsistencyFunction(nn.Module):
    """f(x, t) = c_skip(t) x + c_out(t) x0(x, t), and x itself at t_min, on the denoiser's path."""

    def __init__(self, denoiser: Denoiser, sigma_data: float = 0.5):
        super().__init__()
        self.denoiser = denoiser
        self.sigma_data = sigma_data
        self.t_min = clean_time(denoiser.path)

    @property
    def path(self) -> Schedule:
        return self.denoiser.path

    def forward(self, x: Tensor, t: Time, conditions: Conditions, *, guidance: Time | None = None) -> Tensor:
        """The clean end (n, *shape) of the trajectory through x at t, a float or float64 () or (n,).

        guidance: the input of a guidance-conditioned network, a float or (n,).
        """
        skip, out = scalings(self.path, t, self.sigma_data)
        end = broadcast(skip, x) * x + broadcast(out, x) * self.denoiser.x0(x, t, conditions, guidance=guidance)
        if isinstance(t, Tensor):
            return torch.where(_rows(t <= self.t_min, x), x, end)
        return x if t <= self.t_min else end

    def copy(self) -> ConsistencyFunction:
        return ConsistencyFunction(self.denoiser.copy(), self.sigma_data)


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.dim() - 1)) if mask.dim() else mask


# ---------------------------------------------------------------- the teacher's step, the distance


def ode_step(denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, conditions: Conditions, *, solver: str = "ddim",
             guidance_scale: Time | None = None) -> Tensor:  # fmt: skip
    """One step of the probability flow from x at t to s <= t, each (n,): (n, *shape).

    ddim: alpha_s x0 + sigma_s eps.  heun: the trapezoid rule in path time, whose slope at s is taken where Euler lands; on edm, where
    path time is sigma, it is Song's. Guidance combines x0 and eps alike (a prediction is affine in the output).
    """
    if solver == "ddim":
        prediction = denoiser.predict(x, t, conditions, guidance_scale=guidance_scale)
        return jump(denoiser.path, prediction.x0, prediction.eps, s)
    if solver != "heun":
        raise unknown("solver", solver, SOLVERS)
    dt = broadcast(s - t, x)
    slope = denoiser.velocity(x, t, conditions, guidance_scale=guidance_scale)
    ahead = denoiser.velocity(x + dt * slope, s, conditions, guidance_scale=guidance_scale)
    return x + dt * (slope + ahead) / 2


def distance(y: Tensor, target: Tensor, metric: str = "huber", c: float | None = None) -> Tensor:
    """How far y is from the target, for each sample: (n,).

    huber: mean over elements of sqrt(d^2 + c^2) - c, c = 0.001 unless given (latent consistency models).
    huber_sample: sqrt(|d|^2 + c^2) - c, c = 0.00054 sqrt(dimension) unless given (improved consistency training).  l2: mean of d^2.
    """
    difference = (y - target).flatten(1)
    if metric == "huber":
        c = 1e-3 if c is None else c
        return ((difference.square() + c**2).sqrt() - c).mean(1)
    if metric == "huber_sample":
        c = ICT_HUBER * math.sqrt(difference.shape[1]) if c is None else c
        return (difference.square().sum(1) + c**2).sqrt() - c
    if metric == "l2":
        return difference.square().mean(1)
    raise unknown("metric", metric, METRICS)


def half_life(decay: float) -> float:
    """The half-life, in updates, of an average that keeps `decay` of itself at each: decay^half_life = 1/2."""
    return math.log(0.5) / math.log(decay)


# ---------------------------------------------------------------- sampling


def multistep(f: ConsistencyFunction, conditions: Conditions, times: Sequence[float], noise: Callable[[int], Tensor], *,
              guidance: Time | None = None) -> Tensor:  # fmt: skip
    """Multistep consistency sampling (Song et al. 2023, algorithm 1) at falling times above t_min: (n, *shape).

    noise(k): the k-th standard normal noise; k = 0 is the start, path.start(t_1) noise(0). Later steps add fresh noise to the clean end
    found before it; nothing is added after the last. On edm a clean end still carries sigma_min, which the noise leaves out.
    """
    path = f.path
    rest = float(path.sigma(f.t_min)) if isinstance(path, EDM) else 0.0
    x = path.start(times[0]) * noise(0)
    for k, (t, next_t) in enumerate(pairwise(times), start=1):
        spread = math.sqrt(float(path.sigma(next_t)) ** 2 - rest**2)
        x = float(path.alpha(next_t)) * f(x, t, conditions, guidance=guidance) + spread * noise(k)
    return f(x, times[-1], conditions, guidance=guidance)


class ConsistencyStudent(FewStepStudent):
    """Multistep consistency sampling at the times that `grids` holds for a step count.

    guidance_input: for a guidance-conditioned network, w = guidance scale - 1 where `generate` is given no scale; None: no such input.
    """

    def __init__(self, denoiser: Denoiser, grids: Mapping[int, Sequence[float]], shape: Sequence[int], *, mode: str = "renoise",
                 guidance_input: float | None = None, sigma_data: float = 0.5):  # fmt: skip
        if mode != "renoise":
            raise UsageError(f"multistep consistency sampling draws fresh noise (mode renoise), not {mode!r}")
        super().__init__(denoiser, grids, shape, guidance_input=guidance_input)
        self.sigma_data = float(sigma_data)

    @torch.no_grad()
    def generate(self, conditions: Conditions, *, steps: int, seeds: Sequence[int], guidance: float | None = None,
                 negative: Conditions | None = None) -> Samples:  # fmt: skip
        if steps not in self.grids:
            raise UsageError(f"this student was trained for {', '.join(map(str, self.steps))} steps, not {steps}")
        if guidance is not None and self.guidance_input is None:
            raise UsageError("this student was trained at one guidance scale and takes none; train with w_range to choose it later")
        device = next(self.denoiser.parameters()).device

        def noise(draw: int) -> Tensor:
            return sample_noise(seeds, self.shape, draw).to(device)

        w = self.guidance_input if guidance is None else guidance - 1
        f = ConsistencyFunction(self.denoiser, self.sigma_data)
        return Samples(multistep(f, conditions.to(device), self.grids[steps], noise, guidance=w), evaluations=steps)

    def extra_config(self) -> dict[str, Any]:
        return {"sigma_data": self.sigma_data}
