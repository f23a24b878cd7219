"""Networks of diffusers pipelines behind the backbone interface: `unet2d`, `unet2d_condition` (SD, SDXL) and `sana`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..conditions import Conditions
from ..errors import UsageError
from .diffusers_base import DiffusersBackbone, DiffusersConfig
from .layers import GUIDANCE_FEATURES


class UNet2D(DiffusersBackbone):
    """`UNet2DModel`. Class labels where it has them; the last row of its table then stands for "no class".

    Taps `down1`, ..., `mid`, `up1`, ...: the blocks' outputs.
    """

    kind: ClassVar[str] = "unet2d"
    model_class: ClassVar[str] = "UNet2DModel"
    capabilities: ClassVar[frozenset[str]] = frozenset({"log variance", "taps", "lora", "jvp"})

    @classmethod
    def _classes(cls, model: Mapping[str, Any]) -> int:
        return max(0, (model.get("num_class_embeds") or 0) - 1)

    def _refuse(self, config: DiffusersConfig) -> None:
        super()._refuse(config)
        _refuse_unless(config.model, self.kind, {"time_embedding_type": ("positional",), "class_embed_type": (None,)})

    def _tap_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {f"down{i}": block for i, block in enumerate(self.model.down_blocks, start=1)}
        if self.model.mid_block is not None:
            modules["mid"] = self.model.mid_block
        return modules | {f"up{i}": block for i, block in enumerate(self.model.up_blocks, start=1)}

    def tap_shape(self, name: str) -> tuple[int, ...]:
        self._check_tap(name)
        c = self.model.config
        channels, sides = list(c["block_out_channels"]), [_pair(c["sample_size"])]
        for _ in channels[1:]:  # every block but the last halves the sides
            sides.append((_halved(sides[-1][0], c["downsample_padding"]), _halved(sides[-1][1], c["downsample_padding"])))
        if name == "mid":
            return (channels[-1], *sides[-1])
        i = int(name.lstrip("downup")) - 1
        if name.startswith("down"):
            return (channels[i], *sides[min(i + 1, len(channels) - 1)])
        return (channels[-1 - i], *sides[max(len(channels) - 2 - i, 0)])

    def _run(self, x: Tensor, timestep: Tensor, conditions: Conditions, guidance: Tensor | None) -> Tensor:
        labels = self._labels(x, conditions) if self.model.class_embedding is not None else None
        return self.model(x, timestep, class_labels=labels, return_dict=False)[0]


class UNet2DCondition(UNet2D):
    """`UNet2DConditionModel` on the field `tokens`, and for SDXL on `text_embeds` and `time_ids`; as in diffusers no mask is looked at.

    The guidance scale w enters as in latent consistency models (arXiv 2310.04378): sinusoids of 1000 (w - 1) through `time_cond_proj`.
    """

    kind: ClassVar[str] = "unet2d_condition"
    model_class: ClassVar[str] = "UNet2DConditionModel"
    capabilities: ClassVar[frozenset[str]] = UNet2D.capabilities | {"guidance input"}

    @classmethod
    def _classes(cls, model: Mapping[str, Any]) -> int:
        return 0

    @classmethod
    def _takes_guidance(cls, model: Mapping[str, Any]) -> bool:
        return model.get("time_cond_proj_dim") is not None

    def _refuse(self, config: DiffusersConfig) -> None:
        DiffusersBackbone._refuse(self, config)
        allowed = {"time_embedding_type": ("positional",), "class_embed_type": (None,), "num_class_embeds": (None,),
                   "addition_embed_type": (None, "text_time"), "encoder_hid_dim_type": (None,)}  # fmt: skip
        _refuse_unless(config.model, self.kind, allowed)

    def _guided_model(self) -> dict[str, Any]:
        return {"time_cond_proj_dim": GUIDANCE_FEATURES}

    def _close_guidance(self) -> None:
        nn.init.zeros_(self.model.time_embedding.cond_proj.weight)

    def _run(self, x: Tensor, timestep: Tensor, conditions: Conditions, guidance: Tensor | None) -> Tensor:
        added = None
        if self.model.config["addition_embed_type"] == "text_time":
            added = {name: conditions.field(name).to(x.device, x.dtype) for name in ("text_embeds", "time_ids")}
        strength = None if guidance is None else lcm_features(guidance, self.model.config["time_cond_proj_dim"]).to(x.dtype)
        tokens = conditions.field("tokens").to(x.device, x.dtype)
        return self.model(x, timestep, encoder_hidden_states=tokens, timestep_cond=strength, added_cond_kwargs=added, return_dict=False)[0]


class Sana(DiffusersBackbone):
    """`SanaTransformer2DModel` on the fields `tokens` and `mask`.

    Taps `block1`, `block2`, ...: the blocks' outputs as maps (width, h, w). The guidance scale, times `guidance_embeds_scale`, enters by
    `guidance_embeds` as in SANA-Sprint (arXiv 2503.09641); None leaves that embedding out.
    """

    kind: ClassVar[str] = "sana"
    model_class: ClassVar[str] = "SanaTransformer2DModel"
    capabilities: ClassVar[frozenset[str]] = frozenset({"guidance input", "log variance", "taps", "lora", "jvp"})

    @classmethod
    def from_model(cls, model: Any, *, timestep_scale: float | None = None, discrete: bool = False) -> Self:
        """As in the other kinds; timestep_scale None: 1000 times the one that the model's config states."""
        if timestep_scale is None and hasattr(model, "config"):
            timestep_scale = 1000.0 * model.config.get("timestep_scale", 1.0)
        return super().from_model(model, timestep_scale=timestep_scale or 1000.0, discrete=discrete)

    @classmethod
    def _takes_guidance(cls, model: Mapping[str, Any]) -> bool:
        return bool(model.get("guidance_embeds"))

    def _width(self) -> int:
        return int(self.model.config["num_attention_heads"] * self.model.config["attention_head_dim"])

    def _time_width(self) -> int:
        return self._width()

    def _guided_model(self) -> dict[str, Any]:
        return {"guidance_embeds": True}

    def _close_guidance(self) -> None:
        nn.init.zeros_(self.model.time_embed.guidance_embedder.linear_2.weight)
        nn.init.zeros_(self.model.time_embed.guidance_embedder.linear_2.bias)

    def _sources(self, key: str) -> tuple[str, ...]:
        # With guidance the time embedder lies one level higher.
        moved = key.replace("model.time_embed.timestep_embedder.", "model.time_embed.emb.timestep_embedder.")
        return (*super()._sources(moved), *super()._sources(key))

    def _time_module(self) -> nn.Module:
        return self.model.time_embed

    def _tap_modules(self) -> dict[str, nn.Module]:
        return {f"block{i}": block for i, block in enumerate(self.model.transformer_blocks, start=1)}

    def tap_shape(self, name: str) -> tuple[int, ...]:
        self._check_tap(name)
        c = self.model.config
        return (self._width(), *(side // c["patch_size"] for side in _pair(c["sample_size"])))

    def _as_map(self, name: str, h: Tensor) -> Tensor:
        return h.transpose(1, 2).reshape(len(h), *self.tap_shape(name))

    def _run(self, x: Tensor, timestep: Tensor, conditions: Conditions, guidance: Tensor | None) -> Tensor:
        tokens = conditions.field("tokens").to(x.device, x.dtype)
        mask = conditions.field("mask").to(x.device) if "mask" in conditions else None
        options: dict[str, Any] = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "return_dict": False}
        if not self.config.guidance_input:
            return self.model(x, timestep=timestep, **options)[0]
        if guidance is not None:
            return self.model(x, timestep=timestep, guidance=guidance * self.model.config["guidance_embeds_scale"], **options)[0]
        embedder = self.model.time_embed.guidance_embedder
        handle = embedder.register_forward_hook(lambda _module, _inputs, out: torch.zeros_like(out))
        try:
            return self.model(x, timestep=timestep, guidance=torch.zeros_like(timestep), **options)[0]
        finally:
            handle.remove()


def lcm_features(guidance: Tensor, width: int) -> Tensor:
    """What latent consistency pipelines feed for the guidance scales w (n,): sines, then cosines of 1000 (w - 1): (n, width)."""
    half = width // 2
    at = torch.exp(torch.arange(half, dtype=guidance.dtype, device=guidance.device) * (-math.log(10000.0) / (half - 1)))
    angles = (guidance - 1)[:, None] * 1000.0 * at
    return nn.functional.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, width % 2))


def _refuse_unless(model: Mapping[str, Any], kind: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in allowed.items():
        if model.get(name, values[0]) not in values:
            raise UsageError(f"a {kind} network with {name} {model[name]!r} is not supported")
    if model.get("in_channels", 4) != model.get("out_channels", 4):
        raise UsageError(f"a {kind} network that takes {model['in_channels']} channels and gives {model['out_channels']} is not supported")


def _pair(sample_size: Any) -> tuple[int, int]:
    if sample_size is None:
        raise UsageError("the model's config states no sample_size, so the size of its features is not known")
    return (sample_size, sample_size) if isinstance(sample_size, int) else (int(sample_size[0]), int(sample_size[1]))


def _halved(side: int, padding: int) -> int:
    """One side after a 3x3 convolution of stride 2; without padding diffusers pads one row at the far end."""
    return (side + (2 * padding or 1) - 3) // 2 + 1
