"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W x + B A x with B = 0 at first and W frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A linear layer whose weight (out, in) and bias are buffers, so that no optimiser can reach them, plus an adapter.

    `down` (rank, in) starts random and `up` (out, rank) starts at zero: the layer begins as an exact no-op on its base.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        weight = base.weight.detach()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", None if base.bias is None else base.bias.detach().clone())
        bound = base.in_features**-0.5
        self.down = nn.Parameter(weight.new_empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)

    def merge(self) -> Tensor:
        """The weight (out, in) of the plain linear layer that computes the same."""
        return self.weight + (self.up @ self.down).detach()


def add_adapters(network: nn.Module, rank: int, generator: torch.Generator) -> None:
    """Wrap every linear layer of `network`, in place, and turn all its other parameters into buffers.

    State dict keys of the base stay as they were.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, rank, generator))
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
