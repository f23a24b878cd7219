"""The feature extractor of the track `digits`: a small convolutional classifier, trained apart from every teacher and student.

It sees the 4,000 training images only. `train` makes its files again; the loader refuses files that do not match the card.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ..api import external
from ..data.digits import CLASSES, digits_sha256, load_digits
from ..errors import BadFileError
from ..randomness import generator_for

FOLDER = Path(__file__).parent / "weights" / "digits-classifier"
FILE = "network.safetensors"
WIDTH = 64
CHUNK = 250


class DigitsClassifier(nn.Module):
    """Three 3x3 convolutions and a linear layer to 64 features, of which the logits are a linear map after GELU. About 76k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 24), (24, 48), (48, 64)))
        self.to_features = nn.Linear(64 * 3 * 3, WIDTH)
        self.to_logits = nn.Linear(WIDTH, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """(n, 1, 28, 28) in [-1, 1] -> (n, 64): the penultimate layer before its activation."""
        for convolution in self.convolutions:
            x = F.avg_pool2d(F.gelu(convolution(x)), 2)
        return self.to_features(x.flatten(1))

    def logits(self, features: Tensor) -> Tensor:
        """(n, 64) -> (n, 10)"""
        return self.to_logits(F.gelu(features))


@torch.no_grad()
def features_of(x: Tensor, classifier: DigitsClassifier | None = None) -> Tensor:
    """Features (n, 64) of images (n, 1, 28, 28) in [-1, 1], float32, in chunks of a fixed size."""
    net = load_classifier() if classifier is None else classifier
    return torch.cat([net.features(chunk) for chunk in x.float().cpu().split(CHUNK)])


@torch.no_grad()
def labels_of(features: Tensor, classifier: DigitsClassifier | None = None) -> Tensor:
    """The class (n,) that the classifier sees in features (n, 64)."""
    net = load_classifier() if classifier is None else classifier
    return net.logits(features).argmax(1)


@cache
def load_classifier(folder: Path = FOLDER) -> DigitsClassifier:
    """The shipped classifier, frozen. Raises BadFileError if its weights do not match the card."""
    path = folder / FILE
    try:
        content = path.read_bytes()
        stated = json.loads((folder / "card.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise BadFileError(f"{folder}: the digits classifier cannot be read ({error}): install distillbench again") from error
    if sha256(content).hexdigest() != stated:
        raise BadFileError(f"{path}: checksum differs from its card, so the file is damaged or changed: install distillbench again")
    net = DigitsClassifier()
    try:
        net.load_state_dict(safetensors.torch.load(content))
    except (SafetensorError, RuntimeError) as error:
        raise BadFileError(f"{path}: not the weights of the digits classifier: install distillbench again") from error
    external(net)
    return net


def classifier_sha256(folder: Path = FOLDER) -> str:
    """The checksum that the card states: part of the identity of every score on these features."""
    return str(json.loads((folder / "card.json").read_text())["sha256"])


def accuracy(classifier: DigitsClassifier, split: str = "held-out") -> float:
    """Share of the split's images whose label the classifier gets right."""
    digits = load_digits(split)
    return (labels_of(features_of(digits.images, classifier), classifier) == digits.labels).double().mean().item()


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images turned by up to 10 degrees, scaled by up to 10 % and shifted by up to 2 pixels, each by its own random amount."""
    angle, scale, dx, dy = torch.rand(4, len(x), generator=generator) * 2 - 1
    angle, scale = angle * math.radians(10), 1 + 0.1 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, dx * 2 / 14], 1), torch.stack([sin, cos, dy * 2 / 14], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train(folder: Path, progress: Callable[[str], None], *, steps: int = 2500, seed: int = 0) -> dict:
    """Train the classifier (batch 64, AdamW, cosine), save it with its card into `folder` and return the card."""
    start = time.perf_counter()
    digits = load_digits("train")
    generator = generator_for(seed, "digits-classifier/train", 0)
    net = DigitsClassifier()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
        else:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        picked = torch.randint(len(digits), (64,), generator=generator)
        features = net.features(augmented(digits.images[picked], generator))
        kept = (torch.rand(features.shape, generator=generator) > 0.2).float() / 0.8
        loss = F.cross_entropy(net.logits(features * kept), digits.labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 250 == 0:
            progress(f"step {step + 1} of {steps}, loss {loss.item():.4f}")
    net.eval()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(net.state_dict(), folder / FILE)
    card = {
        "name": "digits-classifier",
        "what": "feature extractor (64 features before the activation of the penultimate layer) and label judge of the track digits",
        "recipe": f"distillbench zoo train digits-classifier (seed {seed}, {steps} steps of 64 images)",
        "augmentation": "turned by up to 10 degrees, scaled by up to 10 %, shifted by up to 2 pixels; dropout 0.2 on the features",
        "data": {"digits": digits_sha256(), "split": "train"},
        "parameters": sum(p.numel() for p in net.parameters()),
        "held_out_accuracy": accuracy(net),
        "train_accuracy": accuracy(net, "train"),
        "seconds": round(time.perf_counter() - start, 1),
        "threads": torch.get_num_threads(),
        "licence": "Apache-2.0; trained on MNIST",
        "sha256": sha256((folder / FILE).read_bytes()).hexdigest(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
