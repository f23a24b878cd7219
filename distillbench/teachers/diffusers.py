"""A diffusers pipeline as a teacher: `open_pipeline` reads a local folder, or a hub id at a pinned revision. docs/teachers.md.

The network comes behind the backbone interface, the scheduler as a schedule, prompts as conditions, and images through the
pipeline's autoencoder. Weights are read from safetensors only and no code from a folder is ever run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import Samples, external
from ..conditions import Conditions
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import Trig
from ..errors import BadFileError, UsageError
from ..networks import Sana, UNet2D, UNet2DCondition
from ..networks.diffusers_base import DiffusersBackbone
from ..networks.diffusers_tools import import_diffusers, quiet
from .pipeline_lora import fuse_lora
from .pipeline_sampling import read_scheduler, sample, scheduler_named
from .pipeline_text import SANA, SD, SDXL, TextFamily, TextStore

SETTINGS = "distillbench.json"
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack")


@dataclass(frozen=True)
class PipelineKind:
    """How one pipeline class is read. network: the name of its denoiser's component.  text: None without prompts.

    left_out: components that are neither loaded nor needed.
    """

    network: str
    backbone: type[DiffusersBackbone]
    text: TextFamily | None
    left_out: tuple[str, ...] = ()


PIPELINES: dict[str, PipelineKind] = {
    "StableDiffusionPipeline": PipelineKind("unet", UNet2DCondition, SD, ("safety_checker", "feature_extractor", "image_encoder")),
    "StableDiffusionXLPipeline": PipelineKind("unet", UNet2DCondition, SDXL, ("feature_extractor", "image_encoder")),
    "SanaPipeline": PipelineKind("transformer", Sana, SANA),
    "SanaSprintPipeline": PipelineKind("transformer", Sana, SANA),
    "DDPMPipeline": PipelineKind("unet", UNet2D, None),
}


@dataclass
class DiffusersTeacher:
    """An opened pipeline. `denoiser` is frozen and external; shape: of one sample, in latents that are already scaled; image_size: (h, w).

    times: step count -> times on the denoiser's path, where a folder states its own.  starts: step count -> scale of the first noise.
    guidance: the scale under which the folder says it is sampled, 1 where it says nothing.
    name: the folder's name or the hub id, with the revision.
    """

    name: str
    kind: PipelineKind
    pipeline: Any
    denoiser: Denoiser
    shape: tuple[int, ...]
    image_size: tuple[int, int]
    settings: dict[str, Any] = field(default_factory=dict)
    times: dict[int, tuple[float, ...]] = field(default_factory=dict)
    starts: dict[int, float] = field(default_factory=dict)
    guidance: float = 1.0

    def __post_init__(self) -> None:
        self._texts = None if self.kind.text is None else TextStore(self.pipeline, self.kind.text, self.settings)

    def to(self, device: torch.device | str) -> DiffusersTeacher:
        """Move everything to `device`; returns the teacher itself."""
        self.pipeline.to(device)
        self.denoiser.to(device)
        return self

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str], negative: str = "") -> Conditions:
        """tokens (n, L, D), mask (n, L), prompt, and what the class adds; the null is the negative prompt. On the CPU."""
        if self._texts is None:
            return Conditions.none(len(prompts))
        with quiet():
            fields: dict[str, Any] = self._texts.fields(prompts)
            nulls: dict[str, Any] = self._texts.null(negative)
        return Conditions({**fields, "prompt": list(prompts)}, {**nulls, "prompt": negative}, size=len(prompts))

    def forget(self) -> None:
        """Drop the embeddings of the prompts met so far: thousands of them take gigabytes."""
        if self._texts is not None:
            self._texts.forget()

    def too_long(self, prompts: Sequence[str]) -> list[int]:
        """Positions of the prompts that are longer than the text encoder takes, and would be cut."""
        return [] if self._texts is None else self._texts.too_long(prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1], float32."""
        if self._vae is None:
            return (latents.float() / 2 + 0.5).clamp(0, 1)
        shift, scale = self._latent_scale(latents)
        images = self._vae.decode((latents / scale + shift).to(self._vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Scaled latents (n, *shape) of images (n, 3, h, w) in [0, 1]: the mode, so nothing is drawn."""
        images = 2 * images - 1
        if self._vae is None:
            return images
        encoded = self._vae.encode(images.to(self._vae.device, self._vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        shift, scale = self._latent_scale(latents)
        return ((latents - shift) * scale).float()

    @property
    def _vae(self) -> Any:
        return getattr(self.pipeline, "vae", None)

    def _latent_scale(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and factor of the latents: scaled = (latents - mean) * factor."""
        config = self._vae.config
        factor = config["scaling_factor"]
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, deviation = (like.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            return mean, factor / deviation
        return config.get("shift_factor") or 0.0, factor

    def sample(self, conditions: Conditions, seeds: Sequence[int], steps: int, guidance_scale: float | None = None,
               scheduler: Any = None) -> Samples:  # fmt: skip
        """One sample for each condition by diffusers' own scheduler: the pipeline's, one named, or one given (a copy is used).

        Sample i depends on (conditions[i], seeds[i]) alone. guidance_scale: above 1 classifier-free guidance, or the input of a network
        that takes it; None: `guidance`. Times and start that the folder states hold for the pipeline's own scheduler.
        """
        own = scheduler is None
        chosen = self.pipeline.scheduler if own else scheduler
        scale = self.guidance if guidance_scale is None else guidance_scale
        times, start = (self.times.get(steps), self.starts.get(steps, 1.0)) if own else (None, 1.0)
        with quiet():
            like = self.pipeline.scheduler
            chosen = scheduler_named(chosen, like) if isinstance(chosen, str) else type(chosen).from_config(chosen.config)
            x, evaluations = sample(self.denoiser, chosen, conditions, seeds, self.shape, steps, guidance_scale=scale, times=times,
                                    start=start)  # fmt: skip
        return Samples(x, evaluations)


def open_pipeline(where: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32,
                  lora: str | Path | None = None) -> DiffusersTeacher:  # fmt: skip
    """The teacher in a local pipeline folder, or under a hub id with a pinned revision; with a LoRA file fused into it if given.

    Raises UsageError, one line, for what is no pipeline, a class that is not supported, weights as pickles, a scheduler that is no
    schedule, and a LoRA for another base.
    """
    folder, name = located(where, revision)
    index = _read_index(folder)
    kind = PIPELINES[index["_class_name"]]
    pipeline = _loaded(folder, index, kind, dtype)
    settings = read_settings(folder)
    if lora is not None:
        with quiet():
            settings = {**settings, **fuse_lora(pipeline, kind.network, Path(lora))}
    return wrap_pipeline(pipeline, settings, name if lora is None else f"{name} + {Path(lora).name}")


def wrap_pipeline(pipeline: Any, settings: Mapping[str, Any] | None = None, name: str = "pipeline") -> DiffusersTeacher:
    """The teacher around a pipeline that is loaded already; it takes the pipeline's network over and freezes it."""
    class_name = type(pipeline).__name__
    if class_name not in PIPELINES:
        raise UsageError(f"pipelines of class {class_name} are not supported; known: {', '.join(PIPELINES)} (docs/teachers.md adds one)")
    kind, settings = PIPELINES[class_name], dict(settings or {})
    reading = read_scheduler(pipeline.scheduler)
    model = getattr(pipeline, kind.network)
    # A SANA-Sprint pipeline feeds the noise level itself, in [0, 1]; the others its multiple.
    sprint = isinstance(reading.path, Trig)
    scale = 1.0 if sprint else float(reading.timesteps) * float(model.config.get("timestep_scale") or 1.0)
    network = kind.backbone.from_model(model, timestep_scale=scale, discrete=reading.discrete)
    denoiser = Denoiser(network, reading.schedule, reading.prediction, path=reading.path)
    external(denoiser)
    sides = model.config["sample_size"]
    h, w = (sides, sides) if isinstance(sides, int) else tuple(sides)
    factor = 1 if getattr(pipeline, "vae", None) is None else pipeline.vae_scale_factor
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            external(component)
    pipeline.set_progress_bar_config(disable=True)
    try:
        times = {int(n): tuple(float(t) for t in values) for n, values in settings.pop("times", {}).items()}
        starts = {int(n): float(value) for n, value in settings.pop("starts", {}).items()}
        guidance = float(settings.pop("guidance", 1.0))
    except (TypeError, ValueError, AttributeError):
        raise BadFileError(f"{SETTINGS}: times and starts are step counts with numbers; export the pipeline again") from None
    shape = (model.config["in_channels"], h, w)
    return DiffusersTeacher(name, kind, pipeline, denoiser, shape, (h * factor, w * factor), settings, times, starts, guidance)


def read_settings(folder: Path) -> dict[str, Any]:
    """What distillbench.json of a pipeline folder says (times and starts by step count, settings of the text encoder), or nothing."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise BadFileError(f"{path}: not a json file; export the pipeline again or delete it") from None
    if not isinstance(settings, dict):
        raise BadFileError(f"{path}: not a json object; export the pipeline again or delete it")
    return settings


def located(where: str | Path, revision: str | None = None) -> tuple[Path, str]:
    """The folder, downloaded if `where` is a hub id, and a name that holds no path of this machine."""
    folder = Path(where)
    if folder.is_dir():
        return folder, folder.resolve().name
    if folder.exists():
        raise UsageError(f"{where}: a file, not the folder of a pipeline (a LoRA is given beside its base)")
    if isinstance(where, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", where):
        raise UsageError(f"{where}: no such folder; give a pipeline folder, or a hub id such as owner/name with a revision")
    if revision is None:
        raise UsageError(f"{where}: no such folder; if it is a hub id, give --revision, so that the same weights are meant tomorrow")
    diffusers = import_diffusers()
    try:
        with quiet():
            found = diffusers.DiffusionPipeline.download(where, revision=revision, use_safetensors=True)
    except Exception as error:  # network, hub and files fail in many ways
        raise UsageError(f"{where} at {revision} cannot be had from the hub ({_first_line(error)})") from None
    return Path(found), f"{where}@{revision}"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(f"{folder} is no pipeline: it has no model_index.json (diffusers' save_pretrained writes it)") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: not a json file; save the pipeline again") from None
    if not isinstance(index, dict) or index.get("_class_name") not in list(PIPELINES):
        found = index.get("_class_name") if isinstance(index, dict) else None
        raise UsageError(
            f"{folder}: pipelines of class {found} are not supported; known: {', '.join(PIPELINES)} (docs/teachers.md adds one)"
        )
    return index


def _loaded(folder: Path, index: Mapping[str, Any], kind: PipelineKind, dtype: torch.dtype) -> Any:
    for name, value in index.items():
        if isinstance(value, list) and name not in kind.left_out and value[0] is not None:
            _check_component(folder, name, value)
    diffusers = import_diffusers()
    left_out: dict[str, Any] = dict.fromkeys((name for name in kind.left_out if name in index), None)
    if "requires_safety_checker" in index:
        left_out["requires_safety_checker"] = False
    try:
        with quiet():
            make = getattr(diffusers, index["_class_name"])
            return make.from_pretrained(folder, use_safetensors=True, local_files_only=True, **left_out).to(dtype)
    except Exception as error:  # foreign files fail in many ways
        raise UsageError(f"{folder}: the pipeline cannot be loaded ({_first_line(error)})") from None


def _check_component(folder: Path, name: str, value: list[Any]) -> None:
    """Refuse code of the folder's own, and weights that only a pickle holds."""
    if value[0] not in ("diffusers", "transformers"):
        raise UsageError(f"{folder}: component {name} comes from {value[0]!r}; only classes of diffusers and transformers are loaded")
    files = [path.suffix for path in (folder / name).glob("*") if path.is_file()]
    if any(ending in UNSAFE for ending in files) and ".safetensors" not in files:
        raise UsageError(f"{folder / name}: weights as a pickle only; save the pipeline with safe_serialization=True")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
