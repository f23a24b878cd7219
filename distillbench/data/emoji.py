"""1,906 colour drawings of 64 x 64 pixels with their names: Google's Noto emoji, from the package emoji-datasource-google 16.0.0 of npm.

    npm pack emoji-datasource-google@16.0.0

`load_emoji` takes the .tgz that this writes, or the folder that it unpacks to. Of the package it reads `package.json`, `emoji.json` and
`img/google/64`, and nothing of other vendors. Skin-tone variants and the swatches of skin tones are left out: they would be the same
drawing up to six times. Nothing is shipped here: LICENCE and the card of `EmojiSet` say what the drawings are under.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import BadFileError, UsageError
from ..randomness import mix, name_key

SIDE = 64
IMAGES = "img/google/64"
LEFT_OUT = "Component"  # category of the swatches
HELD_OUT = 4  # one drawing in so many
FETCH = "npm pack emoji-datasource-google@16.0.0"
LICENCE = "drawings: Noto Emoji by Google, Apache-2.0; names and categories: emoji-data, MIT"


@dataclass(frozen=True)
class Package:
    """What must be found. count: drawings that are read.  sha256: of their names, pixels' files and captions, as `EmojiSet.sha256`."""

    name: str
    version: str
    count: int
    sha256: str


PACKAGE = Package("emoji-datasource-google", "16.0.0", 1906, "23650b9420964cafb3e62cf9f84c5802a9538a2e8d671b26703acf0e9891db70")


@dataclass(frozen=True)
class EmojiSet:
    """images: uint8 (n, 3, 64, 64), on white.  captions: what each shows, in lower case.  labels: int64 (n,), places in `categories`.

    held_out: bool (n,), never trained on; drawings that are alike to the last bit are on one side.  sha256: of all of it.
    """

    images: Tensor
    captions: tuple[str, ...]
    labels: Tensor
    categories: tuple[str, ...]
    held_out: Tensor
    sha256: str

    def __len__(self) -> int:
        return len(self.captions)

    def split(self, held_out: bool) -> EmojiSet:
        """The drawings of one side."""
        rows = torch.nonzero(self.held_out == held_out).flatten()
        captions = tuple(self.captions[row] for row in rows.tolist())
        return EmojiSet(self.images[rows], captions, self.labels[rows], self.categories, self.held_out[rows], self.sha256)

    @cached_property
    def card(self) -> dict[str, Any]:
        """Where the drawings come from and under which licence, how many there are, and the checksum."""
        return {
            "name": "emoji",
            "source": f"{PACKAGE.name} {PACKAGE.version} of npm, {IMAGES}",
            "recipe": FETCH,
            "licence": LICENCE,
            "left out": "skin-tone variants and swatches of skin tones; every other vendor's drawings",
            "images": len(self),
            "held_out": int(self.held_out.sum()),
            "categories": {name: int((self.labels == place).sum()) for place, name in enumerate(self.categories)},
            "sha256": self.sha256,
        }


@cache
def load_emoji(path: Path) -> EmojiSet:
    """The drawings in the package's folder or .tgz, in the order of their file names; read once a process.

    Raises UsageError, one line, for what is not there or not the package, BadFileError for a drawing that is damaged or of another size.
    """
    files = _files(path)
    stated = _json(files, "package.json", path)
    found = (stated.get("name"), stated.get("version")) if isinstance(stated, dict) else (None, None)
    if found != (PACKAGE.name, PACKAGE.version):
        raise UsageError(f"{path}: holds {found[0]} {found[1]}, not {PACKAGE.name} {PACKAGE.version}: {FETCH}")
    entries = sorted(_entries(_json(files, "emoji.json", path), path), key=lambda entry: entry["image"])
    if len(entries) != PACKAGE.count:
        raise BadFileError(f"{path}: its emoji.json lists {len(entries)} drawings, not {PACKAGE.count}: {FETCH}")
    contents = [_content(files, f"{IMAGES}/{entry['image']}", path) for entry in entries]
    captions = tuple(" ".join(entry["name"].lower().split()) for entry in entries)
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    told = "\n".join(f"{e['image']} {d} {e['category']} {c}" for e, d, c in zip(entries, digests, captions, strict=True))
    sha256 = hashlib.sha256(told.encode()).hexdigest()
    if sha256 != PACKAGE.sha256:
        raise BadFileError(f"{path}: not the files of {PACKAGE.name} {PACKAGE.version} (sha256 {sha256[:16]}...): {FETCH}")
    categories = tuple(sorted({entry["category"] for entry in entries}))
    images = np.stack([_drawing(content, entry["image"], path) for content, entry in zip(contents, entries, strict=True)])
    return EmojiSet(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        captions,
        torch.tensor([categories.index(entry["category"]) for entry in entries]),
        categories,
        torch.tensor([mix(name_key(digest)) % HELD_OUT == 0 for digest in digests]),
        sha256,
    )


