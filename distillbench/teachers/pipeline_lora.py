"""A LoRA file fused into a pipeline, and the check that it belongs to that base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import UsageError

WEIGHTS = "pytorch_lora_weights.safetensors"


def fuse_lora(pipeline: Any, network: str, where: Path) -> dict[str, Any]:
    """Add the LoRA in a file, or in a folder that diffusers wrote, to the weights of `pipeline`.

    Returns the settings beside it (times and starts by step count); a scheduler beside it replaces the pipeline's.
    Raises UsageError where a layer or a shape does not fit this base.
    """
    path = where / WEIGHTS if where.is_dir() else where
    if path.suffix != ".safetensors" or not path.is_file():
        raise UsageError(f"{where}: no LoRA; give a .safetensors file, or a folder with {WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as file:
            count = len(list(file.keys()))
    except (SafetensorError, OSError, ValueError):
        raise UsageError(f"{path}: not a safetensors file; it is truncated or foreign") from None
    if not count:
        raise UsageError(f"{path}: holds no weights")
    _fit(pipeline, network, path)
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="fused", local_files_only=True)
    except Exception as error:  # foreign files fail in many ways
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{path}: this LoRA is for another base: {text[0][:200]}") from None
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return _beside(pipeline, path.parent)


def _fit(pipeline: Any, network: str, path: Path) -> None:
    """Compare every layer in the file with the pipeline's before anything is changed."""
    try:
        state = pipeline.lora_state_dict(str(path.parent), weight_name=path.name, local_files_only=True)
    except Exception as error:  # foreign files fail in many ways
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{path}: not a LoRA that diffusers can read ({text[0][:200]})") from None
    tensors = state[0] if isinstance(state, tuple) else state
    parts = (network, "text_encoder", "text_encoder_2")
    found = 0
    for key, value in tensors.items():
        for ending, axis, position in ((".lora_A.weight", 1, -1), (".lora_B.weight", 0, 0)):
            if not key.endswith(ending):
                continue
            part, _, layer = key.removesuffix(ending).partition(".")
            modules = dict(getattr(pipeline, part).named_modules()) if part in parts and hasattr(pipeline, part) else {}
            weight = getattr(modules.get(layer), "weight", None)
            if weight is None:
                raise UsageError(f"{path}: this LoRA is for another base: the pipeline has no layer {key.removesuffix(ending)}")
            if weight.shape[axis] != value.shape[0 if position == 0 else 1]:
                raise UsageError(f"{path}: this LoRA is for another base: {key} is {tuple(value.shape)}, the layer {tuple(weight.shape)}")
            found += 1
    if not found and not any("lora" in key for key in tensors):
        raise UsageError(f"{path}: holds no LoRA weights")


def _beside(pipeline: Any, folder: Path) -> dict[str, Any]:
    """Settings and scheduler that distillbench wrote beside a LoRA."""
    settings = folder / "distillbench.json"
    if not settings.is_file():
        return {}
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
        scheduler = values.pop("scheduler", None)
    except (ValueError, AttributeError):
        raise UsageError(f"{settings}: not a json object; export the LoRA again") from None
    if scheduler is not None:
        from .pipeline_sampling import scheduler_named

        named = scheduler_named(str(scheduler), pipeline.scheduler)
        pipeline.scheduler = type(named).from_pretrained(str(folder), subfolder="scheduler", local_files_only=True)
    return values
