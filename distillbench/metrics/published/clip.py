"""CLIP score: the cosine between the embeddings of an image and its caption, by open_clip on local weights.

The raw cosine, mean over images: no factor 100 or 2.5, no clamp at 0, no prefix, no logit scale. Each of those is another number that
papers also call CLIP score. Captions longer than the network reads are counted and said in the score's note.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import BadFileError, UsageError, unknown
from ...published_weights import WEIGHTS, Weights, find
from ...torchvision_repair import repair_torchvision
from ..arrays import Array, as_float64
from ..extractors import check_images
from ..score import Score, identity
from . import first_line

CHUNK = 32
CUT = "captions beyond the context are cut, the end token kept"


@dataclass(frozen=True)
class Clip:
    """A published network: the configuration that open_clip has for it, and whether its file is OpenAI's TorchScript archive."""

    name: str
    architecture: str | dict[str, Any]
    openai: bool = False


CLIPS = {
    clip.name: clip
    for clip in (
        Clip("openclip-b32-openai", "ViT-B-32-quickgelu", openai=True),
        Clip("openclip-l14-openai", "ViT-L-14-quickgelu", openai=True),
        Clip("openclip-g14-laion2b-s12b-b42k", "ViT-g-14"),
        Clip("openclip-bigg14-laion2b-s39b-b160k", "ViT-bigG-14"),
    )
}


class ClipScore:
    """Cosines between images and captions on a network of `CLIPS`, in float32.

    weights: the file, or a folder that holds it.  clip, entry: others than the published ones, for tests.
    Raises WeightsMissing, or BadFileError for a wrong checksum; UsageError without the package open_clip.
    """

    factor = 1.0

    def __init__(
        self,
        clip: Clip | str,
        weights: Path | str | None = None,
        *,
        device: torch.device | str = "cpu",
        entry: Weights | None = None,
    ):
        if isinstance(clip, str):
            if clip not in CLIPS:
                raise unknown("CLIP network", clip, CLIPS)
            clip = CLIPS[clip]
        found = find(entry or WEIGHTS[clip.name], weights)
        self.name = clip.name
        self.weights_sha256 = found.sha256
        self._device = torch.device(device)
        self._network: Any = load_clip(clip, found.path).eval().requires_grad_(False).to(self._device)
        self._tokens = tokenizer()
        self._transform, self.preprocessing = self._reading(int(_side(self._network)))

    @property
    def metric(self) -> str:
        return f"clipcos/{self.name}"

    def too_long(self, captions: Sequence[str]) -> list[int]:
        """The places of captions that the network reads only the beginning of."""
        room = int(self._network.context_length) - 2  # a start and an end token
        return [i for i, caption in enumerate(captions) if len(self._tokens.encode(caption)) > room]

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Unit embeddings (n, d) float32 of uint8 images (n, 3, h, w), on the CPU."""
        check_images(images)
        parts = []
        for chunk in images.cpu().split(CHUNK):
            x = torch.stack([self._transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in chunk])
            parts.append(self._network.encode_image(x.to(self._device), normalize=True).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Unit embeddings (n, d) float32 of captions, on the CPU; the text is cut where `too_long` says, its end token kept."""
        tokens = self._tokens(list(captions), context_length=int(self._network.context_length))
        return torch.cat([self._network.encode_text(part.to(self._device), normalize=True).float().cpu() for part in tokens.split(CHUNK)])

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Array:
        """The cosine (n,) of each image with its caption, summed in float64."""
        if len(images) != len(captions):
            raise UsageError(f"{self.metric}: {len(images)} images and {len(captions)} captions; give one for each image")
        return np.einsum("nd,nd->n", as_float64(self.image_features(images)), as_float64(self.text_features(captions)))

    def score(self, cosines: Any, captions: Sequence[str], *, seeds: Sequence[int] = (), prompts_sha256: str | None = None) -> Score:
        """The mean of cosines (n,), n at least 2, times `factor`; the interval is that of a mean of independent images."""
        values = as_float64(cosines, "cosines") * self.factor
        if values.ndim != 1 or len(values) < 2 or len(values) != len(captions):
            raise UsageError(f"{self.metric}: cosines of shape {values.shape} for {len(captions)} captions; give two or more, one for each")
        cut = len(self.too_long(captions))
        note = f"{cut} of {len(captions)} captions are longer than {self._network.context_length} tokens and were cut" if cut else ""
        recipe = identity(
            self.metric,
            estimator=f"mean of {self.factor:g} x cosine; {CUT}",
            extractor=self.name,
            weights_sha256=self.weights_sha256,
            preprocessing=self.preprocessing,
            dtype="float32",
            n_generated=len(values),
            prompts_sha256=prompts_sha256,
            seeds=seeds,
        )
        score = Score(self.metric, recipe, float(values.mean()), None, None, len(values), True, note=note)
        return score.with_interval(float(values.std(ddof=1)) / math.sqrt(len(values)))

    def _reading(self, side: int) -> tuple[Any, tuple[str, ...]]:
        """How a PIL image becomes what the network takes, as a function and in words."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        steps = (
            f"shorter side to {side}: PIL bicubic, antialiased, whole levels",
            f"centre {side} x {side}",
            "x / 255",
            "minus OpenAI's mean, by its deviation",
        )
        return image_transform_v2(PreprocessCfg(size=(side, side)), is_train=False), steps


def load_clip(clip: Clip, path: Path) -> nn.Module:
    """The network with the weights of a checked file, float32 on the CPU; raises BadFileError where they do not fit."""
    open_clip = _open_clip()
    try:
        if clip.openai:
            return open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
        network = build_clip(clip.architecture)
        open_clip.load_checkpoint(network, str(path), strict=True, weights_only=True)
        return network
    except Exception as error:  # torch.load raises anything on a foreign file
        raise BadFileError(f"{path}: not weights of {clip.name} ({first_line(error)})") from None


def build_clip(architecture: str | dict[str, Any]) -> nn.Module:
    """open_clip's network of that configuration (its name, or the dictionary itself), with weights that mean nothing."""
    open_clip = _open_clip()
    config = open_clip.get_model_config(architecture) if isinstance(architecture, str) else dict(architecture)
    with torch.random.fork_rng(devices=[]):
        return open_clip.model.CLIP(**config)


def tokenizer() -> Any:
    """CLIP's byte-pair tokenizer, which open_clip ships."""
    _open_clip()
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _open_clip() -> Any:
    repair_torchvision()
    try:
        import open_clip
    except ImportError as error:
        raise UsageError(
            f"CLIP score and HPSv2 need open_clip, which cannot be imported ({error}): pip install 'distillbench[published]'"
        ) from None
    return open_clip


def _side(network: Any) -> int:
    size = network.visual.image_size
    return size[0] if isinstance(size, (tuple, list)) else size
