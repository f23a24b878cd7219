"""The contract: a method says which loss moves which network how often; the harness does everything else.

`Method`, `Stage`, `Turn`, `Student`, `Context`, `Conditions`, `Batch`. docs/contract.md says why it has this shape.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .conditions import Conditions
from .errors import ContractError
from .info import Claim, MethodInfo, Search, knob
from .randomness import generator_for
from .uncharged import uncharged

__all__ = [
    "Batch", "Claim", "Conditions", "Context", "ContractError", "Ema", "Method", "MethodInfo", "OptimizerConfig",
    "Samples", "Search", "Source", "Stage", "Student", "Turn", "external", "is_external", "knob",
]  # fmt: skip

Loss = Tensor | Mapping[str, Tensor] | None
Within = Callable[[Conditions], Tensor]


class Source(Protocol):
    """Where a track's training examples come from. Draws depend on the generator alone."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]: ...

    def conditions(self, n: int, generator: torch.Generator) -> Conditions: ...


@dataclass(frozen=True)
class OptimizerConfig:
    """How one network of one turn is updated. Schedules are functions of progress in [0, 1], not of a step count.

    name: adam, adamw, radam or sgd.  clip: largest gradient norm, or None.
    warmup: share of the span over which the rate rises from 0.  decay: constant, linear or cosine, from `decay_from` to the end,
    where `floor` times the rate is left.  over: the span, "stage" or "training".
    """

    lr: float
    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    warmup: float = 0.0
    decay: str = "constant"
    decay_from: float = 0.0
    floor: float = 0.0
    over: str = "stage"


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of the module `of` (an attribute of the method, dots allowed: "students.0").

    It moves after each update of that module.
    half_life is counted in updates of `of`; 0 makes the average a plain copy. With `rampup` r the half-life is at most
    r times the number of updates so far, so that a short run is not ruled by its start (Karras et al. 2022 use 0.05).
    """

    of: str
    half_life: float
    rampup: float | None = None


@dataclass(frozen=True)
class Turn:
    """One loss and the networks that it moves.

    loss(batch) returns a tensor, a mapping of named terms (their sum is minimised), or None: work without an update
    (pairs, trajectories, on-policy text). It is pure, given the batch and the weights; a work turn may append shards.
    updates: name -> module. The loop sets requires_grad from it and nothing else does: networks not named are frozen,
    and gradients still pass through them. optimizer: name -> configuration, same names as `updates`. A name of a turn and of an
    update stand for one module and one configuration in all stages: the optimiser is kept under them.
    A work turn may also fill tensors and numbers that `build` made, depending on `batch.count` alone.
    batch_size: examples per execution (default: the track's), drawn in `accumulate` equal parts.
    """

    name: str
    loss: Callable[[Batch], Loss]
    updates: Mapping[str, nn.Module] = field(default_factory=dict)
    repeat: int = 1
    optimizer: Mapping[str, OptimizerConfig] = field(default_factory=dict)
    batch_size: int | None = None
    accumulate: int = 1

    @property
    def is_work(self) -> bool:
        return not self.updates


@dataclass(frozen=True)
class Stage:
    """A part of training. A cycle is its turns in listed order, each `repeat` times; checkpoints lie between cycles.

    share: of the budget, all shares sum to 1.  begin, end: copies of weights only (swap a teacher, merge a LoRA), so that
    they can be replayed.  done(): may end the stage early; what it leaves goes to the next stage.  reset: names of turns whose
    optimisers start afresh.  ema: attribute of the method -> Ema that keeps it.
    """

    name: str
    share: float
    turns: Sequence[Turn]
    begin: Callable[[], None] | None = None
    end: Callable[[], None] | None = None
    done: Callable[[], bool] | None = None
    reset: tuple[str, ...] = ()
    ema: Mapping[str, Ema] = field(default_factory=dict)


class Batch:
    """What a loss sees of the world: lazily drawn data, conditions and noise, all from (seed, turn, count) alone."""

    def __init__(self, *, size: int, count: int, progress: float, overall: float = 0.0, source: Source, generator: torch.Generator,
                 device: torch.device | str = "cpu"):  # fmt: skip
        self.size = size
        self.count = count  # how often this turn has run before
        self.progress = progress  # in [0, 1] of the stage
        self.overall = overall  # in [0, 1] of the whole training
        self.generator = generator
        self._source = source
        self._device = device

    def data(self, within: Within | None = None) -> tuple[Tensor, Conditions]:
        """Fresh real examples: (size, *shape) and their conditions; `within` keeps those for which it is true."""
        with uncharged():
            if within is None:
                x, conditions = self._source.draw(self.size, self.generator)
            else:
                drawn = self._until_full(lambda: self._source.draw(self.size, self.generator), lambda pair: within(pair[1]))
                x = torch.cat([x[keep] for (x, _), keep in drawn])[: self.size]
                conditions = Conditions.cat([c[keep] for (_, c), keep in drawn])[: self.size]
        return x.to(self._device), conditions.to(self._device)

    def conditions(self, within: Within | None = None) -> Conditions:
        """Fresh conditions without data; `within` keeps those for which it is true."""
        with uncharged():
            if within is None:
                return self._source.conditions(self.size, self.generator).to(self._device)
            drawn = self._until_full(lambda: self._source.conditions(self.size, self.generator), within)
            return Conditions.cat([c[keep] for c, keep in drawn])[: self.size].to(self._device)

    def _until_full(self, draw: Callable[[], Any], within: Callable[[Any], Tensor]) -> list[tuple[Any, Tensor]]:
        kept: list[tuple[Any, Tensor]] = []
        for _ in range(1000):
            examples = draw()
            kept.append((examples, within(examples).cpu()))
            if sum(int(keep.sum()) for _, keep in kept) >= self.size:
                return kept
        raise ContractError(f"`within` keeps next to nothing: 1000 draws of {self.size} did not fill one batch")

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self._device)

    def rand(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Uniform numbers in [0, 1); float64, because times are."""
        return torch.rand(*shape, generator=self.generator, dtype=dtype).to(self._device)

    def choice(self, n: int, *shape: int) -> Tensor:
        """Integers in [0, n)."""
        return torch.randint(n, shape, generator=self.generator).to(self._device)


@dataclass(frozen=True)
class Samples:
    """x: (n, *shape) in the data's range.  evaluations: network evaluations spent on each sample; guidance counts double."""

    x: Tensor
    evaluations: int


class Student(ABC):
    """What every method hands back and every metric sees."""

    steps: tuple[int, ...]

    @abstractmethod
    def generate(self, conditions: Conditions, *, steps: int, seeds: Sequence[int], guidance: float | None = None,
                 negative: Conditions | None = None) -> Samples:  # fmt: skip
        """One sample for each condition. Sample i depends on (conditions[i], seeds[i]) alone, whatever the batch."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """safetensors and json, nothing else."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Student: ...

    def networks(self, steps: int) -> list[nn.Module]:
        """The modules that a sample of `steps` steps passes through: all, unless a class with one for each count says less."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module)]


@dataclass
class Context:
    """What a method builds from. `teacher` is the domain's teacher: in the diffusion domain a `Denoiser`, frozen and external."""

    teacher: Any
    shape: tuple[int, ...]  # of one sample
    steps: tuple[int, ...]  # the step counts this training is for
    seed: int = 0
    device: torch.device | str = "cpu"
    batch_size: int = 256  # of a turn that names none
    guidance: float = 1.0  # the guidance scale under which the track samples its teacher
    catalog: Conditions | None = None  # every distinct condition, where they can be listed (labels)
    folder: Path | None = None  # of the run, for shards

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator that depends on (seed, name) alone, for initial weights and other one-time draws."""
        return generator_for(self.seed, f"method/{name}", 0)


class Method(ABC):
    """How one paper turns a teacher into a student. State is every module, tensor and number in `vars(self)`."""

    info: ClassVar[MethodInfo]
    student_type: ClassVar[type[Student]]
    config: Any

    @dataclass(frozen=True)
    class Config:
        """Every knob, documented; defaults from the paper."""

    def __init__(self, config: Any = None):
        self.config = self.Config() if config is None else config

    @abstractmethod
    def build(self, context: Context) -> None:
        """Make every network, from the teacher's, on the device."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """What is trained, in what order, for what share of the budget. Pure: listed before training and again on resume."""

    @abstractmethod
    def distilled(self) -> Student:
        """What is scored (the choice of EMA included)."""


_EXTERNAL: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def external(module: nn.Module) -> nn.Module:
    """Mark a module as shipped with the track: frozen, not part of a method's state, not in checkpoints. Copies are not marked."""
    _EXTERNAL.update(module.modules())
    return module.requires_grad_(False).eval()


def is_external(module: nn.Module) -> bool:
    return module in _EXTERNAL
