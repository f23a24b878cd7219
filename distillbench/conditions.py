"""A batch of anything a model is conditioned on: labels, text embeddings, prompts, cameras."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ContractError


class Conditions:
    """`n` conditions as named fields, each a tensor with the batch first or a list of `n` objects.

    `null` holds, per field, the value of one example that stands for "no condition" (what guidance subtracts).
    Conditions can be indexed (int slices, index or boolean tensors), concatenated, moved and turned into their null.
    """

    def __init__(self, fields: Mapping[str, Tensor | list], null: Mapping[str, Any] | None = None, *, size: int | None = None):
        self.fields = dict(fields)
        self.nulls = dict(null or {})
        sizes = {len(value) for value in self.fields.values()} | ({size} if size is not None else set())
        if len(sizes) != 1:
            raise ContractError(f"conditions need fields of one length, got {sorted(sizes)} (an empty set of fields needs size=n)")
        self._size = sizes.pop()

    @classmethod
    def none(cls, size: int) -> Conditions:
        """`size` examples without any condition."""
        return cls({}, size=size)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def field(self, name: str) -> Any:
        """The field `name`: a tensor with the batch first, or a list."""
        if name not in self.fields:
            raise ContractError(f"these conditions have no field {name!r}; they have: {', '.join(self.fields) or 'none'}")
        return self.fields[name]

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Conditions:
        positions = torch.arange(self._size)[index if isinstance(index, slice) else torch.as_tensor(index, device="cpu")]

        def pick(value: Tensor | list) -> Tensor | list:
            if isinstance(value, Tensor):
                return value[positions.to(value.device)]
            return [value[i] for i in positions.tolist()]

        return Conditions({k: pick(v) for k, v in self.fields.items()}, self.nulls, size=len(positions))

    def null(self) -> Conditions:
        """The same number of empty conditions."""
        return self.dropped(torch.ones(self._size, dtype=torch.bool))

    def dropped(self, mask: Tensor) -> Conditions:
        """These conditions with the entries where `mask` (n booleans) holds turned into their null."""
        fields: dict[str, Tensor | list] = {}
        for name, value in self.fields.items():
            if name not in self.nulls:
                raise ContractError(f"the field {name!r} has no null value, so it cannot be dropped or guided")
            null = self.nulls[name]
            if isinstance(value, Tensor):
                keep = mask.to(value.device).view(-1, *[1] * (value.dim() - 1))
                fields[name] = torch.where(keep, torch.as_tensor(null, dtype=value.dtype, device=value.device), value)
            else:
                fields[name] = [null if gone else v for gone, v in zip(mask.tolist(), value, strict=True)]
        return Conditions(fields, self.nulls, size=self._size)

    def to(self, device: torch.device | str) -> Conditions:
        fields = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.fields.items()}
        return Conditions(fields, self.nulls, size=self._size)

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """The parts one after the other; all must have the same fields."""
        first = parts[0]
        fields: dict[str, Tensor | list] = {}
        for name, value in first.fields.items():
            values = [part.field(name) for part in parts]
            fields[name] = torch.cat(values) if isinstance(value, Tensor) else [v for part in values for v in part]
        return Conditions(fields, first.nulls, size=sum(len(part) for part in parts))
