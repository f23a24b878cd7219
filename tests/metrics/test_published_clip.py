"""CLIP score on random weights in the published formats: ViT-B/32 at full size, a small network of the same family otherwise."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from distillbench.errors import BadFileError, UsageError
from distillbench.metrics.published.clip import CLIPS, Clip, ClipScore, build_clip
from distillbench.published_weights import WeightsMissing
from published_files import TINY_CLIP, entry, hpsv2_module, pictures, random_clip, save_openai_archive

MISSING = [name for name in ("open_clip", "torchvision") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
CAPTIONS = ["A small red circle, left of a BLUE square.", "two triangles & a caf\u00e9"]
LONG = "a very long caption " * 30
B32 = "openclip-b32-openai"


@pytest.fixture(scope="module")
def b32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ClipScore]]:
    path = tmp_path_factory.mktemp("b32") / "ViT-B-32.pt"
    save_openai_archive(random_clip(CLIPS[B32].architecture), path)
    yield path, ClipScore(B32, path, entry=entry(path))
    path.unlink()  # pytest keeps the folders of three runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClipScore]:
    path = tmp_path_factory.mktemp("tiny") / "tiny.bin"
    torch.save(random_clip(TINY_CLIP).state_dict(), path)
    return path, ClipScore(Clip("openclip-tiny", TINY_CLIP), path, entry=entry(path))


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def embeddings(network: Any, transform: Any, tokens: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings by a package's own call of its network."""
    with torch.no_grad():
        image = network.encode_image(torch.stack([transform(pil(image)) for image in images]))
        text = network.encode_text(tokens)
    return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)


def test_b32_is_what_open_clip_gives_by_itself(b32):
    import open_clip

    path, ours = b32
    images = pictures(2, 240, 300)
    network = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    transform = open_clip.image_transform(network.visual.image_size, is_train=False)
    image, text = embeddings(network, transform, open_clip.tokenize(CAPTIONS), images)
    assert network.visual.image_size in (224, (224, 224))
    assert torch.allclose(ours.image_features(images), image, atol=1e-6)
    assert torch.allclose(ours.text_features(CAPTIONS), text, atol=1e-6)
    assert ours.cosines(images, CAPTIONS) == pytest.approx((image.double() * text.double()).sum(1).numpy(), abs=1e-6)


