"""Students as files of diffusers: what plain diffusers loads back samples as the student does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from distillbench.diffusion import Trig
from distillbench.errors import UsageError
from distillbench.networks.diffusers_tools import import_diffusers
from distillbench.parts.student import FewStepStudent
from distillbench.parts.student_by_steps import StudentBySteps
from distillbench.teachers.diffusers import open_pipeline
from distillbench.teachers.pipelines_export import export_pipeline
from toy_pipelines import toy_ddpm, toy_sana, toy_sd, toy_sdxl
from toys import toy_teacher

PROMPTS = ["a red", "two"]
SEEDS = [5, 6]
EVEN = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    made = {make.__name__[4:]: make(root / make.__name__[4:]) for make in (toy_sd, toy_sdxl, toy_sana, toy_ddpm)}
    made["dense"] = toy_sana(root / "dense", timestep_scale=0.001, qk_norm="rms_norm_across_heads")
    return {name: (open_pipeline(folder), folder) for name, folder in made.items()}


def moved(denoiser):
    """A trained student, as far as these tests go."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in denoiser.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    return denoiser


def agree(teacher, student, back, steps):
    conditions = teacher.conditions(PROMPTS)
    expected = student.generate(conditions, steps=steps, seeds=SEEDS)
    got = back.sample(back.conditions(PROMPTS), SEEDS, steps)
    assert got.evaluations == expected.evaluations
    assert (got.x - expected.x).abs().max() < 1e-4 * max(1.0, expected.x.std())
    untrained = FewStepStudent(teacher.denoiser, {1: (1.0,)}, teacher.shape).generate(conditions, steps=1, seeds=SEEDS)
    assert (untrained.x - expected.x).abs().max() > 1e-3


def runs(folder, teacher, steps):
    """The pipeline class itself, loaded by diffusers alone, runs on the folder with the stated call."""
    pipeline = import_diffusers().DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((folder / "distillbench.json").read_text())["call"]
    h, w = teacher.image_size
    if "Sana" in type(pipeline).__name__:
        call |= {"use_resolution_binning": False, "height": h, "width": w}
    call = {"num_inference_steps": steps, "batch_size": 2} if "DDPM" in type(pipeline).__name__ else {**call, "prompt": PROMPTS}
    assert pipeline(**call, output_type="np").images.shape == (2, h, w, 3)
    return type(pipeline).__name__, type(pipeline.scheduler).__name__


