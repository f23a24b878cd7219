"""Networks behind one interface: `build` makes one from its config, `load_network` from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch

from ..errors import UsageError, unknown
from .backbone import Backbone, Output
from .diffusers import Sana, UNet2D, UNet2DCondition
from .files import load_network, save_network
from .mlp import MLP, MLPConfig
from .transformer import Transformer, TransformerConfig

__all__ = ["KINDS", "MLP", "Backbone", "MLPConfig", "Output", "Transformer", "TransformerConfig", "build", "load_network", "save_network"]

# The kinds of diffusers import that package only when one is built.
KINDS: dict[str, type[Backbone]] = {kind.kind: kind for kind in (MLP, Transformer, UNet2D, UNet2DCondition, Sana)}


def build(config: Mapping[str, Any], generator: torch.Generator | None = None) -> Backbone:
    """The network that `config` describes: `kind` and that family's fields (those left out take their defaults).

    Initial weights come from `generator` (default: seed 0). Raises UsageError on an unknown kind or field.
    """
    values = dict(config)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown("network kind", str(kind), KINDS)
    config_type = KINDS[kind].config_type
    known = [item.name for item in fields(config_type)]
    for name in values:
        if name not in known:
            raise unknown(f"field of the {kind} config", str(name), known)
    for item in fields(config_type):
        if item.default is MISSING and item.name not in values:
            raise UsageError(f"the {kind} config needs {item.name}")
    return KINDS[kind](config_type(**values), generator)