def test_b32_images_are_embedded_as_by_torch_fidelity(b32):
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    path, ours = b32
    images = pictures(2, 224, 224)  # so large already: the two packages resize differently
    (theirs,) = FeatureExtractorCLIP("clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(path))(images)
    assert torch.allclose(ours.image_features(images), torch.nn.functional.normalize(theirs, dim=-1), atol=1e-5)


def test_b32_agrees_with_the_fork_inside_hpsv2(b32, monkeypatch):
    fork = hpsv2_module("hpsv2.src.open_clip", monkeypatch)
    path, ours = b32
    images = pictures(1, 224, 224)
    network = fork.load_openai_model(str(path), precision="fp32", device="cpu", jit=False)
    transform = fork.image_transform(224, is_train=False)
    image, text = embeddings(network, transform, fork.tokenize(CAPTIONS), images)
    assert torch.allclose(ours.image_features(images), image, atol=1e-5)
    assert torch.allclose(ours.text_features(CAPTIONS), text, atol=1e-5)


@pytest.mark.parametrize("name", CLIPS)
def test_architectures_are_those_that_the_package_builds(name):
    """Names and shapes of every tensor, without memory. OpenAI's files are read with QuickGELU, LAION's without."""
    import open_clip

    clip = CLIPS[name]
    published = {"openclip-b32-openai": ("ViT-B-32", "openai"), "openclip-l14-openai": ("ViT-L-14", "openai"),
                 "openclip-g14-laion2b-s12b-b42k": ("ViT-g-14", "laion2b_s12b_b42k"),
                 "openclip-bigg14-laion2b-s39b-b160k": ("ViT-bigG-14", "laion2b_s39b_b160k")}[name]  # fmt: skip
    recipe = open_clip.get_pretrained_cfg(*published)
    assert recipe.get("quick_gelu", False) == clip.openai
    assert (recipe["interpolation"], recipe["resize_mode"]) == ("bicubic", "shortest")
    with torch.device("meta"):
        ours = build_clip(clip.architecture)
        theirs = open_clip.create_model(published[0], force_quick_gelu=clip.openai, device="meta")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert str(ours) == str(theirs)  # layers without tensors, as activations are


def test_a_small_network_agrees_with_open_clips_own_route(tiny, tmp_path):
    import open_clip

    path, ours = tiny
    config = tmp_path / "distillbench-tiny.json"
    config.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(config)
    network, _, transform = open_clip.create_model_and_transforms("distillbench-tiny", pretrained=str(path))
    images = pictures(3, 40, 48)
    captions = [*CAPTIONS, LONG]
    image, text = embeddings(network.eval(), transform, open_clip.get_tokenizer("distillbench-tiny")(captions), images)
    assert torch.allclose(ours.image_features(images), image, atol=1e-6)
    assert torch.allclose(ours.text_features(captions), text, atol=1e-6)
    assert np.ptp(ours.cosines(images, captions)) > 1e-3


def test_safetensors_are_read_as_well(tiny, tmp_path):
    path, ours = tiny
    other = tmp_path / "tiny.safetensors"
    save_file(torch.load(path, weights_only=True), other)
    again = ClipScore(Clip("openclip-tiny", TINY_CLIP), other, entry=entry(other))
    assert torch.equal(again.text_features(CAPTIONS), ours.text_features(CAPTIONS))


def test_the_score_is_the_raw_cosine_and_counts_captions_that_are_cut(tiny):
    _, ours = tiny
    captions = [*CAPTIONS, LONG]
    cosines = ours.cosines(pictures(3, 32, 32), captions)
    assert ours.too_long(captions) == [2]
    score = ours.score(cosines, captions, seeds=range(3))
    assert score.value == pytest.approx(cosines.mean())
    assert score.note == "1 of 3 captions are longer than 77 tokens and were cut"
    assert ours.score(cosines[:2], CAPTIONS).note == ""
    assert score.high is not None
    assert score.high - score.value == pytest.approx(1.96 * cosines.std(ddof=1) / 3**0.5)
    assert score.identity["metric"] == score.name == "clipcos/openclip-tiny"


def test_the_limit_is_counted_with_both_end_tokens(tiny):
    _, ours = tiny
    assert ours.too_long(["a " * 75, "a " * 76]) == [1]
    tokens = ours._tokens(["a " * 76], context_length=77)
    assert tokens[0, -1] == 49407  # the end token stays when a caption is cut


def test_embeddings_do_not_depend_on_the_batch(tiny):
    _, ours = tiny
    images = pictures(5, 33, 40)
    alone = torch.cat([ours.image_features(image[None]) for image in images])
    assert torch.allclose(alone, ours.image_features(images), atol=1e-5)


def test_bad_input_is_one_line(tiny, tmp_path):
    path, ours = tiny
    with pytest.raises(WeightsMissing, match=r"ViT-L-14\.pt: the weights openclip-l14-openai are not there; fetch them: curl -L"):
        ClipScore("openclip-l14-openai", tmp_path)
    with pytest.raises(BadFileError, match="not the weights openclip-l14-openai"):
        ClipScore("openclip-l14-openai", path)
    with pytest.raises(UsageError, match="unknown CLIP network"):
        ClipScore("ViT-B-32")
    foreign = tmp_path / "foreign.bin"
    foreign.write_bytes(b"no weights at all")
    other = tmp_path / "other.bin"
    torch.save({"weight": torch.zeros(2)}, other)
    for wrong in (foreign, other):
        with pytest.raises(BadFileError, match="not weights of openclip-tiny") as caught:
            ClipScore(Clip("openclip-tiny", TINY_CLIP), wrong, entry=entry(wrong))
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UsageError, match="2 images and 1 captions"):
        ours.cosines(pictures(2, 32, 32), CAPTIONS[:1])
    with pytest.raises(UsageError, match="give two or more"):
        ours.score([0.1], CAPTIONS[:1])
