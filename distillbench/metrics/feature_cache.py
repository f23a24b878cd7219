"""Features by content: taken once of each file, kept for ever, whatever folder the file lies in.

    <folder>/<first 16 digits of the extractor's identity>/<sha256 of the shard>.safetensors

A shard holds `keys` uint8 (k, 32), the sha256 of the files, and `features` float32 (k, width). Shards are only ever added, each whole or
not at all, and are named by their content: a killed run loses the rows it had not written, and several may write at once.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data.image_folder import ImageFolder
from ..errors import UsageError
from .extractors import Extractor, extractor_identity

ROWS = 1024  # of a shard: a kill loses as many at most


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever is killed meanwhile; its folder is made. Raises OSError and leaves nothing behind."""
    beside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


class FeatureCache:
    """Features (width,) by the sha256 of a file, of one extractor and one way of reading. folder None: kept in memory only.

    problems: shards that could not be read, a line each; their rows count as missing and are taken again.
    """

    def __init__(self, folder: Path | None, identity: str, width: int):
        self.folder = None if folder is None else Path(folder) / identity[:16]
        self.identity, self.width = identity, width
        self.problems: list[str] = []
        self._where: dict[str, tuple[Path, int]] = {}
        self._new: dict[str, Tensor] = {}
        if self.folder is not None and self.folder.is_dir():
            for path in sorted(self.folder.glob("*.safetensors")):
                self._index(path)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._new or sha256 in self._where

    def __len__(self) -> int:
        return len(self._where.keys() | self._new.keys())

    def put(self, keys: Sequence[str], features: Tensor) -> None:
        """Rows (k, width) for k files; written to the folder whenever `ROWS` are together."""
        if tuple(features.shape) != (len(keys), self.width):
            raise UsageError(f"features of {len(keys)} files have shape {tuple(features.shape)}, not ({len(keys)}, {self.width})")
        self._new.update(zip(keys, features.detach().float().cpu(), strict=True))
        if len(self._new) >= ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is not in the folder yet."""
        if self.folder is None or not self._new:
            return
        keys = torch.from_numpy(np.frombuffer(bytes.fromhex("".join(self._new)), np.uint8).copy().reshape(-1, 32))
        content = save({"keys": keys, "features": torch.stack(list(self._new.values()))}, {"identity": self.identity})
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        try:
            write_whole(path, content)
        except OSError as error:
            raise UsageError(f"cannot write features to {self.folder}: {error.strerror or error}") from error
        self._where.update({key: (path, row) for row, key in enumerate(self._new)})
        self._new.clear()

    def get(self, keys: Sequence[str]) -> Tensor:
        """Features (k, width) of k files in order; raises UsageError if one has none."""
        missing = [key for key in keys if key not in self]
        if missing:
            raise UsageError(f"{len(missing)} of {len(keys)} files have no features yet, the first with sha256 {missing[0][:16]}...")
        found = torch.empty(len(keys), self.width)
        by_shard: dict[Path, list[tuple[int, int]]] = {}
        for place, key in enumerate(keys):
            if key in self._new:
                found[place] = self._new[key]
            else:
                path, row = self._where[key]
                by_shard.setdefault(path, []).append((place, row))
        for path, pairs in by_shard.items():
            places, rows = zip(*pairs, strict=True)
            with safe_open(path, "pt") as file:
                found[list(places)] = file.get_tensor("features")[list(rows)]
        return found

    def _index(self, path: Path) -> None:
        try:
            content_name = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
            if content_name != path.stem:
                raise ValueError("its content is not what its name says")
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("identity") != self.identity:
                    raise ValueError("features of another extractor")
                keys = file.get_tensor("keys").numpy()
                if tuple(file.get_slice("features").get_shape()) != (len(keys), self.width):
                    raise ValueError("features of another width")
        except (OSError, SafetensorError, ValueError) as error:
            self.problems.append(f"{path}: not used ({error}); its features are taken again")
            return
        self._where.update({row.tobytes().hex(): (path, number) for number, row in enumerate(keys)})


class FolderFeatures:
    """Features of the files of a folder that could be read. features: (n, width).  names, sha256: of each.  taken: how many were new."""

    def __init__(self, features: Tensor, names: list[str], sha256: list[str], taken: int):
        self.features, self.names, self.sha256, self.taken = features, names, sha256, taken


def features_of_folder(images: ImageFolder, extractor: Extractor, cache_folder: Path | None = None, *, batch: int = 64,
                       progress: Callable[[int], None] | None = None) -> FolderFeatures:  # fmt: skip
    """Features of all images of a folder, those in the cache not taken again; what is done stays done if it is stopped.

    progress: told how many files are done, after each batch.
    Files that cannot be read are left out and named in `images.unreadable`: call `images.require()` before stating a number of n images.
    """
    cache = FeatureCache(cache_folder, extractor_identity(extractor, images.reading), extractor.width)
    names: list[str] = []
    digests: list[str] = []
    taken = 0
    try:
        for part in images.batches(batch, skip=cache.__contains__):
            if len(part.images):
                cache.put([part.sha256[row] for row in part.rows], extractor(part.images))
            names += part.names
            digests += part.sha256
            taken += len(part.images)
            if progress is not None:
                progress(len(names))
    finally:
        cache.flush()
    return FolderFeatures(cache.get(digests), names, digests, taken)
