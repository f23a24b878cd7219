"""Discriminator heads on a network's features, and the non-saturating GAN losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conditions import Conditions
from ..diffusion.denoiser import Denoiser
from ..errors import ContractError
from ..networks.layers import linear

LARGEST_GROUPS = 8


class VectorHead(nn.Module):
    """Features (n, width) -> logits (n,): one hidden layer of a quarter of the width, so that it costs less than what it reads."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        hidden = max(16, width // 4)
        self.inner = linear(width, hidden, generator, gain=math.sqrt(2))
        self.last = linear(hidden, 1, generator)

    def forward(self, features: Tensor) -> Tensor:
        return self.last(F.silu(self.inner(features))).squeeze(1)


class MapHead(nn.Module):
    """Features (n, channels, height, width) -> logits (n,).

    As in DMD2: 4x4 convolutions of stride 2 down to a map of at most 4x4, one convolution over what is left, each with
    GroupNorm and SiLU, and a 1x1 convolution to a number.
    """

    def __init__(self, channels: int, height: int, width: int, generator: torch.Generator):
        super().__init__()
        layers: list[nn.Module] = []
        while max(height, width) > 4:
            rows, columns = min(4, height + 2), min(4, width + 2)  # a side that has shrunk to 1 is padded to 3
            layers += _normed(conv(channels, channels, (rows, columns), 2, 1, generator), channels)
            height, width = (height + 2 - rows) // 2 + 1, (width + 2 - columns) // 2 + 1
        layers += _normed(conv(channels, channels, (height, width), 1, 0, generator), channels)
        self.layers = nn.Sequential(*layers, conv(channels, 1, (1, 1), 1, 0, generator))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).flatten()


def _normed(layer: nn.Conv2d, channels: int) -> list[nn.Module]:
    # A group of one channel on a 1x1 map would be normalised to nothing.
    groups = next(g for g in range(min(LARGEST_GROUPS, max(1, channels // 2)), 0, -1) if channels % g == 0)
    return [layer, nn.GroupNorm(groups, channels), nn.SiLU()]


def conv(inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padding: int, generator: torch.Generator) -> nn.Conv2d:
    """A convolution with He-uniform weights and zero biases, drawn from `generator`."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, device="meta").to_empty(device=torch.get_default_device())
    bound = math.sqrt(6 / (inputs * math.prod(kernel)))
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def make_head(shape: tuple[int, ...], generator: torch.Generator) -> nn.Module:
    """A head for features of this shape (without the batch): vectors (width,) or maps (channels, height, width)."""
    if len(shape) == 1:
        return VectorHead(shape[0], generator)
    if len(shape) == 3:
        return MapHead(*shape, generator)
    raise ContractError(f"a critic reads features of shape (width,) or (channels, height, width), not {shape}")


def middle_tap(denoiser: Denoiser) -> str:
    """The tap half way through the network, its bottleneck if it has one."""
    names = denoiser.network.tap_names
    return names[len(names) // 2]


def logits(denoiser: Denoiser, head: nn.Module, tap: str, x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """What the head sees in x_t (n, *shape) at times t (n,) through the network's features at `tap`: (n,)."""
    return head(denoiser.features(x_t, t, conditions, (tap,))[tap])


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(fake) + mean softplus(-real), of logits; 2 ln 2 for a head that knows nothing."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """mean softplus(-fake): the non-saturating loss of what made the samples."""
    return F.softplus(-fake).mean()
