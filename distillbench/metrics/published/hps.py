"""HPSv2 (Wu et al. 2023, arXiv:2306.09341): 100 x the cosine between image and prompt on a ViT-H/14 tuned to human choices.

On open_clip's ViT-H-14 and the published checkpoint. v2.0 and v2.1 are two metrics on two scales. As hpsv2 does, the image becomes a
float tensor before it is resized; torchvision before 0.17 did not antialias that resize, so numbers published then differ from these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import unknown
from ...published_weights import WEIGHTS, Weights
from .clip import Clip, ClipScore

VERSIONS = ("v2.0", "v2.1")
ARCHITECTURE = "ViT-H-14"


class HpsScore(ClipScore):
    """HPS of images and prompts, version "v2.0" or "v2.1"; `cosines` gives the raw cosines, `score` their mean times 100.

    weights: the file, or a folder that holds it.  architecture, entry: others than the published ones, for tests.
    """

    factor = 100.0

    def __init__(
        self,
        version: str = "v2.1",
        weights: Path | str | None = None,
        *,
        device: torch.device | str = "cpu",
        architecture: str | dict[str, Any] = ARCHITECTURE,
        entry: Weights | None = None,
    ):
        if version not in VERSIONS:
            raise unknown("version of HPS", version, VERSIONS)
        super().__init__(Clip(f"{version}-openclip-h14", architecture), weights, device=device, entry=entry or WEIGHTS[f"hps-{version}"])

    @property
    def metric(self) -> str:
        return f"hps/{self.name}"

    def _reading(self, side: int) -> tuple[Any, tuple[str, ...]]:
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

        transform = Compose(
            [
                ToTensor(),
                Resize(side, interpolation=InterpolationMode.BICUBIC, antialias=True),
                CenterCrop(side),
                Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
            ]
        )
        return transform, (
            "x / 255",
            f"shorter side to {side}: torchvision on float tensors, bicubic, antialias=True",
            f"centre {side} x {side}",
            "minus OpenAI's mean, by its deviation",
        )
