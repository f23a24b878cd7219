"""A guidance input fixed at one value, or left out: what it adds is the same for every sample, so a bias takes it up exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..networks.diffusers import Sana, UNet2DCondition, lcm_features
from ..networks.diffusers_base import DiffusersBackbone


@torch.no_grad()
def without_guidance(network: DiffusersBackbone, guidance: float | None) -> DiffusersBackbone:
    """The network without its guidance input, computing what it computes at `guidance` (None: with the input left out)."""
    if network.config.lora_rank:
        network = network.merged()
    if isinstance(network, Sana):
        changes: dict[str, Any] = {"guidance_embeds": False}
    elif isinstance(network, UNet2DCondition):
        changes = {"time_cond_proj_dim": None}
    else:
        raise UsageError(f"a {network.kind} network has no guidance input")
    plain = type(network)(replace(network.config, guidance_input=False, model={**network.config.model, **changes}))
    state = network.state_dict()
    reference = next(iter(state.values()))
    plain.to(reference.device, reference.dtype)
    for key, value in plain.state_dict().items():
        value.copy_(state[key.replace("time_embed.emb.timestep_embedder", "time_embed.timestep_embedder")])
    if guidance is not None:
        scale = torch.full((1,), float(guidance), dtype=torch.promote_types(reference.dtype, torch.float32), device=reference.device)
        _add(plain, network, scale)
    return plain.train(network.training)


def _add(plain: Any, network: Any, scale: Tensor) -> None:
    """Add what the input contributes at this scale to the bias that it meets."""
    if isinstance(network, Sana):
        old, dtype = network.model.time_embed, network.dtype
        features = old.guidance_condition_proj(scale * network.model.config["guidance_embeds_scale"]).to(dtype)
        plain.model.time_embed.emb.timestep_embedder.linear_2.bias += old.guidance_embedder(features)[0]
        return
    embedding = network.model.time_embedding
    features = lcm_features(scale, network.model.config["time_cond_proj_dim"]).to(network.dtype)
    plain.model.time_embedding.linear_1.bias += embedding.linear_1.weight @ embedding.cond_proj(features)[0]
