"""Discriminator heads on a network's features, one logit a sample or one a token, and the non-saturating and hinge GAN losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conditions import Conditions
from ..diffusion.denoiser import Denoiser
from ..errors import ContractError
from ..networks.layers import linear

LARGEST_GROUPS = 8
VIRTUAL_BATCH = 8  # samples that a token head normalises together
TOKEN_KERNEL = 9
SLOPE = 0.2  # of LeakyReLU below 0
FIRST_ROUNDS = 30  # of power iteration on fresh weights


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


def logits_by_depth(heads: nn.ModuleList, taps: Sequence[str], features: Mapping[str, Tensor]) -> Tensor:
    """What the heads, one for each tap, see in features that a network has shown already: (n, heads)."""
    return torch.stack([head(features[tap]) for head, tap in zip(heads, taps, strict=True)], dim=1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(fake) + mean softplus(-real), of logits; 2 ln 2 for a head that knows nothing."""
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """mean softplus(-fake): the non-saturating loss of what made the samples."""
    return F.softplus(-fake).mean()


# ---------------------------------------------------------------- heads on tokens, at several depths


class Spectral(nn.Module):
    """A circular convolution over tokens, (n, inputs, m) -> (n, outputs, m), whose weight is divided by its largest singular value.

    The vectors u and v of that value follow the weights only when `refresh` is called, one round of power iteration each: a forward
    pass changes nothing, so it can be repeated. `kernel` is odd and at most m.
    """

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, generator: torch.Generator):
        super().__init__()
        bound = math.sqrt(6 / (inputs * kernel))
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("u", torch.empty(outputs).normal_(generator=generator))
        self.register_buffer("v", torch.zeros(inputs * kernel))
        self.refresh(FIRST_ROUNDS)

    @torch.no_grad()
    def refresh(self, rounds: int = 1) -> None:
        """`rounds` rounds of power iteration from where the vectors are."""
        weight = self.weight.flatten(1)
        for _ in range(rounds):
            self.v.copy_(F.normalize(weight.T @ self.u, dim=0))
            self.u.copy_(F.normalize(weight @ self.v, dim=0))

    def normalised(self) -> Tensor:
        """The weight over its largest singular value, through which the gradient passes too."""
        return self.weight / (self.u @ (self.weight.flatten(1) @ self.v))

    def forward(self, x: Tensor) -> Tensor:
        side = self.weight.shape[2] // 2
        return F.conv1d(F.pad(x, (side, side), mode="circular") if side else x, self.normalised().to(x), self.bias.to(x))


class VirtualBatchNorm(nn.Module):
    """Normalises channels of (n, channels, m) over tokens and groups of 8 neighbours in the batch (fewer where 8 does not divide n)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        size = next(k for k in range(min(VIRTUAL_BATCH, n), 0, -1) if n % k == 0)
        groups = x.view(n // size, size, *x.shape[1:])
        variance, mean = torch.var_mean(groups, dim=(1, 3), correction=0, keepdim=True)
        return ((groups - mean) / (variance + 1e-5).sqrt()).view_as(x) * self.weight + self.bias


class TokenHead(nn.Module):
    """Features (n, channels, h, w) or (n, channels) -> a logit for each of their tokens, (n, h w) or (n, 1).

    As in SANA-Sprint (arXiv 2503.09641) and StyleGAN-T before it: 1x1 convolution, norm, LeakyReLU; a residual block of the same with
    a circular kernel of 9 along the tokens; 1x1 convolution; all spectrally normalised. `width`: of the two inner layers. Vectors get
    no norm: over a single token it would leave of a sample only how it differs from its seven neighbours.
    """

    def __init__(self, shape: Sequence[int], width: int, generator: torch.Generator):
        super().__init__()
        if len(shape) not in (1, 3):
            raise ContractError(f"a critic reads features of shape (width,) or (channels, height, width), not {tuple(shape)}")
        tokens = math.prod(shape[1:])
        self.first = Spectral(shape[0], width, 1, generator)
        self.inner = Spectral(width, width, min(TOKEN_KERNEL, tokens - 1 + tokens % 2), generator)
        self.last = Spectral(width, 1, 1, generator)
        self.norms = nn.ModuleList(VirtualBatchNorm(width) if tokens > 1 else nn.Identity() for _ in range(2))

    def forward(self, features: Tensor) -> Tensor:
        h = features.unsqueeze(2).flatten(2)
        h = F.leaky_relu(self.norms[0](self.first(h)), SLOPE)
        h = (h + F.leaky_relu(self.norms[1](self.inner(h)), SLOPE)) / math.sqrt(2)
        return self.last(h).squeeze(1)


def refresh_spectral(heads: nn.Module) -> None:
    """One round of power iteration in every `Spectral` layer of these heads."""
    for layer in heads.modules():
        if isinstance(layer, Spectral):
            layer.refresh()


def spread_taps(names: Sequence[str], count: int = 4) -> tuple[str, ...]:
    """At most `count` taps from early to the last: blocks 2, 8, 14, 19 of 20 (counted from 0) for four, as in SANA-Sprint."""
    shares = [1.0] if count == 1 else [0.15 + 0.85 * k / (count - 1) for k in range(count)]
    places = {max(0, math.ceil(share * len(names) - 1e-9) - 1) for share in shares}
    return tuple(names[place] for place in sorted(places))


def token_logits(denoiser: Denoiser, heads: nn.ModuleList, taps: Sequence[str], x_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """What the heads, one for each tap, see in x_t (n, *shape) at path times t (n,): (n, tokens of all heads)."""
    features = denoiser.features(x_t, t, conditions, taps)
    return torch.cat([head(features[tap]) for head, tap in zip(heads, taps, strict=True)], dim=1)


def hinge_discriminator_loss(real: Tensor, fake: Tensor, counts: Tensor | None = None) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2, of logits (n, ...); 1 for a head that knows nothing.

    counts (n,): how much each row of `fake` weighs in its mean, 1 unless given.
    """
    rows = F.relu(1 + fake).reshape(len(fake), -1).mean(1)
    weight = torch.ones_like(rows) if counts is None else counts.to(rows)
    return (F.relu(1 - real).mean() + (weight * rows).sum() / weight.sum()) / 2


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """-mean of the logits: the hinge loss of what made the samples."""
    return -fake.mean()
