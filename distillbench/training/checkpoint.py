"""Checkpoints: one safetensors file, written beside and moved into place, with its digest and its run's name inside."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BadFileError


def _digest(tensors: dict[str, Tensor], meta: str) -> str:
    digest = hashlib.blake2b(meta.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write atomically: at any moment `path` is absent, the old checkpoint, or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(meta, sort_keys=True)
    held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(held, beside, metadata={"meta": text, "digest": _digest(held, text)})
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def read(path: Path, run: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and numbers of a checkpoint of `run`; `BadFileError` if it is truncated, altered or another run's."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["meta"]
        meta = json.loads(text)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise BadFileError(f"{path.name} is no readable checkpoint ({type(error).__name__})") from None
    if metadata.get("digest") != _digest(tensors, text):
        raise BadFileError(f"{path.name} was altered: its digest does not match")
    if meta.get("run") != run:
        raise BadFileError(f"{path.name} belongs to run {meta.get('run')!r}, not {run!r}")
    return tensors, meta


def set_aside(path: Path) -> Path:
    """Move a bad file out of the way, keeping it: `name.bad-1`, `name.bad-2`, ..."""
    number = 1
    while (target := path.with_name(f"{path.name}.bad-{number}")).exists():
        number += 1
    os.replace(path, target)
    return target
