"""Folders of pictures, read as a stream: whatever image programs write, brought to uint8 RGB, and every deviation counted or named.

Nothing is guessed: a file that cannot be read is named and left out, and who needs n images is told that there are fewer. Orientation
tags and colour profiles are not applied, as the published protocols do not apply them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import UsageError

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC, "box": Image.Resampling.BOX}
READING = ("RGB uint8 by PIL", "alpha on white", "16 bits to their upper 8", "grey to three channels")
NAMED = 3  # files that an error names before it says how many more there are


@dataclass(frozen=True)
class ImageBatch:
    """Some files of a folder. names, sha256: of all of them, in order.  images: uint8 (k, 3, h, w) of those not skipped.

    rows: which of the files the k images are.
    """

    names: tuple[str, ...]
    sha256: tuple[str, ...]
    rows: tuple[int, ...]
    images: Tensor


class ImageFolder:
    """The images under a folder, those of its subfolders included, in the order of their names.

    n: how many are needed; the first n are read.  resize: the side to which each is brought after a centre crop to a square, by the
    `kernel` of FILTERS.  crop: the side of the square that is cut from the middle instead, at the image's own scale (one that is smaller is
    squeezed to it whole by the `kernel`).  Without either, images of more than one size are refused.

    converted: how many had an alpha channel, 16 bits, were grey or in another colour mode, as their headers say.  unreadable: name ->
    why, of files whose header is broken and, once they have been read, of those whose content is.  ignored: other files.
    Raises UsageError, a line each, where the folder is missing or holds no image, fewer than n, or mixed sizes.
    """

    def __init__(self, folder: str | Path, *, n: int | None = None, resize: int | None = None, crop: int | None = None,
                 kernel: str = "lanczos"):  # fmt: skip
        if (resize is not None and resize < 1) or kernel not in FILTERS:
            raise UsageError(f"images are resized to 1 pixel or more by {', '.join(FILTERS)}, not to {resize} by {kernel!r}")
        if crop is not None and (crop < 1 or resize is not None):
            raise UsageError(f"images are cropped to 1 pixel or more, or resized, not cropped to {crop} and resized to {resize}")
        self.folder, self.resize, self.crop, self.kernel = Path(folder), resize, crop, kernel
        names, self.ignored = _listed(self.folder)
        if n is not None and not 0 < n <= len(names):
            raise UsageError(f"{self.folder} holds {len(names)} images and {n} are needed: add images or ask for fewer")
        self.names, self.found = tuple(names[:n]), len(names)
        self.converted: Counter[str] = Counter()
        self.unreadable: dict[str, str] = {}
        self._sizes: dict[tuple[int, int], list[str]] = {}
        for name in self.names:
            self._survey(name)
        if len(self._sizes) > 1 and resize is None and crop is None:
            raise UsageError(f"{self.folder} holds images of {len(self._sizes)} sizes ({self._most()}): resize them all, or sort them out")

    def __len__(self) -> int:
        """How many images could be read as far as is known by now."""
        return len(self.names) - len(self.unreadable)

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of every image as it is given out."""
        if side := self.resize or self.crop:
            return (side, side)
        return next(iter(self._sizes), (0, 0))

    @property
    def reading(self) -> tuple[str, ...]:
        """What is done to a file before an extractor sees it; belongs to the identity of what is measured and of cached features."""
        if self.crop is not None:
            return (*READING, f"centre {self.crop} x {self.crop}; a smaller image whole, PIL {self.kernel}, antialiased, to that, uint8")
        if self.resize is None:
            return READING
        return (*READING, f"centre crop to a square, PIL {self.kernel}, antialiased, to {self.resize} x {self.resize}, uint8")

    def require(self, n: int | None = None) -> None:
        """Raises UsageError, naming the files that cannot be read, if fewer than n (None: all) can. Sure only after a whole reading."""
        wanted = len(self.names) if n is None else n
        if len(self) < wanted:
            bad = [f"{name} ({why})" for name, why in sorted(self.unreadable.items())]
            more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            why = f": {', '.join(bad[:NAMED])}{more} cannot be read" if bad else ""
            raise UsageError(f"{self.folder} has {len(self)} usable images of the {wanted} needed{why}")

    def summary(self) -> str:
        """One line for a person: how many, of what size, what was converted, what could not be read."""
        parts = [f"{len(self)} of {self.found} images", f"{self.size[0]} x {self.size[1]} pixels"]
        parts += [f"{count} {what}" for what, count in sorted(self.converted.items())]
        parts += [f"{len(self.unreadable)} unreadable"] if self.unreadable else []
        parts += [f"{self.ignored} other files ignored"] if self.ignored else []
        return ", ".join(parts)

    def batches(self, size: int = 64, *, skip: Callable[[str], bool] | None = None) -> Iterator[ImageBatch]:
        """All readable files, `size` at a time and in order; a file for whose sha256 `skip` is true is not decoded.

        The next batch is read by a second thread meanwhile; no more than two are in memory. Reading again starts from the beginning.
        """
        starts = range(0, len(self.names), size)
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for start in starts:
                coming = pool.submit(self._batch, self.names[start : start + size], skip)
                if ahead is not None:
                    yield ahead.result()
                ahead = coming
            if ahead is not None:
                yield ahead.result()

    def read(self, name: str) -> Tensor:
        """One of `names`, uint8 (3, h, w). Raises UsageError, a line that names it, if it cannot be read."""
        try:
            return torch.from_numpy(self._decode((self.folder / name).read_bytes())).permute(2, 0, 1)
        except Exception as error:  # as in _batch
            raise UsageError(f"{self.folder / name}: cannot be read ({_reason(error)}): replace it, or take it out") from None

    def _batch(self, names: tuple[str, ...], skip: Callable[[str], bool] | None) -> ImageBatch:
        kept: list[str] = []
        hashes: list[str] = []
        rows: list[int] = []
        images: list[np.ndarray] = []
        for name in names:
            if name in self.unreadable:
                continue
            try:
                content = (self.folder / name).read_bytes()
            except OSError as error:
                self.unreadable[name] = _reason(error)
                continue
            sha256 = hashlib.sha256(content).hexdigest()
            if skip is None or not skip(sha256):
                try:
                    images.append(self._decode(content))
                except Exception as error:  # decoders raise anything at all on damaged data, TypeError and KeyError too
                    self.unreadable[name] = _reason(error)
                    continue
                rows.append(len(kept))
            kept.append(name)
            hashes.append(sha256)
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous() if images else torch.empty(0, 3, *self.size).byte()
        return ImageBatch(tuple(kept), tuple(hashes), tuple(rows), stacked)

    def _decode(self, content: bytes) -> np.ndarray:
        """uint8 (h, w, 3)"""
        with Image.open(io.BytesIO(content)) as image:
            rgb = _to_rgb(image)
        width, height = rgb.size
        if self.crop is not None:
            if min(width, height) < self.crop:
                return np.asarray(rgb.resize((self.crop, self.crop), FILTERS[self.kernel]))
            left, top = (width - self.crop) // 2, (height - self.crop) // 2
            rgb = rgb.crop((left, top, left + self.crop, top + self.crop))
        elif self.resize is not None:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            rgb = rgb.crop((left, top, left + side, top + side)).resize((self.resize, self.resize), FILTERS[self.kernel])
        elif (rgb.size[1], rgb.size[0]) != self.size:
            raise ValueError("changed while it was read")
        return np.asarray(rgb)

    def _survey(self, name: str) -> None:
        """What a file's header says: its size, and what will have to be converted."""
        path = self.folder / name
        try:
            if not path.is_file():
                raise OSError("not a plain file")
            with Image.open(path) as image:
                if image.format != "MPO" and getattr(image, "n_frames", 1) != 1:  # a camera's second picture is a preview
                    raise ValueError("holds several frames")
                kinds = _kinds(image)
                size = (image.size[1], image.size[0])
            with open(path, "rb") as file:
                start = file.read(25)
        except Exception as error:  # as in _batch
            self.unreadable[name] = _reason(error)
            return
        if start.startswith(b"\x89PNG") and start[-1] == 16:  # PIL reads the colours of such files as 8 bits and says nothing
            kinds.add("16-bit")
        self.converted.update(kinds)
        self._sizes.setdefault(size, []).append(name)

    def _most(self) -> str:
        """The sizes with how many images each and one of their names, the most frequent first."""
        ordered = sorted(self._sizes.items(), key=lambda item: -len(item[1]))
        parts = [f"{w} x {h}: {len(names)}, as {names[0]}" for (h, w), names in ordered[:NAMED]]
        return "; ".join(parts + ["..."] * (len(ordered) > NAMED))