CASES = {
    "sd renoise": ("sd", EVEN, "renoise", ("StableDiffusionPipeline", "LCMScheduler")),
    "sd deterministic": ("sd", EVEN, "deterministic", ("StableDiffusionPipeline", "DDIMScheduler")),
    "sd one step": ("sd", (1.0,), "renoise", ("StableDiffusionPipeline", "LCMScheduler")),
    "sd other times": ("sd", (0.9, 0.5, 0.2), "renoise", ("StableDiffusionPipeline", "LCMScheduler")),
    "sd deterministic at other times": ("sd", (1.0, 0.5, 0.2), "deterministic", ("StableDiffusionPipeline", "DPMSolverMultistepScheduler")),
    "sdxl": ("sdxl", EVEN, "renoise", ("StableDiffusionXLPipeline", "LCMScheduler")),
    "ddpm": ("ddpm", EVEN, "renoise", ("DDPMPipeline", "LCMScheduler")),
    "sana renoise": ("sana", EVEN, "renoise", ("SanaPipeline", "FlowMatchEulerDiscreteScheduler")),
    "sana deterministic": ("sana", (1.0, 0.3), "deterministic", ("SanaPipeline", "FlowMatchEulerDiscreteScheduler")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_an_exported_pipeline_samples_as_the_student(teachers, tmp_path, case):
    name, times, mode, classes = CASES[case]
    teacher, _ = teachers[name]
    n = len(times)
    student = FewStepStudent(moved(teacher.denoiser.copy()), {n: times}, teacher.shape, mode=mode)
    folder = export_pipeline(teacher, student, n, tmp_path / "out")
    agree(teacher, student, open_pipeline(folder), n)
    assert runs(folder, teacher, n) == classes


def test_a_student_on_another_path_is_exported_by_its_signal_to_noise_ratio(teachers, tmp_path):
    teacher, _ = teachers["sana"]
    student = StudentBySteps({2: moved(teacher.denoiser.copy()).on(Trig())}, {2: (1.0, 0.6)}, teacher.shape, mode="renoise")
    agree(teacher, student, open_pipeline(export_pipeline(teacher, student, 2, tmp_path)), 2)


GUIDED = {
    "sd keeps its input": ("sd", (1.0, 0.5), 5.0, None, "StableDiffusionPipeline"),
    "sd leaves it out": ("sd", (1.0, 0.5), None, None, "StableDiffusionPipeline"),
    "sana has it fixed": ("sana", (1.0, 0.5), 5.0, None, "SanaPipeline"),
    "sprint, two steps": ("dense", (1.0, 0.8), 5.0, Trig(), "SanaSprintPipeline"),
    "sprint, four steps": ("dense", EVEN, 5.0, Trig(), "SanaSprintPipeline"),
}


@pytest.mark.parametrize("case", list(GUIDED))
def test_a_guidance_input_is_fed_or_fixed(teachers, tmp_path, case):
    name, times, guidance, path, class_name = GUIDED[case]
    teacher, _ = teachers[name]
    denoiser = moved(teacher.denoiser.with_network(teacher.denoiser.network.with_guidance_input().requires_grad_(True)))
    denoiser = denoiser if path is None else denoiser.on(path)
    student = FewStepStudent(denoiser, {len(times): times}, teacher.shape, guidance_input=guidance)
    folder = export_pipeline(teacher, student, len(times), tmp_path)
    agree(teacher, student, open_pipeline(folder), len(times))
    assert runs(folder, teacher, len(times))[0] == class_name


@pytest.mark.parametrize("name", ["sd", "sdxl", "sana"])
def test_adapters_become_a_lora_file_for_their_base(teachers, tmp_path, name):
    teacher, base = teachers[name]
    adapted = teacher.denoiser.with_network(teacher.denoiser.network.lora(2, alpha=3.0))
    student = FewStepStudent(moved(adapted), {4: EVEN}, teacher.shape)
    folder = export_pipeline(teacher, student, 4, tmp_path / "lora")
    assert sorted(path.name for path in folder.iterdir()) == ["distillbench.json", "pytorch_lora_weights.safetensors", "scheduler"]
    assert json.loads((folder / "distillbench.json").read_text())["base"] == name
    agree(teacher, student, open_pipeline(base, lora=folder), 4)
    pipeline = import_diffusers().DiffusionPipeline.from_pretrained(base)
    before = sum(p.numel() for p in getattr(pipeline, teacher.kind.network).parameters())
    pipeline.load_lora_weights(folder)
    assert sum(p.numel() for p in getattr(pipeline, teacher.kind.network).parameters()) > before


def test_a_lora_for_another_base_is_refused(teachers, tmp_path):
    teacher, base = teachers["sd"]
    student = FewStepStudent(teacher.denoiser.with_network(teacher.denoiser.network.lora(2)), {1: (1.0,)}, teacher.shape)
    folder = export_pipeline(teacher, student, 1, tmp_path / "lora")
    for other in (teachers["sdxl"][1], teachers["sana"][1], toy_sd(tmp_path / "wide", block_out_channels=(16, 16))):
        with pytest.raises(UsageError, match=r"another base|not a LoRA") as error:
            open_pipeline(other, lora=folder)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="no LoRA; give a"):
        open_pipeline(base, lora=tmp_path / "nowhere")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match="not a safetensors file"):
        open_pipeline(base, lora=folder)
    shutil.copy(base / "unet" / "diffusion_pytorch_model.safetensors", folder / "pytorch_lora_weights.safetensors")
    with pytest.raises(UsageError, match="LoRA"):
        open_pipeline(base, lora=folder)


def test_what_diffusers_cannot_say_is_refused(teachers, tmp_path):
    teacher, _ = teachers["sd"]
    with pytest.raises(UsageError, match="trained for 1 steps, not 4"):
        export_pipeline(teacher, FewStepStudent(teacher.denoiser, {1: (1.0,)}, teacher.shape), 4, tmp_path)
    with pytest.raises(UsageError, match="holds no network of diffusers"):
        export_pipeline(teacher, FewStepStudent(toy_teacher(), {1: (1.0,)}, (2,)), 1, tmp_path)
    other = teachers["ddpm"][0]
    with pytest.raises(UsageError, match="another noise table"):
        export_pipeline(teacher, FewStepStudent(other.denoiser, {1: (1.0,)}, other.shape), 1, tmp_path)
