"""A training that is scored on its way: what a method hands back after each share of a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..api import Context, Method
from ..budget import Budget
from ..tracks.base import Track
from ..uncharged import uncharged
from . import state
from .loop import Loop
from .meter import pass_cost


@dataclass(frozen=True)
class Look:
    """passes: teacher passes spent so far.  scores: of the track, by name."""

    passes: float
    scores: dict[str, float]


def followed(method_class: type[Method], config: Any, track: Track, budget: Budget, shares: Sequence[float], *, steps: int = 1,
             seed: int = 0, prepare: Callable[[Any], None] | None = None) -> tuple[Method, list[Look]]:  # fmt: skip
    """Train once and score at the first cycle after each of the rising shares of the budget (0: before training, 1: at its end).

    prepare(method) may change the weights that `build` made, before anything is trained. Scoring is not charged.
    """
    teacher = track.teacher()
    context = Context(teacher, track.shape, (steps,), seed, "cpu", track.batch_size, track.guidance, track.catalog())
    method = state.built(method_class(config), context)
    if prepare is not None:
        prepare(method)
    looks: list[Look] = []
    wanted = [share for share in shares if 0 < share < 1]

    def look(passes: float) -> None:
        looks.append(Look(passes, scores(method, track, steps)))

    def report(progress: Any) -> None:
        if wanted and progress.fraction >= wanted[0]:
            while wanted and progress.fraction >= wanted[0]:
                wanted.pop(0)
            look(progress.spent.passes)

    loop = Loop(method, context, track.source(), budget, unit=pass_cost(teacher, track.shape, track.catalog()),
                batch_size=track.batch_size, report=report)  # fmt: skip
    if 0 in shares:
        look(0.0)
    spent = loop.train()
    look(spent.passes)
    return method, looks


def scores(method: Method, track: Track, steps: int) -> dict[str, float]:
    """The track's scores of what the method would hand back now."""
    conditions, seeds = track.evaluation()
    student = method.distilled()
    with uncharged():
        parts = [
            student.generate(conditions[k : k + track.at_once], steps=steps, seeds=seeds[k : k + track.at_once]).x
            for k in range(0, track.evaluations, track.at_once)
        ]
        return {score.name: score.value for score in track.score(torch.cat(parts)) if score.value is not None}
