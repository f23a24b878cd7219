"""Short trainings of a method on a track, for checks and tests: a few cycles, a checkpoint after each."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..api import Context, Method, Source
from ..budget import Budget
from ..tracks.base import Track
from . import state
from .loop import Loop
from .meter import Meter, pass_cost
from .position import Spent

CYCLES = 12


class Halt(Exception):
    """Ends a training from outside, between two cycles."""


@dataclass
class Short:
    """A short training of one method on one track."""

    method: Method
    context: Context
    loop: Loop
    spent: Spent | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in state.tensors_of(self.method).items()}


def short_run(method_class: type[Method], config: Any, track: Track, steps: tuple[int, ...], *, folder: Path | None = None,
              budget: Budget | None = None, source: Source | None = None, stop_after: int | None = None, exact: bool = False,
              seed: int = 0) -> Short:  # fmt: skip
    """Build and train for a few cycles, with a checkpoint after each; `stop_after` cycles it is halted."""
    teacher = track.teacher()
    context = Context(teacher, track.shape, steps, seed, "cpu", track.batch_size, track.guidance, track.catalog(), folder)
    method = state.built(method_class(config), context)

    def report(progress: Any) -> None:
        if stop_after is not None and progress.spent.cycles >= stop_after:
            raise Halt

    loop = Loop(
        method, context, source or track.source(), budget or Budget("check", CYCLES, "steps"), folder=folder, run="check",
        unit=pass_cost(teacher, track.shape, track.catalog()), batch_size=track.batch_size, checkpoint_seconds=0.0,
        report=report, meter=Meter(exact=exact),
    )  # fmt: skip
    short = Short(method, context, loop)
    with suppress(Halt):
        short.spent = loop.train()
    return short
