"""One network, whatever it predicts -> x0, eps, velocity or score, on its own path or on another.

With a = alpha, s = sigma at the network's time, the network's output F and its input x satisfy two linear equations in (x0, eps):
x = a x0 + s eps and F = p x0 + q eps, where (p, q) is (1, 0) for x0, (0, 1) for eps, (a', s') for the velocity, (0, -1/s) for the
score and (-s, a) for v (Salimans & Ho 2022), never singular. Every reading is a combination of x and F; its coefficients are found in
float64, once a call.

Ends at which that system is singular:
- x0 network, sigma = 0: eps reads 0, the mean of eps given a clean x.
- eps and score networks, alpha = 0: x0 is not in the output, so below alpha / sigma = 1e-3 the network is asked at that ratio.
- velocity networks: never singular on `flow` and `trig`. Where the schedule's own velocity is infinite (t = 0 of variance
  preserving schedules) the network is asked at sigma / alpha = 1e-3.
- velocity on such a path at t = 0 is infinite, and a score at sigma = 0 is only what a score network says: both come out non-finite.
Where the network's schedule does not reach the path's log-SNR it is asked at its nearer end. The x0 it gives there is kept at the
noisy end, the eps at the clean end, and the other follows from x = alpha x0 + sigma eps on the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..conditions import Conditions
from ..errors import unknown
from ..uncharged import uncharged
from .base import Schedule, Time, as_time, broadcast
from .schedules import from_config, match_time

if TYPE_CHECKING:
    from ..networks.backbone import Backbone

PREDICTIONS = ("x0", "eps", "velocity", "score", "v")
READABLE = 2 * math.log(1e3)  # the log-SNR at which a reading that is singular at an infinite one is still taken


Number = float | Tensor
Pair = tuple[Number, Number]


@lru_cache(maxsize=64)
def _range(schedule: Schedule, prediction: str) -> tuple[float, float]:
    """The earliest and the latest time at which x0 and eps can be read from the network."""
    with uncharged():
        velocity = prediction == "velocity"
        start = velocity and math.isinf(schedule.d_sigma(0.0))
        end = prediction in ("eps", "score") or (velocity and math.isinf(schedule.d_alpha(1.0)))
        return (schedule.time_of(READABLE).item() if start else 0.0, schedule.time_of(-READABLE).item() if end else 1.0)


def _kept(compute: Callable[[Any], Any]) -> Any:
    """A cached property. At a plain time its few numbers are free, so that what a turn costs does not depend on what was cached before."""

    def get(self: Any) -> Any:
        with uncharged() if self._plain else nullcontext():
            return compute(self)

    return cached_property(get)


class Coefficients:
    """How to read a network's output F at path time t: each reading is a pair (of x, of F), found when it is asked for.

    The numbers are float64 tensors of the shape of t, or plain floats where t is one.
    """

    def __init__(self, path: Schedule, schedule: Schedule, prediction: str, t: Time):
        self._plain = not isinstance(t, Tensor)
        self._t = as_time(t)
        self._path, self._schedule, self._prediction = path, schedule, prediction
        self._levels = path.levels(self._t)
        first, last = _range(schedule, prediction)
        limited = (first, last) != (0.0, 1.0)
        self._exact = path == schedule and not limited
        time = match_time(path, self._t, schedule)
        self._time = time.clamp(first, last) if limited else time
        self._network_levels = self._levels if self._exact else schedule.levels(self._time)
        self._scale: Number = 1.0 if self._exact else torch.hypot(*self._network_levels) / torch.hypot(*self._levels)

    def _given(self, *numbers: Number) -> Any:
        return tuple(as_time(number).item() for number in numbers) if self._plain else numbers

    @_kept
    def time(self) -> Number:
        """On the network's schedule."""
        return self._given(self._time)[0]

    @_kept
    def scale(self) -> Number:
        """From x on the path to the network's input."""
        return self._given(self._scale)[0]

    @_kept
    def sigma(self) -> Number:
        return self._given(self._levels[1])[0]

    @_kept
    def _solved(self) -> tuple[Pair, Pair]:
        """x0 and eps from the two equations at the network's time."""
        (a, s), k = self._network_levels, self._scale
        if self._prediction == "x0":
            clean = s == 0
            safe = torch.where(clean, math.inf, s)
            return (0.0, 1.0), (k / safe, -a / safe)
        if self._prediction == "eps":
            return (k / a, -s / a), (0.0, 1.0)
        if self._prediction == "score":
            return (k / a, s * s / a), (0.0, -s)
        p, q = (-s, a) if self._prediction == "v" else self._schedule.slopes(self._time)
        determinant = a * q - s * p
        return (k * q / determinant, -s / determinant), (-k * p / determinant, a / determinant)

    @_kept
    def x0(self) -> Pair:
        x0, eps = self._solved
        if self._exact:
            return self._given(*x0)
        alpha, sigma = self._levels  # on the path x = alpha x0 + sigma eps, even where the network could only be asked nearby
        noisy = alpha < sigma
        return self._given(torch.where(noisy, x0[0], (1 - sigma * eps[0]) / alpha), torch.where(noisy, x0[1], -sigma * eps[1] / alpha))

    @_kept
    def eps(self) -> Pair:
        x0, eps = self._solved
        if self._exact:
            return self._given(*eps)
        alpha, sigma = self._levels
        noisy = alpha < sigma
        return self._given(torch.where(noisy, (1 - alpha * x0[0]) / sigma, eps[0]), torch.where(noisy, -alpha * x0[1] / sigma, eps[1]))

    @_kept
    def velocity(self) -> Pair:
        d_alpha, d_sigma = self._given(*self._path.slopes(self._t))
        return (d_alpha * self.x0[0] + d_sigma * self.eps[0], d_alpha * self.x0[1] + d_sigma * self.eps[1])


