"""A student as files that plain diffusers loads: a pipeline folder, or a LoRA beside the name of its base.

With it goes the scheduler that its few-step sampling needs, and distillbench.json: what that scheduler would not do by itself (times,
scale of the first noise) and how to call the pipeline.

renoise on a table: LCMScheduler over all timesteps, with a boundary scaling so large that it vanishes in float32.
deterministic on a table: DDIM with trailing spacing; at other times DPM-Solver++ of first order, which is DDIM.
flow: Euler, stochastic for renoise; SANA with a guidance input and timesteps in [0, 1]: a SanaSprintPipeline with SCMScheduler.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..diffusion.base import Schedule
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import Flow, Trig, VPTable, match_time
from ..errors import UsageError
from ..networks.diffusers import Sana
from ..networks.diffusers_base import DiffusersBackbone
from ..networks.diffusers_tools import import_diffusers, peft_adapters, quiet
from .diffusers import SETTINGS, DiffusersTeacher
from .pipeline_guidance import without_guidance
from .pipeline_lora import WEIGHTS
from .pipeline_sampling import PREDICTIONS, SCM_FIRST, SCM_SECOND, Reading, set_times

BOUNDARY_SCALE = 1e6  # c_skip = 0.25 / (timestep 1e6)^2 then lies far below the last digit of float32
NAMES = {ours: theirs for theirs, ours in PREDICTIONS.items()}


@dataclass(frozen=True)
class FewSteps:
    """How a student samples in n steps: its denoiser, times on the denoiser's path, mode and guidance input."""

    denoiser: Denoiser
    times: tuple[float, ...]
    mode: str
    guidance: float | None


def few_steps_of(student: Any, steps: int) -> FewSteps:
    """Of a FewStepStudent or a StudentBySteps. Raises UsageError for another student, network or count of steps."""
    grids = getattr(student, "grids", {})
    if steps not in grids:
        raise UsageError(f"this student was trained for {', '.join(map(str, grids)) or 'no fixed number of'} steps, not {steps}")
    denoiser = student.denoiser_for(steps) if hasattr(student, "denoiser_for") else getattr(student, "denoiser", None)
    if not isinstance(denoiser, Denoiser) or not isinstance(denoiser.network, DiffusersBackbone):
        raise UsageError(f"a {type(student).__name__} holds no network of diffusers, so no pipeline can be made of it")
    return FewSteps(denoiser, tuple(grids[steps]), student.mode, getattr(student, "guidance_input", None))


def export_pipeline(teacher: DiffusersTeacher, student: Any, steps: int, folder: Path | str) -> Path:
    """Write the student, as it samples in `steps` steps, into `folder`; returns the folder.

    A network with adapters on the teacher's own becomes a LoRA file, any other a whole pipeline. A guidance input that the pipeline class
    does not feed is fixed at the student's value. Raises UsageError where diffusers has no way to say it.
    """
    few, folder = few_steps_of(student, steps), Path(folder)
    if isinstance(few.denoiser.schedule, VPTable) and few.denoiser.schedule != teacher.denoiser.schedule:
        raise UsageError("the student's network stands on another noise table than its teacher's pipeline")
    network: Any = few.denoiser.network
    base: Any = teacher.denoiser.network
    lora = bool(network.config.lora_rank) and network.config.model == base.config.model
    if network.config.lora_rank and not lora:
        network = network.merged()
    sprint = _is_sprint(network, few, teacher)
    if network.config.guidance_input and (few.guidance is None or (isinstance(network, Sana) and not sprint)):
        network = without_guidance(network, few.guidance)
    guidance = few.guidance if network.config.guidance_input else None
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        scheduler, path = _scheduler(teacher, few, steps, sprint)
        settings, own_times = _settings(teacher, few, steps, scheduler, path, guidance)
        if lora:
            _save_lora(teacher, network, scheduler, folder)
            settings |= {"base": teacher.name, "scheduler": type(scheduler).__name__}
        else:
            _save_pipeline(teacher, network, scheduler, folder, sprint)
    settings["call"] = _call(steps, own_times, path, scheduler, guidance)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return folder


def _is_sprint(network: Any, few: FewSteps, teacher: DiffusersTeacher) -> bool:
    """Whether SanaSprintPipeline, which feeds the noise level itself as the timestep, serves this network as it is."""
    dense = isinstance(network, Sana) and network.config.guidance_input and network.config.timestep_scale == 1
    times = _times(few, Trig())
    n = len(times)  # its call takes one time or two as they come, and spaces more of them evenly
    even = all(abs(t - times[0] * (1 - i / n)) < 1e-6 for i, t in enumerate(times))
    return dense and few.guidance is not None and few.mode == "renoise" and teacher.kind.text is not None and (n <= 2 or even)


