"""Append-only files of tensors that work turns write: pairs, trajectories, recorded text."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import BadFileError, ContractError


class Shards:
    """Numbered shards in `folder`. A method keeps it as an attribute, so that its length is part of the state.

    A resumed run forgets the shards that came after its checkpoint; the turn that wrote them writes the same ones again.
    """

    def __init__(self, folder: Path | None):
        if folder is None:
            raise ContractError("shards need a run folder; this context has none")
        self.folder = folder
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}.safetensors"

    def append(self, **tensors: Tensor) -> None:
        """Write one shard, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f"shard.{os.getpid()}.tmp"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
        os.replace(beside, self._path(self.count))
        self.count += 1

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of shard `index`."""
        if not 0 <= index < self.count:
            raise IndexError(f"shard {index} of {self.count}")
        try:
            return load_file(self._path(index))
        except (SafetensorError, OSError) as error:
            raise BadFileError(f"{self._path(index).name} cannot be read ({type(error).__name__})") from None

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = int(state["count"])
