"""`distillbench zoo train shapes-sd` and `shapes-sana`: autoencoder, denoiser and text encoder into one diffusers pipeline and its card.

The files hold half precision; in use they are float32. `reference.safetensors` beside the pipeline holds features of the teacher's own
samples, from noise that is never scored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..data.shapes import evaluation_pictures, evaluation_scenes
from ..errors import BadFileError
from ..metrics.extractors import embedded_extractor, to_uint8
from ..metrics.frechet import frechet_distance
from ..metrics.shapes_checker import accuracies, attributes
from ..networks.files import sha256_file
from ..torchvision_repair import repair_torchvision
from .cards import CARD, read_card
from .diffusers import SETTINGS, DiffusersTeacher, open_pipeline, quiet
from .shapes import BETAS, CYCLES, Parts, fit, untrained
from .shapes_autoencoders import train_autoencoder
from .shapes_text import LENGTH
from .zoo import zoo_folder

PIPELINE, REFERENCE = "pipeline", "reference.safetensors"
AUTOENCODERS = {"shapes-sd": "kl", "shapes-sana": "dc"}
GUIDANCE = {"shapes-sd": 2.0, "shapes-sana": 2.0}  # scale under which the track samples its teacher
EVALUATED = (1, 2, 4, 8, 50)
PER_PROMPT = 4
REFERENCE_SEED = 2_000_000
EVALUATION_SEED = 1_000_000


def train_sd(folder: Path, progress: Callable[[str], None], **options: Any) -> dict[str, Any]:
    """Make `shapes-sd` in `folder`; returns its card. Options: steps (of the denoiser), seed."""
    return train("shapes-sd", folder, progress, **options)


def train_sana(folder: Path, progress: Callable[[str], None], **options: Any) -> dict[str, Any]:
    """Make `shapes-sana` in `folder`; returns its card. Options: steps (of the denoiser), seed."""
    return train("shapes-sana", folder, progress, **options)


def train(name: str, folder: Path, progress: Callable[[str], None], *, steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """One thread: threads change the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        autoencoder, made = train_autoencoder(AUTOENCODERS[name], progress, seed=seed)
        began = time.process_time()
        cycles = CYCLES[name] if steps is None else (steps,)
        parts = untrained(name, autoencoder, seed)
        for cycle, length in enumerate(cycles):
            parts = fit(parts, progress, steps=length, seed=seed, cycle=cycle)
        cost = {"steps": list(cycles), "seed": seed, "cpu_seconds": round(time.process_time() - began)}
        return finish(parts, folder, {"autoencoder": made, "denoiser": cost}, progress)
    finally:
        torch.set_num_threads(threads)


