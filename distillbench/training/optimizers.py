"""Optimisers and moving averages as the loop uses them: keyed by turn, scheduled by progress, saved without pickle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..api import Ema, OptimizerConfig
from ..errors import ContractError


def make_optimizer(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that `config` names, fused where PyTorch has it."""
    held = list(parameters)
    if config.name in ("adam", "adamw"):
        kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
        return kind(held, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
    if config.name == "radam":
        return torch.optim.RAdam(held, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(held, lr=config.lr, momentum=config.betas[0], weight_decay=config.weight_decay)
    raise ContractError(f"unknown optimiser {config.name!r}; known: adam, adamw, radam, sgd")


def rate_factor(config: OptimizerConfig, progress: float) -> float:
    """What multiplies the learning rate at this share of its span."""
    factor = min(1.0, progress / config.warmup) if config.warmup > 0 else 1.0
    if config.decay == "constant" or progress <= config.decay_from:
        return factor
    past = (progress - config.decay_from) / max(1e-12, 1.0 - config.decay_from)
    if config.decay == "linear":
        return factor * (config.floor + (1.0 - config.floor) * (1.0 - past))
    if config.decay == "cosine":
        return factor * (config.floor + (1.0 - config.floor) * 0.5 * (1.0 + math.cos(math.pi * past)))
    raise ContractError(f"unknown decay {config.decay!r}; known: constant, linear, cosine")


def pack(key: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    entries = ((index, name, value) for index, entry in state.items() for name, value in entry.items())
    return {f"{key}/{index}/{name}": torch.as_tensor(value) for index, name, value in entries if value is not None}


def unpack(key: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `pack` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{key}/"):
            index, entry = name[len(key) + 1 :].split("/")
            state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Average:
    """Keeps the module `target` as the moving average of `source`."""

    def __init__(self, config: Ema, target: nn.Module, source: nn.Module):
        self.config = config
        self.target: list[Tensor] = list(target.parameters())
        self.source: list[Tensor] = [p.detach() for p in source.parameters()]
        self.buffers = list(zip(target.buffers(), source.buffers(), strict=True))
        if len(self.target) != len(self.source):
            raise ContractError(f"the average of {config.of!r} has {len(self.target)} parameters, its source {len(self.source)}")

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move after the `updates`-th update of the source (counted from 1)."""
        half_life = self.config.half_life
        if self.config.rampup is not None:
            half_life = min(half_life, self.config.rampup * updates)
        if half_life <= 0:
            torch._foreach_copy_(self.target, self.source)
        else:
            torch._foreach_lerp_(self.target, self.source, 1.0 - 0.5 ** (1.0 / half_life))
        for mine, theirs in self.buffers:
            mine.copy_(theirs)
