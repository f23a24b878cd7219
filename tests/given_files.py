"""Stand-ins for what users bring: an emoji package, data in the layout of the published protocols, folders of pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillbench.data import emoji
from distillbench.records import RunRecord
from distillbench.store import Store

CATEGORIES = ("Flags", "Objects")
NAMES = ("RED BALL", "Blue flag", "box", "STAR OF NIGHT")


def picture(seed: int, h: int, w: int) -> Image.Image:
    """Coarse colours under noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 12, (h, w, 3)), 0, 255).astype(np.uint8))


def emoji_files(n: int = 24) -> dict[str, bytes]:
    """path in the package -> content: n drawings, the first clear in its corner; a variant, a swatch and one that Google lacks."""
    listed, files = [], {}
    for k in range(n):
        image = picture(k, 64, 64).convert("RGBA")
        if k == 0:
            image.putpixel((0, 0), (0, 0, 0, 0))
        content = io.BytesIO()
        image.save(content, "png")
        files[f"img/google/64/{k:04x}.png"] = content.getvalue()
        listed.append({"name": f"{NAMES[k % 4]} {k // 4}", "image": f"{k:04x}.png", "category": CATEGORIES[k % 2], "has_img_google": True})
    listed[1]["skin_variations"] = {"1F3FB": {"image": "0001-1f3fb.png", "has_img_google": True}}
    listed.append({"name": "SWATCH", "image": "1f3fb.png", "category": "Component", "has_img_google": True})
    listed.append({"name": "OF OTHERS", "image": "ffff.png", "category": "Flags", "has_img_google": False})
    files["img/google/64/0001-1f3fb.png"] = files["img/google/64/1f3fb.png"] = files["img/google/64/0001.png"]
    files["img/apple/64/0000.png"] = b"not to be read"
    files["package.json"] = json.dumps({"name": emoji.PACKAGE.name, "version": emoji.PACKAGE.version}).encode()
    files["emoji.json"] = json.dumps(list(reversed(listed))).encode()
    return files


def write_files(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_archive(files: dict[str, bytes], path: Path) -> Path:
    """As npm packs it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def expect_emoji(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], n: int = 24) -> str:
    """Have the reader expect this stand-in, its checksum worked out by other means; returns that."""
    listed = sorted(
        (e for e in json.loads(files["emoji.json"]) if e["has_img_google"] and e["category"] != "Component"), key=lambda e: e["image"]
    )
    lines = [
        f"{e['image']} {hashlib.sha256(files['img/google/64/' + e['image']]).hexdigest()} {e['category']} {e['name'].lower()}"
        for e in listed
    ]
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    monkeypatch.setattr(emoji, "PACKAGE", dataclasses.replace(emoji.PACKAGE, count=n, sha256=sha256))
    emoji.load_emoji.cache_clear()
    return sha256


def write_data(folder: Path, captions: list[str], *, images: int = 10, h: int = 24, w: int = 20, training: bool = True) -> Path:
    """prompts.txt, reference/ and training/ as the published protocols have them, the pictures not square."""
    (folder / "reference" / "part").mkdir(parents=True)
    for k in range(images):
        picture(100 + k, h, w).save(folder / "reference" / (f"part/{k}.png" if k % 2 else f"{k}.png"))
    if captions:
        (folder / "prompts.txt").write_text("\n".join(captions) + "\n")
    if training:
        (folder / "training/images").mkdir(parents=True)
        for k in range(4):
            picture(200 + k, h, w).save(folder / f"training/images/{k}.png")
        (folder / "training/captions.txt").write_text("a\nbc\nd\nef\n")
    return folder


def paint(folder, n, seed, *, side=16, shift=0):
    """n pictures, smooth enough that their features differ by more than noise."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(n):
        small = random.integers(0, 200, (4, 4, 3)) + shift
        Image.fromarray(small.astype(np.uint8)).resize((side, side)).save(folder / f"{i:03d}.png")
    return folder


def only(tmp_path: Path) -> RunRecord:
    """The one record of the store there."""
    (record,) = Store(tmp_path / "store").records()
    return record
