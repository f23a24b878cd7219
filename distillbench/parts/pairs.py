"""Stored pairs: a noise and the sample that an ODE made of it, for methods that regress on them.

Reflow and one-step distillation (Liu et al. 2023, arXiv 2209.03003), and the regression term of DMD (Yin et al. 2024, arXiv 2311.18828).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import Batch, Conditions
from ..errors import ContractError
from ..uncharged import uncharged
from .shards import Shards

CONDITION, NULL = "condition/", "null/"  # what the names of a condition's field, and of its null value, begin with


class PairStore:
    """Pairs in `rounds`, written by work turns and drawn by turns that train; each round is what one generator made.

    A method keeps it as an attribute, so that the number of pairs is part of its state. The pairs lie in shards under `folder` and, once
    they are drawn, in memory; without a folder in memory alone, and then a training cannot be resumed in another process.
    """

    def __init__(self, folder: Path | None, *, rounds: int = 1, device: torch.device | str = "cpu"):
        self.device = device
        self._rounds = [_Round(None if folder is None else folder / f"round-{k}") for k in range(rounds)]

    def count(self, round: int = 0) -> int:
        """Pairs in a round."""
        return self._rounds[round].count

    def append(self, noise: Tensor, x: Tensor, conditions: Conditions, *, round: int = 0) -> None:
        """Add pairs: noise and x (n, *shape) and their n conditions, whose fields must be tensors (else ContractError)."""
        if not len(noise) == len(x) == len(conditions):
            raise ContractError(f"pairs of {len(noise)} noises, {len(x)} samples and {len(conditions)} conditions; give as many of each")
        lists = [name for name in conditions if not isinstance(conditions.field(name), Tensor)]
        if lists:
            raise ContractError(f"a pair keeps conditions that are tensors, and the field {lists[0]!r} is a list")
        fields = {f"{CONDITION}{name}": conditions.field(name) for name in conditions}
        nulls = {f"{NULL}{name}": torch.as_tensor(value) for name, value in conditions.nulls.items()}
        self._rounds[round].append({"noise": noise, "x": x, **fields, **nulls})

    def draw(self, batch: Batch, *, round: int = 0) -> tuple[Tensor, Tensor, Conditions]:
        """`batch.size` pairs of a round, uniformly and with replacement: noise and x (n, *shape), and their conditions."""
        count = self.count(round)
        if not count:
            raise ContractError(f"round {round} holds no pairs yet; a work turn must append some before they are drawn")
        with uncharged():
            held = self._rounds[round].joined()
            rows = batch.choice(count, batch.size).cpu()
            fields = {name.removeprefix(CONDITION): value[rows] for name, value in held.items() if name.startswith(CONDITION)}
            nulls = {name.removeprefix(NULL): value for name, value in held.items() if name.startswith(NULL)}
            conditions = Conditions(fields, nulls, size=batch.size)
            return held["noise"][rows].to(self.device), held["x"][rows].to(self.device), conditions.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": [[each.written, each.count] for each in self._rounds]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for each, (written, count) in zip(self._rounds, state["rounds"], strict=True):
            each.restore(int(written), int(count))


class _Round:
    """written: shards so far.  count: pairs in them."""

    def __init__(self, folder: Path | None):
        self.shards = None if folder is None else Shards(folder)
        self.written = self.count = 0
        self._parts: list[dict[str, Tensor]] = []
        self._read = 0  # shards that are in _parts

    def append(self, tensors: dict[str, Tensor]) -> None:
        held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        if self.shards is not None:
            self.shards.append(**held)
        if self._read == self.written:
            self._parts.append(held)
            self._read += 1
        self.written += 1
        self.count += len(held["x"])

    def joined(self) -> dict[str, Tensor]:
        """All shards one after the other; read once, after a training was resumed."""
        if self._read < self.written:
            if self.shards is None:
                raise ContractError("pairs that were kept in memory are gone with their process; a resumed training needs a run folder")
            self._parts += [self.shards.read(k) for k in range(self._read, self.written)]
            self._read = self.written
        if len(self._parts) > 1:
            first, *_ = self._parts
            whole = {name: torch.cat([p[name] for p in self._parts]) for name in first if not name.startswith(NULL)}
            self._parts = [whole | {name: value for name, value in first.items() if name.startswith(NULL)}]
        return self._parts[0]

    def restore(self, written: int, count: int) -> None:
        # What is in memory may be of shards that came after the checkpoint and are written again, so a folder is read afresh.
        if self.shards is not None or (written, count) != (self.written, self.count):
            self._parts, self._read = [], 0
        if self.shards is not None:
            self.shards.load_state_dict({"count": written})
        self.written, self.count = written, count
