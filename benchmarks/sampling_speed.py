"""Sampling through the adapter against the pipeline's own call, on the same latents and embeddings, with the same result.

    python benchmarks/sampling_speed.py [--pipeline FOLDER ...] [--batch 16] [--steps 20] [--rounds 31]

Without --pipeline: the embedded shapes-sd and shapes-sana.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from pairs import heading, line, machine, paired

from distillbench.api import Samples
from distillbench.networks.diffusers_tools import quiet
from distillbench.randomness import sample_noise
from distillbench.teachers.diffusers import DiffusersTeacher, open_pipeline
from distillbench.teachers.zoo import zoo_folder

PROMPTS = ("a red circle", "two blue squares", "a green triangle", "a small red square")
ALIKE = 1e-3  # largest difference of a latent after all steps
MOST = 1.02


def bare_call(teacher: DiffusersTeacher, conditions: Any, seeds: list[int], steps: int, guidance: float) -> torch.Tensor:
    """Latents by the pipeline's own call from embeddings made before."""
    pipeline, (h, w) = teacher.pipeline, teacher.image_size
    noise = sample_noise(seeds, teacher.shape, 0) * float(getattr(pipeline.scheduler, "init_noise_sigma", 1.0))
    null = conditions.null()
    options: dict[str, Any] = {
        "prompt_embeds": conditions.field("tokens"), "num_inference_steps": steps, "guidance_scale": guidance,
        "latents": noise, "output_type": "latent", "height": h, "width": w, "negative_prompt_embeds": null.field("tokens"),
    }  # fmt: skip
    if type(pipeline).__name__ == "SanaPipeline":
        options |= {"sigmas": [1 - i / steps for i in range(steps)], "use_resolution_binning": False, "negative_prompt": None,
                    "prompt_attention_mask": conditions.field("mask"), "negative_prompt_attention_mask": null.field("mask")}  # fmt: skip
    return pipeline(**options).images


def compare(teacher: DiffusersTeacher, *, batch: int, steps: int, rounds: int, guidance: float = 2.0) -> list[tuple[float, float]]:
    """Seconds of the bare pipeline and of the adapter in each round, so that their quotient is the adapter's cost.

    Raises AssertionError where the two do not sample the same.
    """
    conditions = teacher.conditions([PROMPTS[i % len(PROMPTS)] for i in range(batch)])
    seeds = list(range(batch))
    kept: dict[str, Any] = {}

    def bare() -> None:
        with torch.no_grad():
            kept["bare"] = bare_call(teacher, conditions, seeds, steps, guidance)

    def adapted() -> None:
        found: Samples = teacher.sample(conditions, seeds, steps, guidance_scale=guidance)
        kept["adapted"] = found.x

    with quiet():
        pairs = paired(bare, adapted, rounds)
    gap = (kept["bare"] - kept["adapted"]).abs().max().item()
    assert gap < ALIKE, f"{teacher.name}: the two samples differ by {gap:.2g}"
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", action="append", metavar="FOLDER", help="of StableDiffusionPipeline or SanaPipeline; again for more")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = options.pipeline or [str(zoo_folder(name) / "pipeline") for name in ("shapes-sd", "shapes-sana")]
    print(f"{machine(1)}; batch {options.batch}, {options.steps} steps, guided, median of {options.rounds} rounds in turns")
    print(heading("sampling", "pipeline ms", "adapter ms"))
    for where in named:
        teacher = open_pipeline(where)
        pairs = compare(teacher, batch=options.batch, steps=options.steps, rounds=options.rounds)
        path = Path(where)
        name = path.parent.name if path.name == "pipeline" else teacher.name
        print(line(name, pairs, f"at most {MOST:g}"), flush=True)


if __name__ == "__main__":
    main()