@lru_cache(maxsize=4096)
def _at(path: Schedule, schedule: Schedule, prediction: str, t: float) -> Coefficients:
    """Kept, because solvers and students come back to the same few times."""
    with uncharged():
        return Coefficients(path, schedule, prediction, t)


class Prediction:
    """One network output at (x, t) on a path, converted to what is asked for, when it is asked for.

    x0, eps, velocity (d_alpha x0 + d_sigma eps, per unit of t) and score (-eps / sigma) have the shape of x. `output` is what the
    network gave (guided), `features` the tapped features and `log_variance` the network's extra output, where asked for.
    """

    def __init__(self, x: Tensor, output: Tensor, coefficients: Coefficients, *, native: str | None = None,
                 features: Mapping[str, Tensor] | None = None, log_variance: Tensor | None = None):  # fmt: skip
        self.x = x
        self.output = output
        self.features = dict(features or {})
        self.log_variance = log_variance
        self._c = coefficients
        self._native = native  # what the output is on this path without any conversion

    def _combine(self, pair: Pair) -> Tensor:
        of_x, of_output = pair
        part = self.output if isinstance(of_output, float) and of_output == 1 else broadcast(of_output, self.x) * self.output
        return part if isinstance(of_x, float) and of_x == 0 else broadcast(of_x, self.x) * self.x + part

    @cached_property
    def x0(self) -> Tensor:
        return self.output if self._native == "x0" else self._combine(self._c.x0)

    @cached_property
    def eps(self) -> Tensor:
        return self.output if self._native == "eps" else self._combine(self._c.eps)

    @cached_property
    def velocity(self) -> Tensor:
        return self.output if self._native == "velocity" else self._combine(self._c.velocity)

    @cached_property
    def score(self) -> Tensor:
        return self.output if self._native == "score" else -self.eps / broadcast(self._c.sigma, self.x)


