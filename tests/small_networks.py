"""One small network of each of our own families, with inputs for it."""

from __future__ import annotations

import torch

from distillbench.conditions import Conditions
from distillbench.networks import Backbone

CONFIGS = {
    "mlp": {"kind": "mlp", "dimension": 3, "width": 24, "depth": 3, "classes": 5},
    "transformer": {"kind": "transformer", "channels": 2, "size": 8, "patch": 4, "width": 24, "depth": 3, "heads": 2, "classes": 5},
    "tokens": {"kind": "transformer", "size": 8, "patch": 2, "width": 16, "depth": 2, "heads": 2, "classes": 0, "token_width": 6},
}
SHAPES = {"mlp": (3,), "transformer": (2, 8, 8), "tokens": (1, 8, 8)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(network: Backbone, seed: int = 1, std: float = 0.2) -> Backbone:
    """Noise on all parameters: zero-initialised gates and outputs would hide what lies behind them."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(name: str, n: int = 6, dtype: torch.dtype = torch.float32):
    generator = seeded(2)
    x = torch.randn(n, *SHAPES[name], generator=generator, dtype=dtype)
    t = torch.rand(n, generator=generator, dtype=dtype)
    if name == "tokens":
        return x, t, Conditions({"tokens": torch.randn(n, 4, 6, generator=generator, dtype=dtype)}, {"tokens": 0.0})
    return x, t, Conditions({"label": torch.arange(n) % 5}, {"label": 5})