def _files(path: Path) -> dict[str, Path | bytes]:
    """What is read of the package, by its path inside it: where it lies, or its content out of the archive. Nothing is unpacked."""
    if path.is_file():
        return dict(_archived(path))
    for root in (path, path / "package", path / "node_modules" / PACKAGE.name):
        if (root / "emoji.json").is_file():
            named = [root / name for name in ("package.json", "emoji.json") if (root / name).is_file()]
            return {file.relative_to(root).as_posix(): file for file in (*named, *(root / IMAGES).glob("*.png"))}
    raise UsageError(f"{path}: no such package; give the .tgz or the folder that it unpacks to, with emoji.json in it: {FETCH}")


def _archived(path: Path) -> Iterable[tuple[str, bytes]]:
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])  # npm puts all under one folder
                wanted = inside.parent.as_posix() == IMAGES or inside.as_posix() in ("package.json", "emoji.json")
                if member.isfile() and wanted and (file := archive.extractfile(member)) is not None:
                    yield inside.as_posix(), file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"{path}: not the package's .tgz ({type(error).__name__}): {FETCH}") from None


def _content(files: dict[str, Path | bytes], name: str, path: Path) -> bytes:
    found = files.get(name)
    try:
        if found is not None:
            return found if isinstance(found, bytes) else found.read_bytes()
    except OSError:
        pass
    raise UsageError(f"{path}: {name} is missing or cannot be read: {FETCH}")


def _json(files: dict[str, Path | bytes], name: str, path: Path) -> Any:
    try:
        return json.loads(_content(files, name, path))
    except (ValueError, RecursionError):
        raise BadFileError(f"{path}: its {name} is not a json file: {FETCH}") from None


def _entries(listed: Any, path: Path) -> list[dict[str, Any]]:
    """Those that Google has drawn, without the variants (which are listed inside of an entry) and the swatches."""
    texts = ("image", "name", "category")
    if not isinstance(listed, list) or not all(isinstance(e, dict) and all(isinstance(e.get(t), str) for t in texts) for e in listed):
        raise BadFileError(f"{path}: its emoji.json is not a list of emoji with image, name and category: {FETCH}")
    twice = [image for image, times in Counter(entry["image"] for entry in listed).items() if times > 1]
    if twice:
        raise BadFileError(f"{path}: its emoji.json lists {twice[0]} more than once: {FETCH}")
    return [entry for entry in listed if entry.get("has_img_google") and entry["category"] != LEFT_OUT]


def _drawing(content: bytes, name: str, path: Path) -> np.ndarray:
    """uint8 (64, 64, 3), on white."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            drawing = image.convert("RGBA")
    except Exception as error:  # decoders raise anything at all on damaged data
        raise BadFileError(f"{path}: {name} is damaged ({type(error).__name__}): {FETCH}") from None
    if drawing.size != (SIDE, SIDE):
        raise BadFileError(f"{path}: {name} is {drawing.size[0]} x {drawing.size[1]} pixels, not {SIDE} x {SIDE}: {FETCH}")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB"))
