"""The two autoencoders of `shapes`: an `AutoencoderKL` (4 x 8 x 8) and an `AutoencoderDC` (16 x 4 x 4), trained on rendered scenes.

Loss: |x' - x| + 4 (x' - x)^2 of pictures in [-1, 1]. In the place of a KL term, latents are kept near unit size by a small penalty and
get a little noise before they are decoded, so that close latents decode alike. Matrix products run in bfloat16, weights stay float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.shapes import draw_scenes, render
from ..metrics.shapes_checker import accuracies, attributes
from ..randomness import generator_for
from ..torchvision_repair import repair_torchvision

KINDS = ("kl", "dc")
STEPS = {"kl": 1800, "dc": 2800}
BATCH = 64
LEARNING_RATE = 3e-3
NOISE = 0.05  # added to latents in training
PENALTY = 1e-3  # on their mean square
TRAINING_PICTURES = 24_000
LAST_SHARE = 0.1  # of the steps, in which products are float32 too

KL_CONFIG: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (16, 48, 64), "layers_per_block": 1,
    "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "mid_block_add_attention": False, "sample_size": 32,
}  # fmt: skip
DC_CONFIG: dict[str, Any] = {
    "in_channels": 3, "latent_channels": 16, "encoder_block_types": ("ResBlock",) * 4, "decoder_block_types": ("ResBlock",) * 4,
    "encoder_block_out_channels": (16, 32, 64, 64), "decoder_block_out_channels": (16, 32, 64, 64),
    "encoder_layers_per_block": (1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1), "encoder_qkv_multiscales": ((), (), (), ()),
    "decoder_qkv_multiscales": ((), (), (), ()), "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
    "downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle",
}  # fmt: skip


def make_autoencoder(kind: str, seed: int = 0) -> Any:
    """An untrained autoencoder; its weights depend on the seed alone."""
    repair_torchvision()
    from diffusers import AutoencoderDC, AutoencoderKL

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return AutoencoderKL(**KL_CONFIG) if kind == "kl" else AutoencoderDC(**DC_CONFIG)


def latents_of(model: Any, pictures: Tensor) -> Tensor:
    """Unscaled latents of pictures (n, 3, 32, 32) in [-1, 1]: the mean, where the model has a distribution."""
    found = model.encode(pictures)
    return found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent


def train_autoencoder(kind: str, progress: Callable[[str], None], *, steps: int | None = None, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """An autoencoder with its scaling factor in its config, and what its card says; single thread for the same last digits."""
    steps = STEPS[kind] if steps is None else steps
    began = time.process_time()
    model = make_autoencoder(kind, seed)
    generator = generator_for(seed, f"shapes/{kind}", 0)
    pictures = render(draw_scenes(TRAINING_PICTURES, generator), generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    for step in range(steps):
        rate = min((step + 1) / 50, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        rows = torch.randint(len(pictures), (BATCH,), generator=generator)
        x = as_input(pictures[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=step < (1 - LAST_SHARE) * steps):
            z = latents_of(model, x).float()
            y = model.decode(z + NOISE * torch.randn(z.shape, generator=generator)).sample.float()
        loss = (y - x).abs().mean() + 4 * (y - x).square().mean() + PENALTY * z.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 199:
            progress(f"{kind} {step + 1}/{steps}, loss {loss.item():.4f}, whole {reconstruction(model, 200)['whole']:.3f}")
    model.requires_grad_(False).eval()
    with torch.no_grad():
        latents = torch.cat([latents_of(model, as_input(part)) for part in pictures[:2000].split(250)])
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    scores = {name: round(value, 4) for name, value in reconstruction(model, 2000).items()}
    return model, {"steps": steps, "seed": seed, "cpu_seconds": round(time.process_time() - began), "reconstruction": scores}


@torch.no_grad()
def reconstruction(model: Any, n: int) -> dict[str, float]:
    """What the checker reads in n held-out scenes after the autoencoder: the ceiling of whatever generates its latents."""
    generator = generator_for(1, "shapes/reconstruction", 0)
    scenes = draw_scenes(n, generator, held_out=True)
    pictures = render(scenes, generator)
    seen = torch.cat([as_pictures(model.decode(latents_of(model, as_input(part))).sample) for part in pictures.split(250)])
    return accuracies(attributes(seen, scenes))


def as_input(pictures: Tensor) -> Tensor:
    """uint8 pictures as numbers in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def as_pictures(x: Tensor) -> Tensor:
    """The inverse, clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