def assembled(parts: Parts) -> Any:
    """The diffusers pipeline of these parts, with the scheduler that samples it."""
    repair_torchvision()
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline, StableDiffusionPipeline

    if parts.kind == "shapes-sana":
        return SanaPipeline(tokenizer=parts.tokenizer, text_encoder=parts.encoder, vae=parts.autoencoder, transformer=parts.network,
                            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))  # fmt: skip
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="epsilon",
                              steps_offset=1)  # fmt: skip
    return StableDiffusionPipeline(
        vae=parts.autoencoder, text_encoder=parts.encoder, tokenizer=parts.tokenizer, unet=parts.network, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def finish(parts: Parts, folder: Path, made: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Write the pipeline in half precision, open it again as users do, sample and score it, and write its card."""
    # SANA: captions alone, not the long instruction before them
    settings = {"complex_human_instruction": None, "max_sequence_length": LENGTH} if parts.kind == "shapes-sana" else None
    teacher = open_pipeline(write_pipeline(parts, folder, settings))
    scale = GUIDANCE[parts.kind]
    progress("sampling for the reference")
    captions = [caption for caption in evaluation_scenes()[1] for _ in range(PER_PROMPT)]
    own = sampled(teacher, captions, REFERENCE_SEED, EVALUATED[-1], scale)
    features = embedded_extractor(teacher.image_size)(own)
    save_file({"features": features.half()}, folder / REFERENCE)
    (folder / REFERENCE).chmod(0o644)
    scores = {f"guidance {g:g}": own_scores(teacher, g, progress) for g in (1.0, scale)}
    components = (("denoiser", parts.network), ("text encoder", parts.encoder), ("autoencoder", parts.autoencoder))
    card = {
        "name": parts.kind,
        "what": f"a {type(teacher.pipeline).__name__} folder: 32x32 scenes of coloured shapes from captions",
        "recipe": f"distillbench zoo train {parts.kind}",
        "cost": {**made, "threads": 1},
        "licence": "Apache-2.0; trained on scenes rendered by distillbench",
        "precision": "files float16, in use float32",
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in components},
        "guidance_scale": scale,
        "scores": {"n": len(evaluation_scenes()[1]), "against": "held-out captions, one image each; fd to 2,000 real scenes", **scores},
        "reference": {"what": f"features of its own samples, {EVALUATED[-1]} steps, guidance {scale:g}", "first_seed": REFERENCE_SEED,
                      "sha256": sha256_file(folder / REFERENCE)},
        "sha256": pipeline_sha256(folder / PIPELINE),
    }  # fmt: skip
    (folder / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def write_pipeline(parts: Parts, folder: Path, settings: dict[str, Any] | None = None) -> Path:
    """The pipeline in half precision in `folder`, settings beside its index; returns where. All users may read it: safetensors alone makes
    files that other users of an installed package cannot read."""
    pipeline = folder / PIPELINE
    with quiet():
        assembled(parts).to("cpu", torch.float16).save_pretrained(pipeline, safe_serialization=True)
    if settings is not None:
        (pipeline / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    for file in pipeline.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return pipeline


def pipeline_sha256(folder: Path) -> str:
    """Of all files of a pipeline folder, their names included."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return sha256("\n".join(f"{file.relative_to(folder).as_posix()} {sha256_file(file)}" for file in files).encode()).hexdigest()


def shipped_pipeline(name: str) -> Path:
    """The pipeline folder of a teacher of the zoo. Raises BadFileError where it is not what its card states."""
    folder = zoo_folder(name) / PIPELINE
    if pipeline_sha256(folder) != read_card(zoo_folder(name))["sha256"]:
        raise BadFileError(f"{folder}: not what its card states; install distillbench again, or make it with `zoo train {name}`")
    return folder


def sampled(teacher: DiffusersTeacher, captions: list[str], first_seed: int, steps: int, scale: float) -> torch.Tensor:
    """Images uint8 (n, 3, h, w), one for each caption, from consecutive seeds."""
    conditions = teacher.conditions(captions)
    parts = []
    for start in range(0, len(captions), 250):
        rows = range(start, min(start + 250, len(captions)))
        seeds = [first_seed + row for row in rows]
        parts.append(to_uint8(teacher.decode(teacher.sample(conditions[list(rows)], seeds, steps, guidance_scale=scale).x)))
    return torch.cat(parts)


def own_scores(teacher: DiffusersTeacher, scale: float, progress: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """What the checker reads in one image of each held-out caption, and fd, at each number of steps."""
    scenes, captions = evaluation_scenes()
    extractor = embedded_extractor(teacher.image_size)
    real = extractor(evaluation_pictures("reference")).double().numpy()
    found = {}
    for steps in EVALUATED:
        images = sampled(teacher, captions, EVALUATION_SEED, steps, scale)
        seen = accuracies(attributes(images, scenes))
        seen["fd"] = frechet_distance(extractor(images).double().numpy(), real)
        found[f"{steps} steps"] = {name: round(value, 4) for name, value in seen.items()}
        progress(f"guidance {scale:g}, {steps} steps: attributes {seen['attributes']:.3f}, whole {seen['whole']:.3f}, fd {seen['fd']:.2f}")
    return found
