"""A multilayer perceptron for vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conditions import Conditions
from .backbone import Backbone, BackboneConfig, Output
from .layers import (
    GUIDANCE_FEATURES,
    embedding,
    frequencies,
    generator_or_default,
    guidance_waves,
    linear,
    waves,
    waves_from_zero,
    zero_linear,
)
from .lora import add_adapters


@dataclass(frozen=True, kw_only=True)
class MLPConfig(BackboneConfig):
    """dimension: of the vectors.  depth: hidden layers.

    frequencies, highest_frequency: of the time features, in rad per unit of t.  x_frequencies, highest_x_frequency: of the
    features of each coordinate, in rad per unit of x, for data of standard deviation about 1; 0 of them leaves x as it is.
    """

    dimension: int = 2
    width: int = 128
    depth: int = 3
    classes: int = 8
    frequencies: int = 8
    highest_frequency: float = 10.0
    x_frequencies: int = 3
    highest_x_frequency: float = 6.0


class MLP(Backbone):
    """Hidden layers with SiLU on [x, sinusoids of x, sinusoids of t]; the class and all added inputs enter the first layer.

    The sinusoids of x let so small a network learn sharp modes much sooner (arXiv 2006.10739).
    Taps `hidden1`, `hidden2`, ...: (width,), after the activation.
    """

    kind: ClassVar[str] = "mlp"
    config_type: ClassVar[type[BackboneConfig]] = MLPConfig
    config: MLPConfig
    at: Tensor
    x_at: Tensor

    def __init__(self, config: MLPConfig, generator: torch.Generator | None = None):
        super().__init__(config)
        generator = generator_or_default(generator)
        features = 2 * config.frequencies
        gain = math.sqrt(2)
        self.register_buffer("at", frequencies(config.frequencies, 1.0, config.highest_frequency), persistent=False)
        self.register_buffer("x_at", frequencies(config.x_frequencies, 1.5, config.highest_x_frequency), persistent=False)
        self.first = linear(config.dimension * (1 + 2 * config.x_frequencies) + features, config.width, generator, gain=gain)
        self.hidden = nn.ModuleList(linear(config.width, config.width, generator, gain=gain) for _ in range(config.depth - 1))
        self.last = linear(config.width, config.dimension, generator)
        self.label = embedding(config.classes + 1, config.width, generator, std=0.5) if config.classes else None
        self.second_time = zero_linear(features, config.width, bias=False) if config.second_time else None
        self.guidance = zero_linear(GUIDANCE_FEATURES, config.width, bias=False) if config.guidance_input else None
        self.log_variance = zero_linear(features, 1) if config.log_variance else None
        if config.lora_rank:
            add_adapters(self, config.lora_rank, generator, alpha=config.lora_alpha or None, targets=config.lora_targets)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tuple(f"hidden{i + 1}" for i in range(self.config.depth))

    def tap_shape(self, name: str) -> tuple[int, ...]:
        self._check_tap(name)
        return (self.config.width,)

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, *, second_time: Tensor | None = None,
                guidance: Tensor | float | None = None, taps: Sequence[str] = (), stop: bool = False) -> Output:  # fmt: skip
        self._check(second_time, guidance, taps, stop)
        dtype = self.first.weight.dtype
        angles = (x[:, :, None] * self.x_at).flatten(1)
        times = waves(t, self.at).to(dtype)
        inner = self.first(torch.cat([part.to(dtype) for part in (x, angles.sin(), angles.cos(), times)], dim=1))
        if self.label is not None:
            inner = inner + self.label(self._labels(x, conditions))
        if self.second_time is not None and second_time is not None:
            inner = inner + self.second_time(waves_from_zero(t - second_time, self.at).to(dtype))
        if self.guidance is not None and guidance is not None:
            inner = inner + self.guidance(guidance_waves(guidance, t).to(dtype))

        features: dict[str, Tensor] = {}
        h = F.silu(inner)
        for i, name in enumerate(self.tap_names):
            if i > 0:
                h = F.silu(self.hidden[i - 1](h))
            if name in taps:
                features[name] = h
                if stop and len(features) == len(set(taps)):
                    return Output(None, features)
        log_variance = None if self.log_variance is None else self.log_variance(times).squeeze(1)
        return Output(self.last(h).to(x.dtype), features, log_variance)
