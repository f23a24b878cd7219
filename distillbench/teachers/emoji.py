"""`distillbench zoo train emoji --data PATH`: a Stable-Diffusion-format pipeline for emoji, 64x64, made for one core.

Autoencoder, U-Net and text encoder are those of `shapes-sd`, wider and on 16 x 8 x 8 latents; the autoencoder is trained first, then U-Net
and text encoder together, a tenth of the captions dropped for guidance. Held-out drawings are never seen. Runs on a GPU where there is one.
"""

from __future__ import annotations

import copy
import json
import math
import re
import string
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.emoji import EmojiSet, load_emoji
from ..metrics.arrays import as_float64
from ..metrics.categories import CategoryReader
from ..metrics.extractors import embedded_extractor, to_uint8
from ..metrics.frechet import frechet_distance
from ..randomness import generator_for
from ..torchvision_repair import repair_torchvision
from .cards import CARD
from .diffusers import DiffusersTeacher, open_pipeline
from .shapes import EMA, UNCONDITIONAL, UNET, WARM_UP, Parts, noisy
from .shapes_autoencoders import KL_CONFIG, NOISE, PENALTY, as_input, latents_of
from .shapes_pipelines import EVALUATED, EVALUATION_SEED, pipeline_sha256, sampled, write_pipeline
from .shapes_text import LENGTH, clip_encoder, embed, seeded, token_ids

STEPS = {"autoencoder": 3600, "denoiser": 6000}
BATCH = {"autoencoder": 32, "denoiser": 64}
LEARNING_RATE = {"autoencoder": 2e-3, "denoiser": 1e-3}
GUIDANCE = 2.0
AUTOENCODER: dict[str, Any] = KL_CONFIG | {
    "sample_size": 64, "latent_channels": 16, "block_out_channels": (16, 32, 64, 96), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
NETWORK: dict[str, Any] = UNET | {"sample_size": 8, "in_channels": 16, "out_channels": 16, "block_out_channels": (80, 112)}

NOTHING: Mapping[str, Any] = {}

Loss = Callable[[Tensor], Tensor]  # of the numbers of a batch's drawings


def train(folder: Path, progress: Callable[[str], None], *, data: Path, steps: Mapping[str, int] = STEPS, batch: Mapping[str, int] = BATCH,
          seed: int = 0, autoencoder: Mapping[str, Any] = NOTHING, network: Mapping[str, Any] = NOTHING) -> dict[str, Any]:  # fmt: skip
    """Make the pipeline in `folder`; returns its card. data: as `load_emoji` takes it.  autoencoder, network: changes of the widths.

    One thread on a processor: threads change the last digits.
    """
    drawings = load_emoji(data)
    known, device = drawings.split(held_out=False), "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        vae = fit_autoencoder(known, progress, steps=steps["autoencoder"], seed=seed, batch=batch["autoencoder"], device=device,
                              **autoencoder)  # fmt: skip
        between = time.process_time()
        parts = fit_denoiser(vae, known, progress, steps=steps["denoiser"], seed=seed, batch=batch["denoiser"], device=device, **network)
        seconds = {"autoencoder": round(between - began), "denoiser": round(time.process_time() - between)}
        cost = {name: {"steps": steps[name], "batch": batch[name], "cpu_seconds": seconds[name]} for name in STEPS}
        return finish(parts, drawings, folder, {**cost, "seed": seed, "device": device, "threads": 1}, progress)
    finally:
        torch.set_num_threads(threads)


