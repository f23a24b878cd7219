"""Stand-ins for the published weights: networks of the real architecture or family with fixed random weights, in the published formats."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.networks.files import sha256_file
from distillbench.published_weights import Weights
from distillbench.torchvision_repair import repair_torchvision

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 24, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TRUNK = [
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2", "Mixed_5b", "Mixed_5c",
    "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool",
]  # fmt: skip


def entry(path: Path, sha256: str | None = "its own") -> Weights:
    """An entry of the table for a file of ours; `sha256` None: it must be stated beside."""
    return Weights(path.stem, path.name, f"https://example.org/{path.name}", sha256_file(path) if sha256 == "its own" else sha256, 1)


def pictures(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 images (n, 3, height, width): smooth colours under noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return ((0.85 * smooth + 0.15 * torch.rand(n, 3, height, width, generator=generator)) * 255).to(torch.uint8)


def inception_state() -> dict[str, Tensor]:
    """Random weights under the names and shapes of Inception v3 with 1008 classes, such that no activation dies or explodes."""
    repair_torchvision()
    from torchvision.models import inception_v3

    with torch.device("meta"):
        shapes = inception_v3(num_classes=1008, aux_logits=False, init_weights=False, weights=None).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, meta in shapes.items():
        noise = torch.randn(meta.shape, generator=generator) if meta.dtype.is_floating_point else torch.zeros(meta.shape)
        if name.endswith("num_batches_tracked"):
            state[name] = noise.long()
        elif meta.dim() > 1:
            state[name] = noise * (2 / meta[0].numel()) ** 0.5
        else:
            state[name] = (1 if name.endswith(("weight", "running_var")) else 0) + 0.1 * noise
    return state


def fidelity_inception(weights: Path) -> nn.Module:
    """torch-fidelity's Inception on the ported file: a strict load, so names and shapes are equal."""
    repair_torchvision()
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )


def trunk(network: nn.Module, x: Tensor) -> Tensor:
    """Pooled features of what is already 299 x 299 and normalised."""
    for name in TRUNK:
        x = getattr(network, name)(x)
    return x


class Trunk(nn.Module):
    """`trunk` as a module."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return trunk(self.network, x)


class Archive(nn.Module):
    """What the TorchScript archive offers: `layers`, and a call that resizes and normalises by itself."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = nn.functional.interpolate(img, size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers((x - 128) / 128)


def save_inception_archive(network: nn.Module, path: Path) -> None:
    with torch.no_grad():
        layers = torch.jit.trace(Trunk(network), torch.zeros(2, 3, 299, 299), check_trace=False)
    torch.jit.script(Archive(layers).eval()).save(str(path))


def random_clip(architecture: str | dict[str, Any]) -> nn.Module:
    """open_clip's network with fixed random weights."""
    from distillbench.metrics.published.clip import build_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_clip(architecture).eval().requires_grad_(False)


def save_openai_archive(network: nn.Module, path: Path) -> None:
    """The weights in half precision as OpenAI published them: a TorchScript archive with three numbers among the tensors."""
    from open_clip.model import convert_weights_to_fp16

    convert_weights_to_fp16(network)
    root = nn.Module()
    numbers = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}
    for name, value in {**network.state_dict(), **numbers}.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, value.clone())
    torch.jit.script(root).save(str(path))


def hpsv2_module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of hpsv2, or a skip that says why. clint, which it wants for progress bars alone, may be absent."""
    if importlib.util.find_spec("hpsv2") is None:
        pytest.skip("hpsv2 is not installed: pip install --no-deps hpsv2x")
    if "clint" not in sys.modules and importlib.util.find_spec("clint") is None:
        textui = types.ModuleType("clint.textui")
        textui.progress = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "clint", types.ModuleType("clint"))
        monkeypatch.setitem(sys.modules, "clint.textui", textui)
    repair_torchvision()
    return importlib.import_module(name)