class Denoiser(nn.Module):
    """A network and how to read it.

    prediction: what the network outputs on `schedule`, its own: x0, eps, velocity, score, or v = alpha eps - sigma x0.
    path: the schedule in which callers give x and t (default: the network's). The network is fed its own schedule's x and time.
    """

    def __init__(self, network: Backbone, schedule: Schedule, prediction: str, *, path: Schedule | None = None):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.path = schedule if path is None else path

    def predict(self, x: Tensor, t: Time, conditions: Conditions, *, guidance_scale: Time | None = None, guidance: Time | None = None,
                second_time: Time | None = None, taps: Sequence[str] = ()) -> Prediction:  # fmt: skip
        """One evaluation at x (n, *shape) and path time t, a float or a float64 tensor () or (n,).

        guidance_scale w, a float or (n,): classifier-free guidance, uncond + w (cond - uncond) (Ho & Salimans 2022), with one call on
        twice the batch; None and 1 are one plain evaluation. Features and log-variance are those of the conditional half.
        guidance: the input of a guidance-conditioned network, a float or (n,).  second_time: a second time on the same path.
        """
        c = self._read(t)
        inputs = self._input(x, c)
        time = _batched(c.time, x)
        second = None if second_time is None else _batched(self._network_time(second_time), x)
        strength = None if guidance is None else _batched(guidance, x)
        doubled = self.evaluations(guidance_scale) == 2
        if doubled:
            inputs, time = torch.cat([inputs, inputs]), torch.cat([time, time])
            second, strength = (None if v is None else torch.cat([v, v]) for v in (second, strength))
            conditions = Conditions.cat([conditions, conditions.null()])
        out = self.network(inputs, time, conditions, second_time=second, guidance=strength, taps=tuple(taps))
        output, features, log_variance = out.prediction, out.features, out.log_variance
        if doubled:
            assert guidance_scale is not None
            with_condition, without = output.chunk(2)
            output = without + broadcast(guidance_scale, x) * (with_condition - without)
            features = {name: value[: len(x)] for name, value in features.items()}
            log_variance = None if log_variance is None else log_variance[: len(x)]
        native = self.prediction if self.path == self.schedule else None
        return Prediction(x, output, c, native=native, features=features, log_variance=log_variance)

    def x0(self, x: Tensor, t: Time, conditions: Conditions, **options: Any) -> Tensor:
        """The mean of the clean sample; arguments as in `predict`."""
        return self.predict(x, t, conditions, **options).x0

    def eps(self, x: Tensor, t: Time, conditions: Conditions, **options: Any) -> Tensor:
        """The mean of the noise; arguments as in `predict`."""
        return self.predict(x, t, conditions, **options).eps

    def velocity(self, x: Tensor, t: Time, conditions: Conditions, **options: Any) -> Tensor:
        """dx/dt of the probability flow, per unit of path time; arguments as in `predict`."""
        return self.predict(x, t, conditions, **options).velocity

    def score(self, x: Tensor, t: Time, conditions: Conditions, **options: Any) -> Tensor:
        """The gradient of the log-density of x_t on the path; arguments as in `predict`."""
        return self.predict(x, t, conditions, **options).score

    def features(self, x: Tensor, t: Time, conditions: Conditions, taps: Sequence[str]) -> dict[str, Tensor]:
        """The features at `taps`; the network runs only as far as the deepest of them."""
        c = self._read(t)
        return self.network(self._input(x, c), _batched(c.time, x), conditions, taps=tuple(taps), stop=True).features

    def _read(self, t: Time) -> Coefficients:
        make = Coefficients if isinstance(t, Tensor) else _at
        return make(self.path, self.schedule, self.prediction, t)

    def _input(self, x: Tensor, c: Coefficients) -> Tensor:
        return x if isinstance(c.scale, float) and c.scale == 1 else broadcast(c.scale, x) * x

    def _network_time(self, t: Time) -> Time:
        return t if self.path == self.schedule else match_time(self.path, t, self.schedule)

    @staticmethod
    def evaluations(guidance_scale: Time | None) -> int:
        """Network evaluations of one prediction: 2 under guidance, 1 without (None, or the number 1)."""
        return 1 if guidance_scale is None or (not isinstance(guidance_scale, Tensor) and guidance_scale == 1) else 2

    def copy(self) -> Denoiser:
        """An independent copy, free to be trained: a wholly frozen network becomes trainable, and none is marked external."""
        network = self.network.copy()
        for module in network.modules():
            module.__dict__.pop("_distillbench_external", None)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            network.requires_grad_(True)
        return self.with_network(network)

    def with_network(self, network: Backbone) -> Denoiser:
        """The same reading of another network, which is shared, not copied."""
        return Denoiser(network, self.schedule, self.prediction, path=self.path)

    def on(self, path: Schedule) -> Denoiser:
        """The same network, shared, for callers who give x and t on `path`."""
        return Denoiser(self.network, self.schedule, self.prediction, path=path)

    def to_config(self) -> dict[str, Any]:
        """json-able: network, schedule, prediction and path; the weights are kept apart."""
        return {
            "network": self.network.to_config(),
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction,
            "path": self.path.to_config(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], network: Backbone | None = None) -> Denoiser:
        """The denoiser that `to_config` described, around `network` or around a newly built one with initial weights."""
        if network is None:
            from ..networks import build

            network = build(config["network"])
        return cls(network, from_config(config["schedule"]), config["prediction"], path=from_config(config["path"]))


def _batched(value: Time, x: Tensor) -> Tensor:
    """One number for each row of x, as the network takes it: float32, or float64 for a float64 x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.to(x.device, dtype).expand(len(x))
    return torch.full((len(x),), float(value), dtype=dtype, device=x.device)
