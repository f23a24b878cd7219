"""Layers whose initial weights come from an explicit generator, and sinusoidal features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def generator_or_default(generator: torch.Generator | None) -> torch.Generator:
    """The generator of initial weights: the given one, or a fresh one with seed 0."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def linear(inputs: int, outputs: int, generator: torch.Generator, *, gain: float = 1.0) -> nn.Linear:
    """A linear layer with Glorot-uniform weights and zero biases."""
    layer = zero_linear(inputs, outputs)
    bound = gain * math.sqrt(6 / (inputs + outputs))
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
    return layer


def zero_linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer that starts at zero: what it feeds starts as an exact no-op."""
    # Built without storage first: nn.Linear would otherwise draw from the global generator.
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device=torch.get_default_device())
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def embedding(entries: int, width: int, generator: torch.Generator, *, std: float) -> nn.Embedding:
    """A lookup table (entries, width) of normal numbers."""
    layer = nn.Embedding(entries, width, device="meta").to_empty(device=torch.get_default_device())
    with torch.no_grad():
        layer.weight.normal_(std=std, generator=generator)
    return layer


def frequencies(count: int, lowest: float, highest: float) -> Tensor:
    """`count` angular frequencies in geometric steps, float32."""
    return torch.logspace(math.log10(lowest), math.log10(highest), count, dtype=torch.float64).float()


def waves(values: Tensor, at: Tensor) -> Tensor:
    """Sines and cosines of values (n,) at angular frequencies (k,): (n, 2k)."""
    angles = values[:, None] * at
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def waves_from_zero(values: Tensor, at: Tensor) -> Tensor:
    """Like `waves`, with cosines lowered by 1, so that all features of the value 0 are exactly 0."""
    angles = values[:, None] * at
    return torch.cat((angles.sin(), angles.cos() - 1), dim=1)


GUIDANCE_FEATURES = 64


def guidance_waves(guidance: Tensor | float, like: Tensor) -> Tensor:
    """Features (n, 64) of the guidance scale as in latent consistency models (arXiv 2310.04378): sinusoids of 1000 w."""
    half = GUIDANCE_FEATURES // 2
    scale = torch.as_tensor(guidance, dtype=like.dtype, device=like.device).expand(len(like))
    return waves(1000 * scale, frequencies(half, 1e-4, 1.0).flip(0).to(like))