def finish(parts: Parts, drawings: EmojiSet, folder: Path, cost: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Write the pipeline in half precision, open it again as users do, sample and score it, and write its card."""
    pipeline = write_pipeline(parts, folder, {"guidance": GUIDANCE})
    longest = max(len(ids) for ids in parts.tokenizer(list(drawings.captions)).input_ids)
    components = (("denoiser", parts.network), ("text encoder", parts.encoder), ("autoencoder", parts.autoencoder))
    card = {
        "name": "emoji",
        "what": "a StableDiffusionPipeline folder: Google's emoji from their names, 64x64",
        "recipe": "distillbench zoo train emoji --data PATH",
        "licence": "Apache-2.0, as the drawings that it was trained on",
        "data": {"sha256": drawings.sha256, "images": int((~drawings.held_out).sum())},
        "cost": cost,
        "precision": "files float16, in use float32",
        "longest caption": f"{longest} of {parts.tokenizer.model_max_length} tokens",
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in components},
        "guidance_scale": GUIDANCE,
        "scores": own_scores(open_pipeline(pipeline), drawings, progress),
        "sha256": pipeline_sha256(pipeline),
    }  # fmt: skip
    (folder / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def own_scores(teacher: DiffusersTeacher, drawings: EmojiSet, progress: Callable[[str], None]) -> dict[str, Any]:
    """fd to the held-out drawings and the share of right categories: of these drawings behind the autoencoder, and of one sample of each
    of their names at each number of steps, with and without guidance."""
    extractor = embedded_extractor(teacher.image_size)
    train, test = drawings.split(held_out=False), drawings.split(held_out=True)
    reader = CategoryReader(as_float64(extractor(train.images)), train.labels.numpy(), len(drawings.categories))
    real = as_float64(extractor(test.images))

    def read(images: Tensor) -> dict[str, float]:
        features = as_float64(extractor(images))
        right = float((reader.read(features) == test.labels.numpy()).mean())
        return {"fd": round(frechet_distance(features, real), 2), "label-agreement": round(right, 4)}

    kept = torch.cat([to_uint8(teacher.decode(teacher.encode(part.float() / 255))) for part in test.images.split(100)])
    found: dict[str, Any] = {"n": len(test), "against": "held-out drawings and their names, one image each", "autoencoder": read(kept)}
    for scale in (1.0, GUIDANCE):
        for steps in EVALUATED:
            seen = read(sampled(teacher, list(test.captions), EVALUATION_SEED, steps, scale))
            found.setdefault(f"guidance {scale:g}", {})[f"{steps} steps"] = seen
            progress(f"guidance {scale:g}, {steps} steps: fd {seen['fd']:.1f}, label-agreement {seen['label-agreement']:.3f}")
    return found


def fit_autoencoder(drawings: EmojiSet, progress: Callable[[str], None], *, steps: int, seed: int, batch: int, device: str,
                    **changes: Any) -> Any:  # fmt: skip
    """An AutoencoderKL with its scaling factor in its config, on the device; the loss of shapes' autoencoders."""
    repair_torchvision()
    from diffusers import AutoencoderKL

    model: Any = seeded(lambda: AutoencoderKL(**{**AUTOENCODER, **changes}), seed).to(device).train()
    generator = generator_for(seed, "emoji/autoencoder", 0)
    pictures = drawings.images.to(device)

    def loss(rows: Tensor) -> Tensor:
        x = as_input(pictures[rows.to(device)])
        z = latents_of(model, x).float()
        y = model.decode(z + NOISE * torch.randn(z.shape, generator=generator).to(device)).sample.float()
        return (y - x).abs().mean() + 4 * (y - x).square().mean() + PENALTY * z.square().mean()

    for _ in _steps(model, loss, LEARNING_RATE["autoencoder"], len(drawings), steps, batch, generator, device, "autoencoder", progress):
        pass
    model.requires_grad_(False).eval()
    with torch.no_grad():
        latents = torch.cat([latents_of(model, as_input(part)) for part in pictures[:1000].split(100)])
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return model


def fit_denoiser(autoencoder: Any, drawings: EmojiSet, progress: Callable[[str], None], *, steps: int, seed: int, batch: int, device: str,
                 **changes: Any) -> Parts:  # fmt: skip
    """All parts, on the device, U-Net and text encoder with averaged weights."""
    from diffusers import UNet2DConditionModel

    tokenizer = clip_tokenizer(drawings.captions)
    encoder, network = seeded(lambda: (clip_encoder(tokenizer), UNet2DConditionModel(**{**NETWORK, **changes})), seed)
    parts = Parts(autoencoder, tokenizer, encoder.to(device), network.to(device), "emoji")
    generator = generator_for(seed, "emoji/denoiser", 0)
    with torch.no_grad():
        pictures = drawings.images.split(100)
        x = autoencoder.config.scaling_factor * torch.cat([latents_of(autoencoder, as_input(part.to(device))).cpu() for part in pictures])
    ids, mask = token_ids(tokenizer, drawings.captions)
    none_ids, none_mask = token_ids(tokenizer, [""])

    def loss(rows: Tensor) -> Tensor:
        dropped = (torch.rand(len(rows), generator=generator) < UNCONDITIONAL)[:, None]
        said, heard = torch.where(dropped, none_ids, ids[rows]).to(device), torch.where(dropped, none_mask, mask[rows]).to(device)
        noise = torch.randn(x[rows].shape, generator=generator)
        x_t, t, target = (part.to(device) for part in noisy("shapes-sd", x[rows], noise, generator))
        return (parts.denoise(x_t, t, embed(parts.encoder, said, heard), heard).float() - target).square().mean()

    trained = parts.trained().train()
    average = copy.deepcopy(trained)
    rate = LEARNING_RATE["denoiser"]
    for step in _steps(trained, loss, rate, len(drawings), steps, batch, generator, device, "denoiser", progress):
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - min(EMA, step / (step + 10)))
    network, encoder = average.eval().requires_grad_(False)
    return Parts(autoencoder, tokenizer, encoder, network, "emoji")


def clip_tokenizer(captions: tuple[str, ...]) -> Any:
    """A CLIPTokenizer that takes each word of the captions, and each digit, letter and mark, as one token."""
    repair_torchvision()
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = sorted({word for caption in captions for word in re.findall("[a-z]+", caption)})
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=100_000, show_progress=False, end_of_word_suffix="</w>"))
    model = json.loads(learner.to_str())["model"]  # merged until every word is one
    letters = string.ascii_lowercase + string.digits + string.punctuation
    known = sorted({*model["vocab"], *letters, *(f"{letter}</w>" for letter in letters)})
    vocabulary = {token: number for number, token in enumerate([*known, "<|startoftext|>", "<|endoftext|>"])}
    merges: Any = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def _steps(model: nn.Module, loss: Loss, rate: float, drawings: int, steps: int, batch: int, generator: torch.Generator, device: str,
           what: str, progress: Callable[[str], None]) -> Iterator[int]:  # fmt: skip
    """AdamW under a warm-up and a cosine; yields the number of each step behind it. bfloat16 products but for the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    began, total = time.monotonic(), torch.zeros((), device=device)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))
        with torch.autocast(device, torch.bfloat16, enabled=step < 0.9 * steps):
            found = loss(torch.randint(drawings, (batch,), generator=generator))
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += found.detach()  # read every 500 steps: reading waits for the device
        if step % 500 == 499:
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1) / 60
            progress(f"emoji {what} {step + 1}/{steps}, loss {total.item() / 500:.4f}, about {left:.0f} minutes left")
            total.zero_()
        yield step
