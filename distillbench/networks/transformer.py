"""A small diffusion transformer for images, under class labels or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conditions import Conditions
from ..errors import UsageError
from .backbone import WITHOUT_ADAPTERS, Backbone, BackboneConfig, Output
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
class TransformerConfig(BackboneConfig):
    """channels, size: of the (square) images.  patch: side of a patch.  width: a multiple of 4 and of `heads`.

    mlp_ratio: hidden width of a block's MLP over `width`.  token_width: width of the condition's tokens, 0 without any.
    frequencies, highest_frequency: of the time features, in rad per unit of t.
    """

    channels: int = 1
    size: int = 28
    patch: int = 4
    width: int = 80
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    classes: int = 10
    token_width: int = 0
    frequencies: int = 32
    highest_frequency: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise UsageError(f"network config: images of side {self.size} cannot be cut into patches of side {self.patch}")
        if self.width % 4 or self.width % self.heads:
            raise UsageError(f"network config: width {self.width} is not a multiple of 4 and of the {self.heads} heads")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.size // self.patch


class Transformer(Backbone):
    """DiT (arXiv 2212.09748) with one modulation for all blocks plus a learned bias per block (PixArt-alpha, arXiv 2310.00426).

    Taps `block1`, `block2`, ...: the blocks' outputs as feature maps (width, h, w).
    """

    kind: ClassVar[str] = "transformer"
    config_type: ClassVar[type[BackboneConfig]] = TransformerConfig
    config: TransformerConfig
    at: Tensor
    positions: Tensor

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None):
        super().__init__(config)
        generator = generator_or_default(generator)
        width, features = config.width, 2 * config.frequencies
        pixels = config.channels * config.patch**2
        self.register_buffer("at", frequencies(config.frequencies, 1.0, config.highest_frequency), persistent=False)
        self.register_buffer("positions", grid_positions(config.grid, width), persistent=False)
        self.patches = linear(pixels, width, generator)
        self.time = linear(features, width, generator)
        self.time_out = linear(width, width, generator)
        self.label = embedding(config.classes + 1, width, generator, std=0.02) if config.classes else None
        self.tokens = linear(config.token_width, width, generator) if config.token_width else None
        self.modulation = zero_linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config, generator) for _ in range(config.depth))
        self.last_modulation = zero_linear(width, 2 * width)
        self.last = zero_linear(width, pixels)
        self.second_time = zero_linear(features, width, bias=False) if config.second_time else None
        self.guidance = zero_linear(GUIDANCE_FEATURES, width, bias=False) if config.guidance_input else None
        self.log_variance = zero_linear(features, 1) if config.log_variance else None
        if config.lora_rank:
            add_adapters(self, config.lora_rank, generator, alpha=config.lora_alpha or None, targets=config.lora_targets)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tuple(f"block{i + 1}" for i in range(self.config.depth))

    def tap_shape(self, name: str) -> tuple[int, ...]:
        self._check_tap(name)
        return (self.config.width, self.config.grid, self.config.grid)

    def resized(self, width: int, generator: torch.Generator | None = None) -> Self:
        """As `Backbone.resized`, with the largest number of heads, up to today's, that divides the new width."""
        heads = next(h for h in range(self.config.heads, 0, -1) if width % h == 0)
        return self._placed(type(self)(replace(self.config, width=width, heads=heads, **WITHOUT_ADAPTERS), generator))

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, *, second_time: Tensor | None = None,
                guidance: Tensor | float | None = None, taps: Sequence[str] = (), stop: bool = False) -> Output:  # fmt: skip
        self._check(second_time, guidance, taps, stop)
        dtype = self.patches.weight.dtype
        embedded = F.silu(self._embedded(x, t, conditions, second_time, guidance))
        shared = self.modulation(embedded)[:, None]
        tokens = None if self.tokens is None else self.tokens(conditions.field("tokens").to(x.device, dtype))
        h = self.patches(self._cut(x.to(dtype))) + self.positions

        features: dict[str, Tensor] = {}
        for name, block in zip(self.tap_names, self.blocks, strict=True):
            h = block(h, shared, tokens)
            if name in taps:
                features[name] = h.transpose(1, 2).reshape(len(x), *self.tap_shape(name))
                if stop and len(features) == len(set(taps)):
                    return Output(None, features)
        log_variance = None if self.log_variance is None else self.log_variance(waves(t, self.at).to(dtype)).squeeze(1)
        shift, scale = self.last_modulation(embedded)[:, None].chunk(2, dim=2)
        return Output(self._joined(self.last(modulated(h, shift, scale))).to(x.dtype), features, log_variance)

    def _embedded(self, x: Tensor, t: Tensor, conditions: Conditions, second_time: Tensor | None,
                  guidance: Tensor | float | None) -> Tensor:  # fmt: skip
        """The vector (n, width) of time, class and added inputs that modulates all blocks."""
        dtype = self.patches.weight.dtype
        inner = self.time(waves(t, self.at).to(dtype))
        if self.second_time is not None and second_time is not None:
            inner = inner + self.second_time(waves_from_zero(t - second_time, self.at).to(dtype))
        if self.guidance is not None and guidance is not None:
            inner = inner + self.guidance(guidance_waves(guidance, t).to(dtype))
        embedded = self.time_out(F.silu(inner))
        if self.label is not None:
            embedded = embedded + self.label(self._labels(x, conditions))
        return embedded

    def _cut(self, x: Tensor) -> Tensor:
        """Images (n, channels, size, size) as patches (n, grid^2, channels patch^2)."""
        c = self.config
        cells = x.reshape(len(x), c.channels, c.grid, c.patch, c.grid, c.patch)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(x), c.grid**2, c.channels * c.patch**2)

    def _joined(self, patches: Tensor) -> Tensor:
        """The inverse of `_cut`."""
        c = self.config
        cells = patches.reshape(len(patches), c.grid, c.grid, c.channels, c.patch, c.patch)
        return cells.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), c.channels, c.size, c.size)


