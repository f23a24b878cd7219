"""What a method is made of: every module, tensor and number in `vars(method)`, found without being told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..api import Context, Method, is_external
from ..errors import BadFileError, ContractError
from ..randomness import mix, name_key

Number = int | float | bool | str | None


def built(method: Method, context: Context) -> Method:
    """Build the method. What it draws from torch's global generator (initial weights of plain layers) is fixed by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(context.seed, name_key("build")))
        method.build(context)
    return method


def modules_of(method: Method) -> dict[str, nn.Module]:
    """The modules among a method's attributes, external ones (the teacher) included."""
    found = {}
    for name, value in vars(method).items():
        if isinstance(value, nn.Module):
            found[name] = value
        elif isinstance(value, (list, tuple, set, dict)):
            _refuse_hidden(method, name, value)
    return found


def _refuse_hidden(method: Method, name: str, value: Any) -> None:
    items = value.values() if isinstance(value, dict) else value
    if any(isinstance(item, nn.Module) for item in items):
        raise ContractError(f"{method.info.id}: self.{name} is a plain {type(value).__name__} of modules; use ModuleList or ModuleDict")
    if any(isinstance(item, Tensor) for item in items):
        raise ContractError(f"{method.info.id}: self.{name} is a plain {type(value).__name__} of tensors; give each an attribute")


def _module_tensors(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, child in module.named_modules(prefix=name):
        if is_external(child):
            continue
        yield from ((f"{path}.{key}", p) for key, p in child.named_parameters(recurse=False))
        yield from ((f"{path}.{key}", b) for key, b in child.named_buffers(recurse=False))


def tensors_of(method: Method) -> dict[str, Tensor]:
    """Every tensor of the state by name, each storage once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in vars(method).items():
        pairs: list[tuple[str, Tensor]] = []
        if isinstance(value, nn.Module):
            pairs = list(_module_tensors(name, value))
        elif isinstance(value, Tensor):
            pairs = [(name, value)]
        for key, tensor in pairs:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[key] = tensor
    return found


def numbers_of(method: Method) -> dict[str, Any]:
    """Numbers, and the `state_dict()` of other objects that have one (shards)."""
    found: dict[str, Any] = {}
    for name, value in vars(method).items():
        if isinstance(value, (int, float, str)) or value is None:
            found[name] = value
        elif hasattr(value, "state_dict") and not isinstance(value, nn.Module):
            found[name] = {"state_dict": value.state_dict()}
    return found


def restore(method: Method, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Put a saved state into a freshly built method."""
    own = tensors_of(method)
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))[0]
        raise BadFileError(f"the checkpoint does not fit {method.info.id}: {odd!r} is on one side only")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
            raise BadFileError(f"the checkpoint does not fit {method.info.id}: {name} has shape {tuple(tensors[name].shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    for name, value in numbers.items():
        if isinstance(value, dict):
            getattr(method, name).load_state_dict(value["state_dict"])
        else:
            setattr(method, name, value)