def _scheduler(teacher: DiffusersTeacher, few: FewSteps, steps: int, sprint: bool) -> tuple[Any, Schedule]:
    """The scheduler, and the path on which its times are counted."""
    diffusers, denoiser = import_diffusers(), few.denoiser
    if isinstance(denoiser.schedule, Flow):
        if denoiser.prediction != "velocity" or denoiser.schedule != Flow():
            raise UsageError(f"diffusers has no flow scheduler for a network that predicts {denoiser.prediction} on {denoiser.schedule}")
        if sprint:
            return diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5), Trig()
        path = teacher.denoiser.path if isinstance(teacher.denoiser.path, Flow) else Flow()
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=path.shift, stochastic_sampling=few.mode == "renoise"), path
    if not isinstance(denoiser.schedule, VPTable) or denoiser.prediction not in NAMES:
        raise UsageError(f"diffusers has no scheduler for a network that predicts {denoiser.prediction} on {denoiser.schedule.name}")
    table = denoiser.schedule
    total = len(table.alphas_cumprod)
    options: dict[str, Any] = {"prediction_type": NAMES[denoiser.prediction], "clip_sample": False, "thresholding": False,
                               "set_alpha_to_one": True}  # fmt: skip
    even = [round(t * total) for t in _times(few, table)] == [round(total - i * total / steps) for i in range(steps)]
    if few.mode == "renoise":
        options |= {"original_inference_steps": total, "timestep_scaling": BOUNDARY_SCALE}
        make = diffusers.LCMScheduler
    elif even and total % steps == 0:
        options |= {"timestep_spacing": "trailing"}
        make = diffusers.DDIMScheduler
    else:
        options |= {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "timestep_spacing": "trailing"}
        make = diffusers.DPMSolverMultistepScheduler
    scheduler = make.from_config(teacher.pipeline.scheduler.config, **options)
    expected = torch.tensor(table.alphas_cumprod, dtype=scheduler.alphas_cumprod.dtype)
    if not torch.allclose(scheduler.alphas_cumprod, expected, rtol=1e-5, atol=0):
        raise UsageError(f"{make.__name__} makes another noise table of the teacher's settings; its betas cannot be kept")
    return scheduler, table


def _times(few: FewSteps, path: Schedule) -> list[float]:
    """The student's times on `path`, by signal-to-noise ratio."""
    return match_time(few.denoiser.path, torch.tensor(few.times, dtype=torch.float64), path).tolist()


def _settings(teacher: DiffusersTeacher, few: FewSteps, steps: int, scheduler: Any, path: Schedule,
              guidance: float | None) -> tuple[dict[str, Any], list[float] | None]:  # fmt: skip
    """What distillbench.json says, and the times where the scheduler's own differ."""
    times = _times(few, path)
    total = int(scheduler.config["num_train_timesteps"])
    if isinstance(path, VPTable) and few.mode == "renoise" and round(times[-1] * total) < 2:
        raise UsageError("the student's last time is the first row of the table, where LCMScheduler returns its input")
    reading = Reading(path, path, few.denoiser.prediction, total, isinstance(path, VPTable))
    make = type(scheduler)
    default, given = make.from_config(scheduler.config), make.from_config(scheduler.config)
    set_times(default, steps, reading, None)
    own = "timesteps" in inspect.signature(make.set_timesteps).parameters
    if own:
        set_times(given, steps, reading, times)
    same = not own or torch.allclose(default.timesteps.double(), given.timesteps.double(), rtol=1e-5)
    settings: dict[str, Any] = dict(teacher.settings)
    for name in ("guidance", "call", "base", "scheduler"):
        settings.pop(name, None)
    if not same:
        settings["times"] = {str(steps): times}
    if guidance is not None:
        settings["guidance"] = guidance
    start = path.start(times[0])
    if abs(start - 1) > 1e-6:
        settings["starts"] = {str(steps): start}
    return settings, None if same else times


def _call(steps: int, times: list[float] | None, path: Schedule, scheduler: Any, guidance: float | None) -> dict[str, Any]:
    """Arguments of the pipeline's own call that sample as the student does (but for the scale of the first noise)."""
    call: dict[str, Any] = {"num_inference_steps": steps}
    if isinstance(path, Flow):  # these pipelines would space the sigmas otherwise
        call = {"num_inference_steps": steps, "sigmas": times or [1 - i / steps for i in range(steps)]}
    elif times is not None and isinstance(path, VPTable):
        total = int(scheduler.config["num_train_timesteps"])
        call = {"num_inference_steps": steps, "timesteps": [round(t * total) - 1 for t in times]}
    elif isinstance(path, Trig):
        angles = [t * torch.pi / 2 for t in times] if times is not None else [SCM_FIRST, SCM_SECOND]
        call |= {"max_timesteps": angles[0], "intermediate_timesteps": angles[1] if steps == 2 else None}
    return {**call, "guidance_scale": 1.0 if guidance is None else guidance}


def _save_pipeline(teacher: DiffusersTeacher, network: Any, scheduler: Any, folder: Path, sprint: bool) -> None:
    make = import_diffusers().SanaSprintPipeline if sprint else type(teacher.pipeline)
    if not sprint and make.__name__ == "SanaSprintPipeline":
        make = import_diffusers().SanaPipeline
    accepted = set(inspect.signature(make.__init__).parameters)
    parts = {**teacher.pipeline.config, **teacher.pipeline.components, teacher.kind.network: network.model, "scheduler": scheduler}
    if "requires_safety_checker" in accepted:
        parts["requires_safety_checker"] = False
    make(**{name: value for name, value in parts.items() if name in accepted}).save_pretrained(folder, safe_serialization=True)


def _save_lora(teacher: DiffusersTeacher, network: Any, scheduler: Any, folder: Path) -> None:
    adapters = {f"{teacher.kind.network}.{key}": value.cpu() for key, value in peft_adapters(network.model).items()}
    save_file(adapters, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    scheduler.save_pretrained(folder / "scheduler")
