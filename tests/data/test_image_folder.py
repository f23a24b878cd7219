"""Folders of pictures as programs leave them: every deviation is counted or named, nothing is guessed, nothing is held in memory."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distillbench.data.image_folder import ImageFolder, set_sha256
from distillbench.errors import UsageError

RED = (255, 0, 0)


def noise(seed: int, h: int = 8, w: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def fill(folder, n: int, h: int = 8, w: int = 8):
    for k in range(n):
        Image.fromarray(noise(k, h, w)).save(folder / f"{k:03d}.png")
    return folder


def read(images: ImageFolder, batch: int = 64, **options) -> np.ndarray:
    return np.concatenate([part.images.permute(0, 2, 3, 1).numpy() for part in images.batches(batch, **options)])


def png(h: int, w: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG file by hand, for what PIL cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_come_in_the_order_of_their_names_whatever_the_batch(tmp_path):
    (tmp_path / "b").mkdir()
    for k, name in enumerate(["b/1.png", "a.png", "b/0.bmp", "c.PNG"]):
        Image.fromarray(noise(k)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("neither")
    images = ImageFolder(tmp_path)
    assert images.names == ("a.png", "b/0.bmp", "b/1.png", "c.PNG")
    assert (images.size, images.found, images.ignored, len(images)) == ((8, 8), 4, 1, 4)
    for batch in (1, 3, 4, 9):
        parts = list(images.batches(batch))
        assert [len(part.names) for part in parts] == [len(images.names[at : at + batch]) for at in range(0, 4, batch)]
        np.testing.assert_array_equal(read(images, batch), np.stack([noise(k) for k in (1, 2, 0, 3)]))
    images.require(4)
    assert "1 other files ignored" in images.summary()


def test_each_file_is_known_by_its_content(tmp_path):
    fill(tmp_path, 3)
    (tmp_path / "twin.png").write_bytes((tmp_path / "001.png").read_bytes())
    (part,) = ImageFolder(tmp_path).batches()
    assert part.sha256 == tuple(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in part.names)
    assert part.sha256[1] == part.sha256[3]
    assert set_sha256(list(part.sha256)) != set_sha256(list(part.sha256[::-1]))
    (skipped,) = ImageFolder(tmp_path).batches(skip=lambda sha256: sha256 == part.sha256[1])
    assert (skipped.names, skipped.rows, len(skipped.images)) == (part.names, (0, 2), 2)
    (none,) = ImageFolder(tmp_path).batches(skip=lambda sha256: True)
    assert tuple(none.images.shape) == (0, 3, 8, 8)


def test_the_folder_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    images = ImageFolder(fill(tmp_path, 40))
    decoded = []
    original = ImageFolder._decode
    monkeypatch.setattr(ImageFolder, "_decode", lambda self, content: decoded.append(1) or original(self, content))
    stream = images.batches(5)
    next(stream)
    assert len(decoded) <= 10
    stream.close()


def test_the_first_n_are_read_and_fewer_are_refused(tmp_path):
    fill(tmp_path, 5)
    assert ImageFolder(tmp_path, n=3).names == ("000.png", "001.png", "002.png")
    with pytest.raises(UsageError, match="holds 5 images and 6 are needed"):
        ImageFolder(tmp_path, n=6)


def test_no_folder_no_images(tmp_path):
    with pytest.raises(UsageError, match="holds no images"):
        ImageFolder(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"holds no images .*only 1 other files"):
        ImageFolder(tmp_path)
    with pytest.raises(UsageError, match="is not there"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(UsageError, match="is a file"):
        ImageFolder(tmp_path / "notes.txt")


def test_alpha_is_laid_on_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., :3], rgba[:4, :, 3], rgba[4, :, 3] = RED, 255, 128
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("LA", (8, 8), (10, 0)).save(tmp_path / "grey.png")
    Image.new("RGB", (8, 8), RED).save(tmp_path / "keyed.png", transparency=RED)
    images = ImageFolder(tmp_path)
    found = dict(zip(images.names, read(images), strict=True))
    assert images.converted == {"with alpha": 4, "grey": 1}
    assert found["rgba.png"][:, 0].tolist() == [list(RED)] * 4 + [[255, 127, 127]] + [[255, 255, 255]] * 3
    for name in ("palette.png", "grey.png", "keyed.png"):
        assert (found[name] == 255).all(), name


def test_sixteen_bits_and_grey_are_converted_and_counted(tmp_path):
    values = np.array([[0, 255, 256, 32767, 32768, 65279, 65280, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey16.png")
    Image.fromarray(values).save(tmp_path / "grey16.tif")
    rows = b"\0" + b"".join(struct.pack(">HHH", v, 0, v) for v in values[0].tolist())
    (tmp_path / "rgb16.png").write_bytes(png(1, 8, 16, 2, rows))
    Image.fromarray((values >> 8).astype(np.uint8)).save(tmp_path / "grey8.png")
    Image.new("CMYK", (8, 1)).save(tmp_path / "print.jpg")
    images = ImageFolder(tmp_path)
    found = dict(zip(images.names, read(images), strict=True))
    assert images.converted == {"16-bit": 3, "grey": 3, "in other colours": 1}
    upper = (values[0] >> 8).tolist()
    for name in ("grey16.png", "grey16.tif", "grey8.png"):
        assert found[name][0].tolist() == [[v, v, v] for v in upper], name
    assert found["rgb16.png"][0].tolist() == [[v, 0, v] for v in upper]
    assert "3 16-bit" in images.summary()


def test_what_cannot_be_read_is_named_and_n_is_not_pretended(tmp_path):
    fill(tmp_path, 6)
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    (tmp_path / "003.png").write_bytes(b"")
    (tmp_path / "004.png").write_text("no image at all")
    (tmp_path / "006.tif").symlink_to(tmp_path / "missing")
    frames = [Image.fromarray(noise(k)) for k in (7, 8)]
    frames[0].save(tmp_path / "007.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "008.tif")
    images = ImageFolder(tmp_path)
    assert set(images.unreadable) == {"003.png", "004.png", "006.tif", "007.webp"}
    np.testing.assert_array_equal(read(images, 2), np.stack([noise(k) for k in (0, 1, 5)]))
    assert "truncated" in images.unreadable["002.png"]
    assert images.unreadable["007.webp"] == "holds several frames"
    assert "floating point" in images.unreadable["008.tif"]
    assert len(images) == 3
    with pytest.raises(UsageError, match=r"has 3 usable images of the 9 needed: 002.png \(.*\), 003.png .* and 3 more cannot be read"):
        images.require()
    images.require(3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's remarks on damaged tags
def test_damage_at_any_place_is_an_unreadable_file_or_another_picture_never_a_crash(tmp_path):
    chance = random.Random(0)
    for ending in ("png", "jpg", "webp", "bmp", "tif", "ppm"):
        Image.fromarray(noise(1, 16, 16)).save(tmp_path / f"whole.{ending}")
        content = (tmp_path / f"whole.{ending}").read_bytes()
        for k in range(40):
            damaged = bytearray(content)
            for _ in range(1 + k % 4):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            cut = len(damaged) if k % 2 else chance.randrange(len(damaged))
            (tmp_path / f"{k:02d}.{ending}").write_bytes(damaged[:cut])
    images = ImageFolder(tmp_path, resize=16)
    seen = read(images)
    assert len(seen) == len(images) == len(images.names) - len(images.unreadable)
    assert 6 <= len(seen) < len(images.names)


def test_mixed_sizes_are_named_unless_a_size_is_given(tmp_path):
    fill(tmp_path, 3, 8, 8)
    Image.fromarray(noise(9, 12, 20)).save(tmp_path / "wide.png")
    with pytest.raises(UsageError, match=r"images of 2 sizes \(8 x 8: 3, as 000.png; 20 x 12: 1, as wide.png\)"):
        ImageFolder(tmp_path)
    images = ImageFolder(tmp_path, resize=6, kernel="bicubic")
    assert images.size == (6, 6)
    middle = Image.fromarray(noise(9, 12, 20)[:, 4:16]).resize((6, 6), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(read(images)[3], np.asarray(middle))
    assert any("PIL bicubic, antialiased, to 6 x 6" in step for step in images.reading)
    with pytest.raises(UsageError, match="resized to 1 pixel or more by lanczos"):
        ImageFolder(tmp_path, resize=6, kernel="magic")


def test_a_file_that_changes_its_size_while_it_is_read_is_named(tmp_path):
    images = ImageFolder(fill(tmp_path, 2))
    Image.fromarray(noise(1, 9, 9)).save(tmp_path / "001.png")
    assert len(read(images)) == 1
    assert images.unreadable == {"001.png": "changed while it was read"}
