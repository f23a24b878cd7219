"""The two teachers of `shapes`, trained here and shipped as diffusers pipelines.

`shapes-sd`: a StableDiffusionPipeline: AutoencoderKL, CLIP-format text encoder, U-Net with cross-attention, eps-prediction on Stable
Diffusion's noise levels. `shapes-sana`: a SanaPipeline: AutoencoderDC, Gemma-2-format text encoder, SanaTransformer2DModel, flow
matching with the time given as sigma in [0, 1] and normalised queries and keys, as SANA-Sprint (arXiv 2503.09641) needs them.
The autoencoder is trained first; then denoiser and text encoder are trained together, a tenth of the captions dropped for guidance.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..data.shapes import LEFT_OPEN, draw_captions, draw_scenes, render
from ..randomness import generator_for
from ..torchvision_repair import repair_torchvision
from .shapes_autoencoders import as_input, latents_of
from .shapes_text import WIDTH, clip_encoder, clip_tokenizer, embed, gemma_encoder, gemma_tokenizer, seeded, token_ids

CYCLES = {
    "shapes-sd": (7000, 7000, 7000, 8000, 5000),
    "shapes-sana": (8000, 9000, 6000, 9000, 5000),
}  # updates; each cycle starts from the last one's average, its rate anew
SHARES = {
    "shapes-sd": ((0.4, 0.35, 0.25), (0.15, 0.5, 0.35), (0.1, 0.75, 0.15), (0.2, 0.5, 0.3), (0.1, 0.75, 0.15)),
    "shapes-sana": ((0.4, 0.35, 0.25), (0.15, 0.5, 0.35), (0.1, 0.75, 0.15), (0.2, 0.5, 0.3), (0.15, 0.35, 0.5)),
}  # of the kinds of scene in a cycle: what a teacher learns last weighs most in its last
OPEN = (0.0, 0.0, 0.0, LEFT_OPEN, LEFT_OPEN)  # in a cycle: first captions that say everything, then the track's own
BATCH = 64
LEARNING_RATE = {"shapes-sd": 1.5e-3, "shapes-sana": 1.5e-3}
WARM_UP = 200
UNCONDITIONAL = 0.1  # share of captions that are dropped
TRAINING_PICTURES = 40_000
EMA = 0.998
UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (40, 56), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH, "attention_head_dim": 4,
}  # fmt: skip
TRANSFORMER: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "sample_size": 4, "patch_size": 1, "num_layers": 4, "num_attention_heads": 4,
    "attention_head_dim": 24, "num_cross_attention_heads": 4, "cross_attention_head_dim": 24, "cross_attention_dim": 96,
    "caption_channels": WIDTH, "mlp_ratio": 2.5, "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001,
}  # fmt: skip
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@dataclass
class Parts:
    """What a pipeline is made of. denoise(x, time, tokens, mask): the network's output; time is a timestep or a noise level."""

    autoencoder: Any
    tokenizer: Any
    encoder: Any
    network: Any
    kind: str

    def denoise(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        masked = {"encoder_attention_mask": mask} if self.kind == "shapes-sana" else {}
        return self.network(x, timestep=t, encoder_hidden_states=tokens, **masked).sample

    def trained(self) -> nn.ModuleList:
        return nn.ModuleList([self.network, self.encoder])


def untrained(kind: str, autoencoder: Any, seed: int) -> Parts:
    """Network and text encoder with initial weights from the seed."""
    repair_torchvision()
    from diffusers import SanaTransformer2DModel, UNet2DConditionModel

    if kind == "shapes-sd":
        tokenizer = clip_tokenizer()
        encoder, network = seeded(lambda: (clip_encoder(tokenizer), UNet2DConditionModel(**UNET)), seed)
    else:
        tokenizer = gemma_tokenizer()
        encoder, network = seeded(lambda: (gemma_encoder(tokenizer), SanaTransformer2DModel(**TRANSFORMER)), seed)
    return Parts(autoencoder, tokenizer, encoder, network, kind)


def noisy(kind: str, x: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A noised batch, its time as the network takes it, and what the network is to predict: the noise, or noise - x."""
    if kind == "shapes-sd":
        steps = torch.randint(BETAS["num_train_timesteps"], (len(x),), generator=generator)
        kept = alphas_cumprod()[steps].view(-1, 1, 1, 1)
        return kept.sqrt() * x + (1 - kept).sqrt() * noise, steps, noise
    level = torch.where(torch.rand(len(x), generator=generator) < 0.5, torch.rand(len(x), generator=generator),
                        torch.sigmoid(torch.randn(len(x), generator=generator)))  # fmt: skip
    s = level.view(-1, 1, 1, 1)
    return (1 - s) * x + s * noise, level, noise - x


@cache
def alphas_cumprod() -> Tensor:
    """Of Stable Diffusion's schedule, float32 as diffusers has them."""
    ends = BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5
    return (1 - torch.linspace(*ends, BETAS["num_train_timesteps"]) ** 2).cumprod(0)


def fit(parts: Parts, progress: Callable[[str], None], *, steps: int, seed: int = 0, cycle: int = 0) -> Parts:
    """The parts with averaged weights after one cycle of `steps` updates. Products run in bfloat16, but for the last tenth."""
    generator = generator_for(seed, f"{parts.kind}/training", cycle)
    x, ids, mask, empty = training_set(parts, generator, SHARES[parts.kind][cycle], OPEN[cycle])
    trained = parts.trained().requires_grad_(True).train()
    average = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE[parts.kind], betas=(0.9, 0.99), weight_decay=0.01)
    began, losses = time.monotonic(), 0.0
    for step in range(steps):
        warm = min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE[parts.kind] * warm
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < UNCONDITIONAL
        said = torch.where(dropped[:, None], empty[0], ids[rows])
        heard = torch.where(dropped[:, None], empty[1], mask[rows])
        x_t, t, target = noisy(parts.kind, x[rows], torch.randn(BATCH, *x.shape[1:], generator=generator), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 0.9 * steps):
            found = parts.denoise(x_t, t, embed(parts.encoder, said, heard), heard).float()
        loss = (found - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - min(EMA, step / (step + 10)))
        losses += loss.item()
        if step % 500 == 499:
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1) / 60
            progress(f"{parts.kind} {step + 1}/{steps}, loss {losses / 500:.4f}, about {left:.0f} minutes left")
            losses = 0.0
    network, encoder = average.eval().requires_grad_(False)
    return Parts(parts.autoencoder, parts.tokenizer, encoder, network, parts.kind)


@torch.no_grad()
def training_set(
    parts: Parts, generator: torch.Generator, shares: Sequence[float], left_open: float
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Scaled latents, token ids and masks of the training scenes, and ids and mask of the empty caption."""
    scenes = draw_scenes(TRAINING_PICTURES, generator, shares=shares, left_open=left_open)
    scale = parts.autoencoder.config.scaling_factor
    pictures = render(scenes, generator).split(250)
    x = torch.cat([scale * latents_of(parts.autoencoder, as_input(part)) for part in pictures])
    ids, mask = token_ids(parts.tokenizer, draw_captions(scenes, generator))
    none_ids, none_mask = token_ids(parts.tokenizer, [""])
    return x, ids, mask, (none_ids[0], none_mask[0])
