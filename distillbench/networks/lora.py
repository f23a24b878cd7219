"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x with B = 0 at first and W frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError


class LoRALinear(nn.Module):
    """A linear layer whose weight (out, in) and bias are buffers, so that no optimiser can reach them, plus an adapter.

    `down` (rank, in) starts random and `up` (out, rank) starts at zero: the layer begins as an exact no-op on its base.
    alpha: the adapter is scaled by alpha / rank; None: by 1.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator, *, alpha: float | None = None):
        super().__init__()
        self.scaling = 1.0 if alpha is None else alpha / rank
        weight = base.weight.detach()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", None if base.bias is None else base.bias.detach().clone())
        bound = base.in_features**-0.5
        self.down = nn.Parameter(weight.new_empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.down)
        if self.scaling != 1.0:
            inner = self.scaling * inner
        return F.linear(x, self.weight, self.bias) + F.linear(inner, self.up)

    def merge(self) -> Tensor:
        """The weight (out, in) of the plain linear layer that computes the same."""
        return self.weight + self.scaling * (self.up @ self.down).detach()


def linear_layers(network: nn.Module, targets: tuple[str, ...] = ()) -> list[str]:
    """Dotted names of the linear layers that end in one of `targets` (whole parts: "q" is not the end of "a.to_q"); without any, all."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if not targets or any(f".{name}".endswith(f".{target}") for target in targets)]


def add_adapters(network: nn.Module, rank: int, generator: torch.Generator, *, alpha: float | None = None,
                 targets: tuple[str, ...] = ()) -> None:  # fmt: skip
    """Wrap the linear layers named by `targets` (empty: all) of `network`, in place, and turn all other parameters into buffers.

    State dict keys of the base stay as they were. Raises UsageError where no linear layer has such a name.
    """
    chosen = set(linear_layers(network, targets))
    if not chosen:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(network)})
        raise UsageError(f"no linear layer is named {' or '.join(targets)}; names here: {', '.join(known) or 'none'}")
    for path, module in list(network.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and (f"{path}.{name}" if path else name) in chosen:
                setattr(module, name, LoRALinear(child, rank, generator, alpha=alpha))
    for module in network.modules():
        if not isinstance(module, LoRALinear):
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def merge_adapters(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain network that computes the same as this one."""
    state = dict(network.state_dict())
    for path, module in network.named_modules():
        if isinstance(module, LoRALinear):
            prefix = f"{path}." if path else ""
            state[f"{prefix}weight"] = module.merge()
            del state[f"{prefix}down"], state[f"{prefix}up"]
    return state
