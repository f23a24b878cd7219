"""FID's features: the Inception network of 2015-12-05, through clean-fid's own resizers and networks. Three extractors, three metrics.

clean: PIL's bicubic to 299, antialiased, without rounding to whole levels.  legacy_tensorflow: the network's own bilinear resize without
antialiasing.  legacy_pytorch: torch's bilinear without antialiasing and the weights ported to PyTorch. Parmar et al. 2022
(arXiv:2104.11222) show that they differ by whole points. The distance is `metrics.frechet`, in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import BadFileError, UsageError, unknown
from ...published_weights import WEIGHTS, Weights, find
from ...torchvision_repair import repair_torchvision
from ..arrays import as_rows
from ..extractors import Extractor, check_images
from ..frechet import frechet_distance
from ..score import Score, bootstrap, identity
from . import first_line

WIDTH = 2048
CHUNK = 32  # images at once, whatever the caller's batch
# mode -> the weights it takes, and its steps in order
MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "clean": (
        "inception2015",
        ("each channel to 299 x 299: PIL bicubic, antialiased, in float32, clipped to 0..255 (clean-fid)", "(x - 128) / 128"),
    ),
    "legacy_tensorflow": ("inception2015", ("to 299 x 299: bilinear inside the network, not antialiased", "(x - 128) / 128 inside it")),
    "legacy_pytorch": (
        "inception2015-ported",
        ("to 299 x 299: torch bilinear, not antialiased, clipped to 0..255 (clean-fid)", "x / 255", "2 x - 1 inside the network"),
    ),
}


class Inception:
    """The 2048 pooled features of uint8 images (n, 3, h, w), as clean-fid takes them in `mode`; an `Extractor`, on any device.

    weights: the file, or a folder that holds it (default: `weights_folder()`).  entry: another one than the published, for tests.
    Raises WeightsMissing, or BadFileError for a wrong checksum; UsageError without the package clean-fid.
    """

    width = WIDTH

    def __init__(
        self, mode: str = "clean", weights: Path | str | None = None, *, device: torch.device | str = "cpu", entry: Weights | None = None
    ):
        if mode not in MODES:
            raise unknown("mode of FID", mode, MODES)
        published, self.preprocessing = MODES[mode]
        found = find(entry or WEIGHTS[published], weights)
        self.name = f"{mode}-inception2015@299"
        self.weights_sha256: str | None = found.sha256
        self._device = torch.device(device)
        cleanfid = _clean_fid()
        with warnings.catch_warnings():  # clean-fid's torch resizer turns all warnings off for good
            self._resize = cast("Callable[[np.ndarray], np.ndarray]", cleanfid.resize.build_resizer(mode))
        network = _ported(cleanfid, found.path) if mode == "legacy_pytorch" else _archive(cleanfid, found.path, mode == "legacy_tensorflow")
        self._network = network.eval().requires_grad_(False).to(self._device)
        self._takes_unit_range = mode == "legacy_pytorch"

    @property
    def metric(self) -> str:
        return f"fid/{self.name}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        return torch.cat([self._features(chunk) for chunk in images.cpu().split(CHUNK)])

    def _features(self, images: Tensor) -> Tensor:
        resized = np.stack([self._resize(image) for image in images.permute(0, 2, 3, 1).numpy()])
        x = torch.from_numpy(resized).float().permute(0, 3, 1, 2).contiguous().to(self._device)
        features = self._network(x / 255)[0] if self._takes_unit_range else self._network(x)
        return features.flatten(1).float().cpu()


def fid_score(
    extractor: Extractor,
    generated: Any,
    reference: Any,
    *,
    reference_sha256: str,
    seeds: Sequence[int] = (),
    prompts_sha256: str | None = None,
    resamples: int = 0,
) -> Score:
    """FID of features (n, 2048) against (m, 2048) of the same extractor.

    `resamples` of the bootstrap give an interval, over the generated images alone; each costs a distance. 0: no interval.
    """
    rows, others = as_rows(generated, "generated features", 2), as_rows(reference, "reference features", 2)
    score = Score(
        f"fid/{extractor.name}",
        identity(
            f"fid/{extractor.name}",
            estimator="Fréchet distance, covariances with n - 1",
            extractor=extractor.name,
            weights_sha256=extractor.weights_sha256,
            preprocessing=extractor.preprocessing,
            n_generated=len(rows),
            n_reference=len(others),
            reference_sha256=reference_sha256,
            prompts_sha256=prompts_sha256,
            seeds=seeds,
        ),
        frechet_distance(rows, others),
        None,
        None,
        len(rows),
        False,
    )
    if not resamples:
        return score
    return score.with_interval(bootstrap(lambda drawn: frechet_distance(drawn, others), [rows], resamples=resamples, seed=0))


class TorchmetricsFeatures(nn.Module):
    """An extractor as the `feature=` of torchmetrics' image metrics: uint8 images in, features out.

        FrechetInceptionDistance(feature=TorchmetricsFeatures(Inception("clean")))

    There the images are uint8 and `normalize` is left False. torchmetrics sums in float64, so the distance agrees with ours.
    """

    def __init__(self, extractor: Extractor):
        super().__init__()
        self.num_features = extractor.width
        self._extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        return self._extractor(images).to(images.device)


def _clean_fid() -> Any:
    repair_torchvision()
    try:
        import cleanfid
        import cleanfid.inception_pytorch
        import cleanfid.inception_torchscript
        import cleanfid.resize
    except ImportError as error:
        raise UsageError(f"FID needs clean-fid, which cannot be imported ({error}): pip install 'distillbench[published]'") from None
    return cleanfid


def _archive(cleanfid: Any, path: Path, resize_inside: bool) -> nn.Module:
    """clean-fid's wrapper around the TorchScript archive, without its constructor: that knows one file name, in one folder, unchecked."""
    wrapper = cleanfid.inception_torchscript.InceptionV3W.__new__(cleanfid.inception_torchscript.InceptionV3W)
    nn.Module.__init__(wrapper)
    try:
        wrapper.base = torch.jit.load(str(path), map_location="cpu").eval()
        wrapper.layers = wrapper.base.layers
    except (RuntimeError, AttributeError) as error:
        raise BadFileError(f"{path}: not the TorchScript archive of Inception ({first_line(error)})") from None
    wrapper.resize_inside = resize_inside
    return cast(nn.Module, wrapper)


def _ported(cleanfid: Any, path: Path) -> nn.Module:
    """clean-fid's PyTorch network. It fetches its weights while it is built; here its fetching function hands out the checked file."""
    module = cleanfid.inception_pytorch
    fetch = module.load_state_dict_from_url
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict_from_url = lambda *_args, **_kwargs: state
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arguments that torchvision has renamed
            return cast(nn.Module, module.InceptionV3(output_blocks=[3], resize_input=False))
    except Exception as error:  # torch.load raises anything on a foreign file
        raise BadFileError(f"{path}: weights that do not fit Inception ({first_line(error)})") from None
    finally:
        module.load_state_dict_from_url = fetch