class Block(nn.Module):
    """Self-attention, cross-attention to tokens where there are any, and an MLP; gates start closed."""

    def __init__(self, config: TransformerConfig, generator: torch.Generator):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.bias = nn.Parameter(torch.zeros(6 * width))
        self.qkv = linear(width, 3 * width, generator)
        self.attended = linear(width, width, generator)
        self.query = linear(width, width, generator) if config.token_width else None
        self.token_kv = linear(width, 2 * width, generator) if config.token_width else None
        self.token_out = zero_linear(width, width) if config.token_width else None
        self.up = linear(width, hidden, generator)
        self.down = linear(hidden, width, generator)

    def forward(self, h: Tensor, shared: Tensor, tokens: Tensor | None) -> Tensor:
        """h: (n, patches, width).  shared: (n, 1, 6 width).  tokens: (n, length, width)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (shared + self.bias).chunk(6, dim=2)
        h = h + gate * self.attended(attention(self.heads, *self.qkv(modulated(h, shift, scale)).chunk(3, dim=2)))
        if self.query is not None and self.token_kv is not None and self.token_out is not None and tokens is not None:
            h = h + self.token_out(attention(self.heads, self.query(normalised(h)), *self.token_kv(tokens).chunk(2, dim=2)))
        return h + mlp_gate * self.down(F.gelu(self.up(modulated(h, mlp_shift, mlp_scale))))


def attention(heads: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head attention of q (n, a, width) over k and v (n, b, width)."""
    split = [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v)]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def normalised(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6)


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, normalised(h), 1 + scale)


def grid_positions(grid: int, width: int) -> Tensor:
    """Fixed sinusoids (grid^2, width) of row and column, half of the width each."""
    at = frequencies(width // 4, 1.5, 1 / grid)  # rad per patch: from about four patches a period to well beyond the image
    line = waves(torch.arange(grid, dtype=torch.float32), at)
    rows = line[:, None].expand(grid, grid, -1)
    columns = line[None, :].expand(grid, grid, -1)
    return torch.cat((rows, columns), dim=2).reshape(grid**2, width)
