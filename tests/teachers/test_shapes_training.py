"""The recipe of the `shapes` teachers at toy length: it learns, it is reproducible, and what it writes plain diffusers opens."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")

from distillbench.data.shapes import evaluation_scenes
from distillbench.teachers import shapes, shapes_autoencoders, shapes_pipelines, shapes_text
from distillbench.teachers.cards import read_card


@pytest.mark.parametrize("make", [shapes_text.clip_tokenizer, shapes_text.gemma_tokenizer])
def test_every_word_is_one_token_and_no_caption_is_cut(make):
    tokenizer = make()
    for word in shapes_text.words():
        pieces = [token for token in tokenizer.convert_ids_to_tokens(tokenizer(f"a {word}")["input_ids"]) if not token.startswith("<")]
        assert len(pieces) == 2, (word, pieces)
    for held_out in (True, False):
        assert max(len(tokenizer(caption)["input_ids"]) for caption in evaluation_scenes(held_out)[1]) <= shapes_text.LENGTH


@pytest.fixture(scope="module", params=["shapes-sd", "shapes-sana"])
def parts(request):
    autoencoder = shapes_autoencoders.make_autoencoder(shapes_pipelines.AUTOENCODERS[request.param])
    autoencoder.register_to_config(scaling_factor=1.0)
    return shapes.untrained(request.param, autoencoder.requires_grad_(False).eval(), 0)


def test_training_lowers_the_loss_and_is_reproducible(parts, monkeypatch):
    monkeypatch.setattr(shapes, "TRAINING_PICTURES", 64)
    monkeypatch.setattr(shapes, "BATCH", 8)
    generator = torch.Generator().manual_seed(0)
    x, ids, mask, empty = shapes.training_set(parts, generator, (0.4, 0.3, 0.3), 0.5)
    assert len(x) == len(ids) == len(mask) == 64
    assert empty[0].shape == (shapes_text.LENGTH,)
    fitted = [shapes.fit(shapes.untrained(parts.kind, parts.autoencoder, 0), lambda line: None, steps=12) for _ in range(2)]
    states = [part.network.state_dict() for part in fitted]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    before, after = (_loss(one, x, ids, mask) for one in (parts, fitted[0]))
    assert after < before


def test_one_go_is_cycle_by_cycle_through_files(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "TRAINING_PICTURES", 64)
    monkeypatch.setattr(shapes, "BATCH", 8)
    monkeypatch.setattr(shapes_pipelines, "CYCLES", {parts.kind: (3, 2)})
    monkeypatch.setattr(shapes_pipelines, "train_autoencoder", lambda kind, progress, seed: (parts.autoencoder, {}))
    monkeypatch.setattr(shapes_pipelines, "finish", lambda made, *rest: made)
    whole = shapes_pipelines.train(parts.kind, tmp_path, lambda line: None)
    made = shapes.fit(shapes.untrained(parts.kind, parts.autoencoder, 0), lambda line: None, steps=3, cycle=0)
    for name in ("network", "encoder"):
        getattr(made, name).save_pretrained(tmp_path / name)
        setattr(made, name, type(getattr(made, name)).from_pretrained(tmp_path / name))
    made = shapes.fit(made, lambda line: None, steps=2, cycle=1)
    for ours, theirs in zip(made.trained().parameters(), whole.trained().parameters(), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def _loss(parts, x, ids, mask):
    generator = torch.Generator().manual_seed(1)
    x_t, t, target = shapes.noisy(parts.kind, x, torch.randn(x.shape, generator=generator), generator)
    found = parts.denoise(x_t, t, shapes_text.embed(parts.encoder, ids, mask), mask)
    return (found - target).square().mean().item()


def test_the_noise_levels_are_stable_diffusions():
    kept = shapes.alphas_cumprod()
    assert kept[-1].item() == pytest.approx(0.004660, abs=1e-6)
    diffusers = pytest.importorskip("diffusers")
    assert torch.allclose(kept, diffusers.DDIMScheduler(**shapes.BETAS).alphas_cumprod)


def test_what_is_written_opens_in_diffusers_with_its_card(parts, tmp_path, monkeypatch):
    scenes, captions = evaluation_scenes()
    few = [next(i for i, scene in enumerate(scenes) if scene.kind == kind) for kind in ("one", "two", "count")]
    monkeypatch.setattr(shapes_pipelines, "evaluation_scenes", lambda: ([scenes[i] for i in few], [captions[i] for i in few]))
    monkeypatch.setattr(shapes_pipelines, "EVALUATED", (1, 2))
    shapes_pipelines.finish(parts, tmp_path, {"steps": 0}, lambda line: None)
    card = read_card(tmp_path)
    assert card["sha256"] == shapes_pipelines.pipeline_sha256(tmp_path / "pipeline")
    assert set(card["scores"]) == {"n", "against", "guidance 1", f"guidance {card['guidance_scale']:g}"}
    assert json.loads((tmp_path / "pipeline/model_index.json").read_text())["_class_name"] in ("StableDiffusionPipeline", "SanaPipeline")
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    sizes = {"height": 32, "width": 32, "use_resolution_binning": False} if parts.kind == "shapes-sana" else {}
    image = pipeline("a small red circle on the left on a white background", num_inference_steps=2, output_type="np", **sizes).images
    assert image.shape == (1, 32, 32, 3)


def test_an_autoencoder_learns(monkeypatch):
    monkeypatch.setattr(shapes_autoencoders, "TRAINING_PICTURES", 64)
    monkeypatch.setattr(shapes_autoencoders, "BATCH", 8)
    monkeypatch.setattr(shapes_autoencoders, "reconstruction", lambda model, n: {"whole": 0.0})
    model, made = shapes_autoencoders.train_autoencoder("dc", lambda line: None, steps=20)
    assert made["steps"] == 20
    assert model.config.scaling_factor > 0
    x = shapes_autoencoders.as_input(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert shapes_autoencoders.latents_of(model, x).shape == (1, 16, 4, 4)
    assert torch.equal(shapes_autoencoders.as_pictures(x), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