def set_sha256(digests: list[str] | tuple[str, ...]) -> str:
    """The sha256 of a set of files in order, from the sha256 of each: names the set in the identity of a score."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _listed(folder: Path) -> tuple[list[str], int]:
    """Names relative to the folder, sorted, of what looks like an image; and how many other files there are."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is {'a file' if folder.exists() else 'not there'}: name a folder of images")
    names: list[str] = []
    ignored = 0
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (file for file in files if not file.startswith(".")):
            if os.path.splitext(file)[1].lower() in ENDINGS:
                names.append((Path(where) / file).relative_to(folder).as_posix())
            else:
                ignored += 1
    if not names:
        raise UsageError(f"{folder} holds no images ({', '.join(sorted(ENDINGS))}){f', only {ignored} other files' if ignored else ''}")
    return sorted(names), ignored


def _kinds(image: Image.Image) -> set[str]:
    """What has to be converted, of what a header shows."""
    kinds = {"with alpha"} if _has_alpha(image) else set()
    if image.mode.startswith("I"):
        return kinds | {"16-bit", "grey"}
    if image.mode in ("1", "L", "LA", "La"):
        return kinds | {"grey"}
    if image.mode not in ("RGB", "RGBA", "RGBa", "P", "PA"):
        return kinds | {"in other colours"}
    return kinds


def _has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("holds floating point numbers, whose white is not known")
    if image.mode.startswith("I"):
        if "transparency" in image.info:
            raise ValueError("16 bits of grey with a transparent one are not supported")
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("holds more than 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if not _has_alpha(image):
        return image.convert("RGB")
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")


def _reason(error: Exception) -> str:
    """A few words without the file's name or address."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).splitlines()[0][:60] if str(error) else type(error).__name__
