"""Pipelines as teachers: the raw network's numbers, the pipelines' own samples, images and prompts, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from distillbench.diffusion import Trig
from distillbench.errors import BadFileError, UsageError
from distillbench.networks.diffusers_tools import import_diffusers
from distillbench.randomness import sample_noise
from distillbench.teachers.diffusers import open_pipeline, wrap_pipeline
from toy_pipelines import toy_ddpm, toy_sana, toy_sd, toy_sdxl

TOYS = {"sd": toy_sd, "sdxl": toy_sdxl, "sana": toy_sana, "ddpm": toy_ddpm}
PROMPTS = ["a red", "two"]
SEEDS = [5, 6]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make(root / name) for name, make in TOYS.items()}


@pytest.fixture(scope="module")
def teachers(folders):
    return {name: open_pipeline(folder) for name, folder in folders.items()}


def raw_output(teacher, x, t, conditions):
    """What the diffusers model itself says at the timestep of path time t, called as its pipeline calls it."""
    network = teacher.denoiser.network
    model, options = network.model, {}
    if "tokens" in conditions:
        options["encoder_hidden_states"] = conditions.field("tokens")
    if "text_embeds" in conditions:
        options["added_cond_kwargs"] = {name: conditions.field(name) for name in ("text_embeds", "time_ids")}
    if network.kind == "sana":
        options["encoder_attention_mask"] = conditions.field("mask")
    timestep = 1000 * t if network.kind == "sana" else 1000 * t - 1
    return model(x, timestep=timestep.float(), **options).sample


@pytest.mark.parametrize("name", list(TOYS))
def test_the_denoiser_agrees_with_the_raw_network(teachers, name):
    teacher = teachers[name]
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *teacher.shape, generator=g), torch.rand(2, generator=g, dtype=torch.float64)
    conditions = teacher.conditions(PROMPTS)
    with torch.no_grad():
        own = teacher.denoiser.on(teacher.denoiser.schedule).predict(x, t, conditions).output
        raw = raw_output(teacher, x, t, conditions)
    assert raw.std() > 0.01
    assert (own - raw).abs().max() < 1e-5


def test_readings_are_those_of_the_schedulers(teachers):
    diffusers = import_diffusers()
    table = teachers["sd"].pipeline.scheduler.alphas_cumprod
    path = teachers["sd"].denoiser.path
    assert torch.allclose(path.alpha(torch.tensor([0.25, 0.5, 1.0])), table[[249, 499, 999]].double().sqrt())
    assert (teachers["sana"].denoiser.path.shift, teachers["sana"].denoiser.prediction) == (3.0, "velocity")
    kept = teachers["sd"].pipeline
    for predicts, ours in (("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")):
        scheduler = diffusers.DDIMScheduler.from_config(kept.scheduler.config, prediction_type=predicts)
        parts = {**kept.components, "scheduler": scheduler}
        teacher = wrap_pipeline(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))
        assert teacher.denoiser.prediction == ours
        x, eps = torch.randn(2, 2, *teacher.shape, generator=torch.Generator().manual_seed(1))
        index = 499
        noisy = scheduler.add_noise(x, eps, torch.tensor([index, index]))
        out = {"epsilon": eps, "sample": x, "v_prediction": scheduler.get_velocity(x, eps, torch.tensor([index, index]))
               if hasattr(scheduler, "get_velocity") else None}[predicts]  # fmt: skip
        from distillbench.diffusion.denoiser import Coefficients

        c = Coefficients(teacher.denoiser.path, teacher.denoiser.schedule, ours, (index + 1) / 1000)
        assert torch.allclose(c.x0[0] * noisy + c.x0[1] * out, x, atol=1e-4)
        assert torch.allclose(c.eps[0] * noisy + c.eps[1] * out, eps, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sana"])
def test_guided_samples_are_those_of_the_pipelines_own_call(teachers, name):
    teacher = teachers[name]
    if name == "sdxl":
        teacher.pipeline.scheduler = import_diffusers().DDIMScheduler.from_config(teacher.pipeline.scheduler.config, clip_sample=False)
    ours = teacher.sample(teacher.conditions(PROMPTS), SEEDS, 20, 4.0)
    options = {}
    if name == "sana":
        h, w = teacher.image_size
        options = {"sigmas": [1 - i / 20 for i in range(20)], "use_resolution_binning": False, "height": h, "width": w}
    latents = sample_noise(SEEDS, teacher.shape, 0)
    theirs = teacher.pipeline(PROMPTS, num_inference_steps=20, guidance_scale=4.0, latents=latents, output_type="latent", **options).images
    assert ours.evaluations == 40
    assert (ours.x - theirs).abs().max() < 1e-4 * max(1.0, theirs.abs().max())
    unguided = teacher.sample(teacher.conditions(PROMPTS), SEEDS, 20)
    assert unguided.evaluations == 20
    assert (unguided.x - ours.x).abs().max() > 1e-3


def test_samples_of_a_pixel_pipeline_are_those_of_a_bare_loop_and_cannot_be_guided(teachers):
    teacher = teachers["ddpm"]
    scheduler = import_diffusers().DDIMScheduler.from_config(teacher.pipeline.scheduler.config)
    x = sample_noise(SEEDS, teacher.shape, 0)
    scheduler.set_timesteps(20)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(teacher.denoiser.network.model(x, timestep).sample, timestep, x).prev_sample
    ours = teacher.sample(teacher.conditions(["", ""]), SEEDS, 20, scheduler="DDIMScheduler").x
    assert (ours - x).abs().max() < 1e-5 * x.abs().max()
    with pytest.raises(UsageError, match="cannot be guided"):
        teacher.sample(teacher.conditions(["", ""]), SEEDS, 2, 3.0)


STOCHASTIC = ("LCMScheduler", "TCDScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler")


@pytest.mark.parametrize("scheduler", [*STOCHASTIC, "DPMSolverMultistepScheduler", "flow"])
def test_a_sample_depends_on_its_seed_and_prompt_alone(teachers, scheduler):
    teacher = teachers["sana" if scheduler == "flow" else "sd"]
    if scheduler == "flow":
        scheduler = import_diffusers().FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    prompts, seeds = [*PROMPTS, "a"], [*SEEDS, 7]
    whole = teacher.sample(teacher.conditions(prompts), seeds, 3, 2.0, scheduler=scheduler).x
    alone = teacher.sample(teacher.conditions(prompts[1:2]), seeds[1:2], 3, 2.0, scheduler=scheduler).x
    other = teacher.sample(teacher.conditions(prompts[1:2]), [8], 3, 2.0, scheduler=scheduler).x
    assert (whole[1] - alone[0]).abs().max() < 1e-4 * max(1.0, whole.abs().max())
    assert (other - alone).abs().max() > 0.1


def test_an_embedding_does_not_depend_on_its_neighbours_and_is_kept(folders):
    teacher = open_pipeline(folders["sdxl"])
    alone = open_pipeline(folders["sdxl"]).conditions(["two"])
    many = teacher.conditions(["a", "b", "two", "a"])
    assert all(torch.equal(many.field(name)[2], alone.field(name)[0]) for name in ("tokens", "text_embeds", "time_ids"))
    calls = []
    teacher.pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    again = teacher.conditions(["two", "b"])
    assert not calls
    assert torch.equal(again.field("tokens")[0], many.field("tokens")[2])
    assert again.field("prompt") == ["two", "b"]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sana"])
def test_the_null_is_the_pipelines_negative_prompt(teachers, name):
    teacher = teachers[name]
    encode = teacher.pipeline.encode_prompt
    for negative in ("", "x"):
        null = teacher.conditions(PROMPTS, negative).null()
        if name == "sd":
            expected = encode(PROMPTS, "cpu", 1, True, [negative] * 2)[1]
        elif name == "sdxl":
            expected = encode(PROMPTS, do_classifier_free_guidance=True, negative_prompt=[negative] * 2 if negative else None)[1]
        else:
            expected = encode(PROMPTS, True, negative)[2]
        assert torch.allclose(null.field("tokens"), expected.detach(), atol=1e-6)


def test_long_captions_are_named(teachers):
    assert teachers["sd"].too_long(["a" * 10, "a" * 11, "b", "c" * 50]) == [1, 3]
    assert teachers["sana"].too_long(["a", "b" * 400]) == [1]
    assert teachers["ddpm"].too_long(["a" * 999]) == []


@pytest.mark.parametrize("name", list(TOYS))
def test_images_go_to_latents_and_back(teachers, name):
    teacher = teachers[name]
    images = torch.rand(2, 3, *teacher.image_size, generator=torch.Generator().manual_seed(0))
    latents = teacher.encode(images)
    decoded = teacher.decode(latents)
    assert tuple(latents.shape[1:]) == teacher.shape
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert torch.equal(teacher.encode(images), latents)
    if name == "ddpm":
        assert torch.allclose(decoded, images, atol=1e-6)
    else:
        vae = teacher.pipeline.vae
        with torch.no_grad():
            expected = vae.decode(latents / vae.config.scaling_factor).sample
        assert torch.allclose(decoded, (expected / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_settings_beside_the_pipeline_hold_for_its_texts_and_times(folders, tmp_path):
    folder = shutil.copytree(folders["sana"], tmp_path / "set")
    settings = {"max_sequence_length": 20, "complex_human_instruction": None, "times": {"2": [1.0, 0.25]}, "starts": {"2": 0.5}}
    (folder / "distillbench.json").write_text(json.dumps(settings))
    teacher, plain = open_pipeline(folder), open_pipeline(folders["sana"])
    conditions = teacher.conditions(PROMPTS)
    assert conditions.field("tokens").shape[1] == 20
    assert plain.conditions(PROMPTS).field("tokens").shape[1] == 300
    assert teacher.too_long(["a" * 19, "a" * 20]) == [1]
    x = 0.5 * sample_noise(SEEDS, teacher.shape, 0)
    for t, s in ((1.0, 0.25), (0.25, 0.0)):
        with torch.no_grad():
            prediction = teacher.denoiser.predict(x, t, conditions)
        x = float(teacher.denoiser.path.alpha(s)) * prediction.x0 + float(teacher.denoiser.path.sigma(s)) * prediction.eps
    assert (teacher.sample(conditions, SEEDS, 2).x - x).abs().max() < 1e-4
    (folder / "distillbench.json").write_text("[")
    with pytest.raises(BadFileError, match="not a json file"):
        open_pipeline(folder)


def test_a_sprint_pipeline_samples_as_its_own_call(folders, tmp_path):
    diffusers = import_diffusers()
    base = open_pipeline(toy_sana(tmp_path / "base", guidance_embeds=True)).pipeline
    parts = {**base.components, "scheduler": diffusers.SCMScheduler()}
    diffusers.SanaSprintPipeline(**parts).save_pretrained(tmp_path / "sprint")
    teacher = open_pipeline(tmp_path / "sprint")
    assert teacher.denoiser.path == Trig()
    ours = teacher.sample(teacher.conditions(PROMPTS), SEEDS[:1] * 2, 1, 4.5)
    h, w = teacher.image_size
    call = {"num_inference_steps": 1, "intermediate_timesteps": None, "guidance_scale": 4.5, "use_resolution_binning": False}
    latents = sample_noise(SEEDS[:1] * 2, teacher.shape, 0)
    theirs = teacher.pipeline(PROMPTS, latents=latents, height=h, width=w, output_type="latent", **call)
    assert ours.evaluations == 1
    assert (ours.x - theirs.images).abs().max() < 1e-4


def changed(folder, tmp_path, file, **values):
    copy = shutil.copytree(folder, tmp_path / "changed")
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, **values}))
    return copy


def test_what_is_no_teacher_is_refused_in_one_line(folders, tmp_path):
    for where, what in (
        (tmp_path / "nowhere", "no such folder"),
        ("owner/name", "give --revision"),
        (tmp_path, "is no pipeline: it has no model_index.json"),
        (folders["sd"] / "model_index.json", "a file, not the folder"),
    ):
        with pytest.raises(UsageError, match=what) as error:
            open_pipeline(where)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "values", "what"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "class FluxPipeline are not supported; known: StableDiffusionPipeline"),
        ("model_index.json", {"unet": ["mine", "Net"]}, "component unet comes from 'mine'"),
        ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "cannot be read as a schedule"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow' is not supported"),
        ("unet/config.json", {"in_channels": 9}, "cannot be loaded"),
    ],
)
def test_pipelines_that_cannot_be_read_are_refused_in_one_line(folders, tmp_path, file, values, what):
    with pytest.raises(UsageError, match=what) as error:
        open_pipeline(changed(folders["sd"], tmp_path, file, **values))
    assert "\n" not in str(error.value)


def test_pickles_are_not_opened(folders, tmp_path):
    folder = shutil.copytree(folders["sd"], tmp_path / "pickled")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UsageError, match="weights as a pickle only"):
        open_pipeline(folder)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(UsageError, match="cannot be loaded"):
        open_pipeline(folder)


def test_schedulers_by_name(teachers):
    with pytest.raises(UsageError, match="did you mean DDIMScheduler"):
        teachers["sd"].sample(teachers["sd"].conditions(PROMPTS), SEEDS, 2, scheduler="DDIMSchedular")
