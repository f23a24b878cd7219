"""diffusers' schedulers: read as schedules of ours, and driven over our networks with noise that belongs to each sample."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..conditions import Conditions
from ..diffusion.base import Schedule
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import Flow, Trig, VPTable
from ..errors import UsageError, unknown
from ..networks.diffusers_tools import import_diffusers
from ..randomness import mix, sample_noise

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# What a SANA-Sprint pipeline starts from, and its second time of two, in radians.
SCM_FIRST, SCM_SECOND = 1.57080, 1.3


@dataclass(frozen=True)
class Reading:
    """What a scheduler says: the network's own schedule, the path on which it is sampled, what the network predicts.

    timesteps: of the training table.  discrete: whether the network's timestep is a row of a table.
    """

    schedule: Schedule
    path: Schedule
    prediction: str
    timesteps: int
    discrete: bool


def read_scheduler(scheduler: Any) -> Reading:
    """Raises UsageError for a scheduler that is no function of a signal and a noise level."""
    config, name = scheduler.config, type(scheduler).__name__
    timesteps = int(config.get("num_train_timesteps", 1000))
    predicts = config.get("prediction_type")
    if name == "SCMScheduler":
        return Reading(Flow(), Trig(), "velocity", timesteps, False)
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        if config.get("use_dynamic_shifting") or config.get("invert_sigmas") or config.get("shift_terminal"):
            raise UsageError(f"{name} with dynamic shifting, inverted sigmas or a shifted end has no one schedule; give a fixed shift")
        if config.get("use_flow_sigmas") and predicts != "flow_prediction":
            raise UsageError(f"{name} with flow sigmas must have prediction_type 'flow_prediction', not {predicts!r}")
        shift = float(config.get("shift" if name.startswith("FlowMatch") else "flow_shift") or 1.0)
        return Reading(Flow(), Flow(shift), "velocity", timesteps, False)
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise UsageError(f"{name} cannot be read as a schedule: it has neither alphas_cumprod nor a flow with a shift")
    if predicts not in PREDICTIONS:
        raise UsageError(f"{name}: prediction_type {predicts!r} is not supported; known: {', '.join(PREDICTIONS)}, and flow_prediction")
    schedule = VPTable(tuple(table.double().tolist()))
    return Reading(schedule, schedule, PREDICTIONS[predicts], len(table), True)


def scheduler_named(name: str, like: Any) -> Any:
    """The diffusers scheduler of that name with the settings of `like`. Raises UsageError for a name that diffusers does not have."""
    diffusers = import_diffusers()
    known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in known:
        raise unknown("scheduler of diffusers", name, known)
    return getattr(diffusers, name).from_config(like.config)


def set_times(scheduler: Any, steps: int, reading: Reading, times: Sequence[float] | None) -> None:
    """Have `scheduler` take `steps` steps, at `times` on the reading's path where they are given.

    A flow scheduler is given its sigmas, evenly spaced before the shift, as the pipelines of Stable Diffusion 3 and Flux do.
    """
    name, accepted = type(scheduler).__name__, _parameters(scheduler.set_timesteps)
    try:
        if name == "SCMScheduler":
            second = SCM_SECOND if steps == 2 else None
            if times is None:
                scheduler.set_timesteps(steps, max_timesteps=SCM_FIRST, intermediate_timesteps=second)
            else:
                angles = [t * math.pi / 2 for t in times]
                scheduler.set_timesteps(steps, timesteps=[*angles, 0.0], max_timesteps=None, intermediate_timesteps=None)
            scheduler.set_begin_index(0)
        elif name == "FlowMatchEulerDiscreteScheduler":
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)] if times is None else list(times))
        elif times is None:
            scheduler.set_timesteps(steps)
        elif "timesteps" in accepted:
            scheduler.set_timesteps(timesteps=[round(t * reading.timesteps) - 1 for t in times])
        else:
            raise UsageError(f"{name} takes no times of one's own; use LCMScheduler or TCDScheduler, or evenly spaced times")
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UsageError(f"{name} cannot take {steps} steps: {error}") from None


@torch.no_grad()
def sample(denoiser: Denoiser, scheduler: Any, conditions: Conditions, seeds: Sequence[int], shape: tuple[int, ...], steps: int, *,
           guidance_scale: float = 1.0, times: Sequence[float] | None = None, start: float = 1.0) -> tuple[Tensor, int]:  # fmt: skip
    """Samples (n, *shape) and the evaluations spent on each, by diffusers' own `scheduler` (changed in place).

    guidance_scale: above 1 classifier-free guidance, or, where the network takes it, its input.  start: scale of the first noise.
    Noise k of sample i depends on (seeds[i], k) alone; k = 0 is the start, k >= 1 belongs to the k-th step.
    """
    reading = read_scheduler(scheduler)
    set_times(scheduler, steps, reading, times)
    network: Any = denoiser.network
    device = next(iter(network.state_dict().values())).device
    embedded = bool(network.config.guidance_input)
    guided = not embedded and guidance_scale > 1
    if guided and not list(conditions):
        raise UsageError("this pipeline has no conditions, so it cannot be guided; leave the guidance scale at 1")
    conditions = conditions.to(device)
    both = Conditions.cat([conditions.null(), conditions]) if guided else conditions
    data = float(scheduler.config.get("sigma_data", 1.0)) if isinstance(reading.path, Trig) else 1.0
    x = sample_noise(seeds, shape, 0).to(device) * (start * data * float(getattr(scheduler, "init_noise_sigma", 1.0)))
    x0, steps_taken = x, scheduler.timesteps[:-1] if isinstance(reading.path, Trig) else scheduler.timesteps
    for k, timestep in enumerate(steps_taken, start=1):
        if isinstance(reading.path, Trig):
            angle = min(float(timestep) * 2 / math.pi, 1.0)
            embed, scale = (guidance_scale, None) if embedded else (None, guidance_scale if guided else None)
            velocity = denoiser.on(Trig()).velocity(x / data, angle, conditions, guidance=embed, guidance_scale=scale)
            value = velocity * (2 / math.pi * data)
        else:
            scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            value = _raw(network, scaled, timestep, both, guidance_scale, guided, embedded)
        result = scheduler.step(value, timestep, x, **_step_options(scheduler, seeds, k), return_dict=False)
        x, x0 = result[0], result[-1]
    return (x0 / data if isinstance(reading.path, Trig) else x), len(steps_taken) * (2 if guided else 1)


def _raw(network: Any, x: Tensor, timestep: Tensor, conditions: Conditions, guidance_scale: float, guided: bool, embedded: bool) -> Tensor:
    """What the network says at diffusers' timestep: exactly that number reaches it, since t is given in float64."""
    t = (timestep.double() + float(network.config.discrete)) / _range(network)
    t = t.to(x.device).expand(len(conditions))
    out = network(torch.cat([x, x]) if guided else x, t, conditions, guidance=guidance_scale if embedded else None).prediction
    if not guided:
        return out
    without, with_condition = out.chunk(2)  # in the order of the pipelines, so that not even rounding differs
    return without + guidance_scale * (with_condition - without)


def _range(network: Any) -> float:
    """How many of the scheduler's timesteps make t = 1: the network may count in other units (SANA's timestep_scale)."""
    return network.config.timestep_scale / network.config.model.get("timestep_scale", 1.0)


def _step_options(scheduler: Any, seeds: Sequence[int], k: int) -> dict[str, Any]:
    accepted = _parameters(scheduler.step)
    options: dict[str, Any] = {"eta": 0.0} if "eta" in accepted else {}
    if "generator" in accepted:
        options["generator"] = [torch.Generator().manual_seed(mix(int(seed), k)) for seed in seeds]
    elif type(scheduler).__name__ == "DPMSolverSDEScheduler":
        raise UsageError("DPMSolverSDEScheduler takes no generator, so its samples would depend on their batch; use another scheduler")
    return options


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)
