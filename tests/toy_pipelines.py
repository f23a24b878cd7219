"""Tiny random pipelines of every class the adapter knows, saved as diffusers saves them: toy_sd(folder), toy_sdxl, toy_sana, toy_ddpm.

8x8 latents of 16x16 pixels (32x32 for SANA, whose pipeline wants multiples of 32), 16x16 pixels without latents for DDPM,
vocabularies of single characters, everything drawn from a seed.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from distillbench.networks.diffusers_tools import import_diffusers

CLIP_LENGTH = 12
LATENT = 8
CROSS = 16
CLIP = {"vocab_size": 96, "hidden_size": CROSS, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": CLIP_LENGTH, "projection_dim": CROSS, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1}  # fmt: skip
UNET = {"sample_size": LATENT, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": CROSS}  # fmt: skip
SANA = {"sample_size": LATENT, "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": CROSS}  # fmt: skip
DDPM = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer(length: int = CLIP_LENGTH) -> Any:
    """A CLIP tokenizer of single characters; `length` tokens with its two ends."""
    import_diffusers()
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + ",."
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, [], model_max_length=length)


def gemma_tokenizer() -> Any:
    """A Gemma tokenizer of single characters."""
    import_diffusers()
    from transformers import GemmaTokenizer

    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters, *string.digits, *",.\n'\"-:>"]
    tokenizer = GemmaTokenizer({token: i for i, token in enumerate(vocabulary)}, [], padding_side="right", model_max_length=512)
    tokenizer.add_bos_token = True
    return tokenizer


def autoencoder_kl(channels: int = 4, blocks: int = 2) -> Any:
    return import_diffusers().AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8,) * blocks, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, layers_per_block=1,
        scaling_factor=0.5,
    )  # fmt: skip


def autoencoder_dc(channels: int = 4) -> Any:
    return import_diffusers().AutoencoderDC(
        in_channels=3, latent_channels=channels, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, encoder_layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3, encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3,
        upsample_block_type="interpolate", downsample_block_type="Conv", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.4,
    )  # fmt: skip


def _seeded(seed: int) -> None:
    torch.manual_seed(seed)


def toy_sd(folder: Path, seed: int = 0, scheduler: Any = None, **unet: Any) -> Path:
    """A StableDiffusionPipeline: epsilon, DDIM; `unet` changes the U-Net's config."""
    diffusers = import_diffusers()
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        _seeded(seed)
        scheduler = scheduler or diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=autoencoder_kl(), text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)).eval(), tokenizer=clip_tokenizer(),
            unet=diffusers.UNet2DConditionModel(**{**UNET, **unet}), scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        pipeline.save_pretrained(folder)
    return Path(folder)


def toy_sdxl(folder: Path, seed: int = 0, scheduler: Any = None) -> Path:
    """A StableDiffusionXLPipeline: epsilon, Euler; two text encoders, pooled embeddings and time ids."""
    diffusers = import_diffusers()
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        _seeded(seed)
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": CROSS + 48}
        unet = diffusers.UNet2DConditionModel(**{**UNET, "cross_attention_dim": 2 * CROSS, **added})
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=autoencoder_kl(), text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)).eval(), tokenizer=clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)).eval(), tokenizer_2=clip_tokenizer(), unet=unet,
            scheduler=scheduler or diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
            add_watermarker=False,
        )  # fmt: skip
        pipeline.save_pretrained(folder)
    return Path(folder)


def toy_sana(folder: Path, seed: int = 0, scheduler: Any = None, **transformer: Any) -> Path:
    """A SanaPipeline: flow matching with shift 3, Euler; `transformer` changes the network's config."""
    diffusers = import_diffusers()
    from transformers import Gemma2Config, Gemma2Model

    with torch.random.fork_rng(devices=[]):
        _seeded(seed)
        gemma = Gemma2Config(vocab_size=96, hidden_size=CROSS, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, head_dim=8, max_position_embeddings=4096, pad_token_id=0, eos_token_id=1,
                             bos_token_id=2)  # fmt: skip
        pipeline = diffusers.SanaPipeline(
            tokenizer=gemma_tokenizer(), text_encoder=Gemma2Model(gemma).eval(), vae=autoencoder_dc(),
            transformer=diffusers.SanaTransformer2DModel(**{**SANA, **transformer}),
            scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )  # fmt: skip
        pipeline.save_pretrained(folder)
    return Path(folder)


def toy_ddpm(folder: Path, seed: int = 0, scheduler: Any = None, **unet: Any) -> Path:
    """A DDPMPipeline: a pixel U-Net, epsilon, linear betas; `unet` changes its config."""
    diffusers = import_diffusers()
    with torch.random.fork_rng(devices=[]):
        _seeded(seed)
        scheduler = scheduler or diffusers.DDPMScheduler(clip_sample=False)
        diffusers.DDPMPipeline(unet=diffusers.UNet2DModel(**{**DDPM, **unet}), scheduler=scheduler).save_pretrained(folder)
    return Path(folder)
