"""HPSv2 through open_clip against hpsv2's own scorer, on a small network of the same family; the full size key by key."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from distillbench.errors import UsageError
from distillbench.metrics.published.clip import build_clip
from distillbench.metrics.published.hps import ARCHITECTURE, HpsScore
from distillbench.published_weights import WeightsMissing
from published_files import TINY_CLIP, entry, hpsv2_module, pictures, random_clip

MISSING = [name for name in ("open_clip", "torchvision") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
PROMPTS = ["a portrait of an old Sailor, oil on canvas", "Caf\u00e9 at night; 3 cats!!", "a long prompt about a castle on a hill " * 12]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: a dictionary of a training run, the weights under `state_dict`."""
    path = tmp_path_factory.mktemp("hps") / "hps.pt"
    torch.save({"epoch": 1, "name": "a run", "state_dict": random_clip(TINY_CLIP).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> HpsScore:
    return HpsScore("v2.1", checkpoint, architecture=TINY_CLIP, entry=entry(checkpoint))


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_scores_are_those_of_hpsv2s_own_scorer(checkpoint, ours, monkeypatch):
    fork: Any = hpsv2_module("hpsv2.src.open_clip", monkeypatch)
    scorer: Any = hpsv2_module("hpsv2.img_score", monkeypatch)
    monkeypatch.setattr(scorer, "device", "cpu")
    monkeypatch.setattr(
        scorer,
        "model_dict",
        {"model": fork.CLIP(**TINY_CLIP, output_dict=True), "preprocess_val": fork.image_transform(32, is_train=False)},
    )
    images = pictures(3, 40, 72)  # neither square nor of the network's size
    theirs = [scorer.score(pil(image), prompt, cp=str(checkpoint))[0] for image, prompt in zip(images, PROMPTS, strict=True)]
    cosines = ours.cosines(images, PROMPTS)
    assert cosines == pytest.approx(theirs, abs=1e-6)
    assert max(theirs) - min(theirs) > 1e-3
    assert ours.score(cosines, PROMPTS).value == pytest.approx(100 * sum(theirs) / 3, abs=1e-4)


def test_the_full_network_is_hpsv2s_fork_key_by_key(monkeypatch):
    fork: Any = hpsv2_module("hpsv2.src.open_clip", monkeypatch)
    with torch.device("meta"):
        ours, theirs = build_clip(ARCHITECTURE), fork.CLIP(**fork.get_model_config("ViT-H-14"))
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    assert len(shapes) == 686
    activations = [{type(module) for module in network.modules() if "GELU" in type(module).__name__} for network in (ours, theirs)]
    assert activations[0] == activations[1] == {torch.nn.GELU}


def test_prompts_are_tokenised_as_in_hpsv2(ours, monkeypatch):
    fork: Any = hpsv2_module("hpsv2.src.open_clip", monkeypatch)
    prompts = [*PROMPTS, "", "日本の 城 ☕", "it's the artists' 1999's <b>best</b> &amp; brightest"]
    assert torch.equal(ours._tokens(prompts, context_length=77), fork.get_tokenizer("ViT-H-14")(prompts))


def test_the_image_is_made_float_first_and_its_resize_antialiased(ours):
    image = pictures(1, 90, 120)[0]
    x = torch.nn.functional.interpolate(image[None] / 255, (32, 42), mode="bicubic", antialias=True)[0, :, :, 5:37]
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    assert torch.allclose(ours._transform(pil(image)), (x - mean) / deviation, atol=1e-5)
    plain = torch.nn.functional.interpolate(image[None] / 255, (32, 42), mode="bicubic")[0, :, :, 5:37]
    assert (plain - x).abs().mean() > 0.005  # the trap is real on such images
    assert any("antialias=True" in step for step in ours.preprocessing)


def test_the_two_versions_are_two_metrics(checkpoint, ours):
    older = HpsScore("v2.0", checkpoint, architecture=TINY_CLIP, entry=entry(checkpoint))
    assert (older.metric, ours.metric) == ("hps/v2.0-openclip-h14", "hps/v2.1-openclip-h14")
    assert older.score([0.2, 0.3], PROMPTS[:2]).key != ours.score([0.2, 0.3], PROMPTS[:2]).key


def test_the_score_is_on_the_scale_of_papers_and_counts_cut_prompts(ours):
    score = ours.score([0.2, 0.3, 0.25], PROMPTS)
    assert score.value == pytest.approx(25)
    assert score.note == "1 of 3 captions are longer than 77 tokens and were cut"
    assert score.identity["estimator"].startswith("mean of 100 x cosine")


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(WeightsMissing, match=r"HPS_v2\.1_compressed\.pt: the weights hps-v2\.1 are not there; fetch them: curl -L"):
        HpsScore("v2.1", tmp_path)
    with pytest.raises(UsageError, match="unknown version of HPS 'v2'"):
        HpsScore("v2")
