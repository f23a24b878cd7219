"""Where a training stands, in numbers, and what its stages must look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..api import Method, OptimizerConfig, Stage
from ..errors import ContractError, DistillbenchError


class Interrupted(DistillbenchError):
    """Stopped by the user; the state is kept."""


@dataclass
class Spent:
    """What a training has used so far, over all its resumes. `passes` are teacher passes, `seconds` by the clock on the wall,
    `processor_seconds` those of this process on all its threads: a busy machine stretches the first and not the second."""

    macs: int = 0
    passes: float = 0.0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    updates: int = 0
    cycles: int = 0
    images: int = 0


@dataclass(frozen=True)
class Progress:
    """What a display needs: fraction of the budget in [0, 1], the stage, what was spent."""

    fraction: float
    stage: str
    spent: Spent


@dataclass
class Position:
    """Where the loop stands; numbers only, saved with each checkpoint."""

    stage: int = 0
    begun: bool = False
    stage_start: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    averages: dict[str, int] = field(default_factory=dict)
    spent: dict[str, Any] = field(default_factory=dict)
    losses: list[dict[str, Any]] = field(default_factory=list)


def check_stages(method: Method, stages: Sequence[Stage], batch_size: int) -> None:
    """Raises `ContractError` that names the first mistake in a method's list of stages."""
    who = method.info.id
    if not stages or abs(sum(stage.share for stage in stages) - 1.0) > 1e-9:
        raise ContractError(f"{who}: the shares of its stages must sum to 1")
    kept: dict[str, tuple[int, Any]] = {}
    for stage in stages:
        names = [turn.name for turn in stage.turns]
        if not names or len(set(names)) != len(names):
            raise ContractError(f"{who}: stage {stage.name!r} needs turns with different names")
        for turn in stage.turns:
            if set(turn.updates) != set(turn.optimizer):
                raise ContractError(f"{who}: turn {turn.name!r} needs one optimizer for each of its updates ({', '.join(turn.updates)})")
            if turn.repeat < 1 or turn.accumulate < 1 or (turn.batch_size or batch_size) % turn.accumulate:
                raise ContractError(f"{who}: turn {turn.name!r}: repeat and accumulate are at least 1, and accumulate divides the batch")
            for name, module in turn.updates.items():
                key = f"{turn.name}/{name}"
                if "/" in turn.name or "/" in name:
                    raise ContractError(f"{who}: {key!r}: names of turns and updates hold no slash")
                mine = (id(module), _fixed(turn.optimizer[name]))
                if kept.setdefault(key, mine) != mine:
                    raise ContractError(f"{who}: {key} is another module or optimiser in stage {stage.name!r}; give the turn another name")


def _fixed(config: OptimizerConfig) -> tuple:
    """What an optimiser keeps from the stage that made it; rates and their schedule may change from stage to stage."""
    return (config.name, config.betas, config.eps, config.weight_decay)
