"""The one interface behind which every network sits, and the surgery that papers ask of it.

Surgery never changes the network it is asked of: it returns a new one whose config says what was added, so that
`to_config()`, `build` and a state dict bring it back. Inputs that are added start as exact no-ops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..conditions import Conditions
from ..errors import ContractError, UsageError
from .lora import merge_adapters

CAPABILITIES = frozenset({"second time", "guidance input", "log variance", "taps", "resized", "lora", "jvp"})
LARGEST = 65536  # of any whole number in a config: a typing error or a hostile file must not ask for all memory
MAY_BE_ZERO = ("classes", "lora_rank", "lora_alpha", "token_width", "x_frequencies")
WITHOUT_ADAPTERS: dict[str, Any] = {"lora_rank": 0, "lora_alpha": 0.0, "lora_targets": ()}


@dataclass
class Output:
    """What a network returns.

    prediction: like x, or None where the run stopped at a tap.  features: tap name -> (n, *tap_shape).
    log_variance: (n,), or None without the head.
    """

    prediction: Tensor | None
    features: dict[str, Tensor] = field(default_factory=dict)
    log_variance: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What all families share.

    classes: number of class labels (0: conditions carry no label); the label `classes` stands for "no class".
    second_time, guidance_input, log_variance: inputs and heads that surgery adds.  lora_rank: 0 or the rank of the adapters.
    lora_alpha: adapters are scaled by lora_alpha / lora_rank (0: by 1).  lora_targets: endings of the names of the linear layers that
    have adapters (none given: every linear layer).
    """

    width: int
    classes: int = 0
    second_time: bool = False
    guidance_input: bool = False
    log_variance: bool = False
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        targets = self.lora_targets
        if not isinstance(targets, (tuple, list)) or not all(isinstance(target, str) and target for target in targets):
            raise UsageError(f"network config: lora_targets is a list of names of layers, not {targets!r}")
        object.__setattr__(self, "lora_targets", tuple(targets))  # json has lists
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "bool":
                if not isinstance(value, bool):
                    raise UsageError(f"network config: {item.name} is true or false, not {value!r}")
            elif item.type == "int":
                least = 0 if item.name in MAY_BE_ZERO else 1
                if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
                    raise UsageError(f"network config: {item.name} is a whole number from {least} to {LARGEST}, not {value!r}")
            elif item.type == "float":
                number, zero = isinstance(value, (int, float)) and not isinstance(value, bool), item.name in MAY_BE_ZERO
                if not number or not (0 < value < 1e6 or (zero and value == 0)):
                    span = "from 0 to" if zero else "above 0 and below"
                    raise UsageError(f"network config: {item.name} is a number {span} a million, not {value!r}")


class Backbone(nn.Module, ABC):
    """A network of (x, t, conditions) that can show hidden features and be copied, narrowed, extended and adapted.

    A family's constructor takes `(config, generator=None)`: initial weights come from that generator (default: seed 0),
    never from global state.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[BackboneConfig]]
    capabilities: ClassVar[frozenset[str]] = CAPABILITIES
    config: BackboneConfig

    def __init__(self, config: Any, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def tap_names(self) -> tuple[str, ...]:
        """The places at which hidden features can be read, shallow to deep."""

    @abstractmethod
    def tap_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tap's features without the batch: (width,) for vectors, (channels, h, w) for maps."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, *, second_time: Tensor | None = None,
                guidance: Tensor | float | None = None, taps: Sequence[str] = (), stop: bool = False) -> Output:  # fmt: skip
        """One evaluation.

        x: (n, *shape).  t: (n,) in [0, 1], 0 clean.  second_time: (n,); None means t itself, where the input vanishes
        exactly.  guidance: a number or (n,); None leaves that input out.  taps: names of features to return.
        stop: end after the deepest tap; the prediction is then None.
        """

    def to_config(self) -> dict[str, Any]:
        """A json-able description that `build` turns into the same architecture."""
        return {"kind": self.kind, **asdict(self.config)}

    def copy(self) -> Self:
        """An independent trainable copy."""
        return self._rebuilt()

    def resized(self, width: int, generator: torch.Generator | None = None) -> Self:
        """A fresh network of the same family and another width, its weights drawn from `generator` (default: seed 0)."""
        return self._placed(type(self)(replace(self.config, width=width, **WITHOUT_ADAPTERS), generator))

    def with_second_time(self) -> Self:
        """A copy that also takes a second time."""
        return self._rebuilt(second_time=True)

    def with_guidance_input(self) -> Self:
        """A copy that also takes the guidance scale."""
        return self._rebuilt(guidance_input=True)

    def with_log_variance(self) -> Self:
        """A copy that also returns a log-variance of the time alone, at first 0. Its gradient moves the head and nothing else."""
        return self._rebuilt(log_variance=True)

    def lora(self, rank: int, generator: torch.Generator | None = None, *, alpha: float | None = None,
             targets: tuple[str, ...] = ()) -> Self:  # fmt: skip
        """A copy with adapters of this rank on linear layers, of which only the adapters are parameters.

        alpha: adapters are scaled by alpha / rank; None: by 1.  targets: whole endings of the layers' dotted names ("qkv" or "0.qkv");
        empty: every linear layer. Raises UsageError where no layer has such a name.
        """
        if rank < 1:
            raise UsageError(f"the rank of adapters is at least 1, not {rank}")
        if alpha is not None and alpha <= 0:
            raise UsageError(f"the alpha of adapters is above 0, not {alpha} (None: scaling 1)")
        if self.config.lora_rank:
            raise ContractError("this network has adapters already: merge them with merged() before adding others")
        return self._rebuilt(generator, lora_rank=rank, lora_alpha=alpha or 0.0, lora_targets=tuple(targets))

    def merged(self) -> Self:
        """A plain copy with the adapters added into the weights."""
        plain = self._placed(type(self)(replace(self.config, **WITHOUT_ADAPTERS)))
        plain.load_state_dict(merge_adapters(self))
        return plain

    def _rebuilt(self, generator: torch.Generator | None = None, **changes: Any) -> Self:
        # What was there keeps its weights; what is new keeps its initial ones.
        new = self._placed(type(self)(replace(self.config, **changes), generator))
        new.load_state_dict({**new.state_dict(), **self.state_dict()})
        return new.train(self.training)

    def _placed(self, new: Self) -> Self:
        sample = next(iter(self.state_dict().values()))
        return new.to(device=sample.device, dtype=sample.dtype)

    def _check(self, second_time: object, guidance: object, taps: Sequence[str], stop: bool) -> None:
        """Refuse inputs and taps that this network does not have."""
        if second_time is not None and not self.config.second_time:
            raise ContractError("this network takes no second time: use with_second_time()")
        if guidance is not None and not self.config.guidance_input:
            raise ContractError("this network takes no guidance scale: use with_guidance_input()")
        for name in taps:
            self._check_tap(name)
        if stop and not taps:
            raise ContractError("stop=True needs at least one tap to stop at")

    def _check_tap(self, name: str) -> None:
        if name not in self.tap_names:
            raise ContractError(f"this network has no tap {name!r}; it has: {', '.join(self.tap_names)}")

    def _labels(self, x: Tensor, conditions: Conditions) -> Tensor:
        """Class labels (n,); the null label where the conditions have none."""
        if "label" in conditions:
            return conditions.field("label").to(x.device)
        return torch.full((len(x),), self.config.classes, dtype=torch.int64, device=x.device)
