"""What the harness costs: a training step under the loop over the same step in a bare loop.

The bare loop computes the same losses from the same batches, clips, steps the same fused optimiser and keeps the same averages; it
has no meter, no checkpoints, no progress, no guards. Pairs of runs, one after the other on one thread; the median of their ratios.

    python benchmarks/harness_speed.py [--pairs 9]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import Counter
from contextlib import nullcontext

import torch
from torch import nn

from distillbench.api import Batch, Context
from distillbench.budget import Budget
from distillbench.config import load_recipe, make_config
from distillbench.discovery import find
from distillbench.randomness import generator_for
from distillbench.tracks import get_track
from distillbench.tracks.base import Track
from distillbench.training.loop import Loop
from distillbench.training.meter import pass_cost
from distillbench.training.optimizers import Average, make_optimizer
from distillbench.training.state import built


def setup(method: str, on: str | Track):
    """A freshly built method with its context, on a track or the one of that name."""
    track, found = get_track(on) if isinstance(on, str) else on, find(method)
    method_class = found.load()
    recipe = load_recipe(found.path.parent, track.facts.name, method)
    steps = (2,) if found.info.per_step else tuple(n for n in (1, 2, 4) if n in found.info.steps)
    context = Context(track.teacher(), track.shape, steps, 0, "cpu", track.batch_size, track.guidance, track.catalog())
    return built(method_class(make_config(method_class.Config, method, recipe.values)), context), context, track


def harness(method: str, on: str | Track, cycles: int) -> float:
    """Seconds per cycle under the loop, after the meter has seen each turn once."""
    instance, context, track = setup(method, on)
    unit = pass_cost(track.teacher(), track.shape, track.catalog())
    marks = []
    loop = Loop(instance, context, track.source(), Budget("b", cycles + 5, "steps"), unit=unit, batch_size=track.batch_size,
                report=lambda progress: marks.append(time.perf_counter()))  # fmt: skip
    loop.train()
    return (marks[-1] - marks[4]) / cycles


class Plain:
    """The turns of a method of one stage, without anything around them. size: the batch of turns that name none.

    autocast: the type to which mixed precision casts, or None.
    """

    def __init__(self, instance, source, size: int, device: str = "cpu", autocast: torch.dtype | None = None):
        (self.stage,) = instance.stages()
        self.source, self.size, self.device, self.autocast = source, size, device, autocast
        self.counts, self.examples = Counter(), 0
        turns = self.stage.turns
        self.optimizers = {(t.name, n): make_optimizer(m.parameters(), t.optimizer[n]) for t in turns for n, m in t.updates.items()}
        self.averages: dict[int, list[Average]] = {}
        for name, ema in self.stage.ema.items():
            source_of = getattr(instance, ema.of)
            self.averages.setdefault(id(source_of), []).append(Average(ema, getattr(instance, name), source_of))
        self.networks = {id(m): m for t in turns for m in t.updates.values()}

    def cycle(self, progress: float) -> None:
        """Every turn as often as it says, once."""
        for turn in self.stage.turns:
            for module in self.networks.values():
                module.requires_grad_(any(module is m for m in turn.updates.values()))
            for _ in range(turn.repeat):
                self._execute(turn, progress)

    def _execute(self, turn, progress: float) -> None:
        count, size = self.counts[turn.name], turn.batch_size or self.size
        self.counts[turn.name] += 1
        generator = generator_for(0, f"turn/{turn.name}", count)  # the loop's own draws, so that both do the same work
        batch = Batch(size=size, count=count, progress=progress, source=self.source, generator=generator, device=self.device)
        with nullcontext() if self.autocast is None else torch.autocast(torch.device(self.device).type, self.autocast):
            losses = turn.loss(batch)
        if losses is None:  # a turn of work, without an update
            return
        self.examples += size
        (losses if isinstance(losses, torch.Tensor) else sum(losses.values())).backward()
        for name, module in turn.updates.items():
            if turn.optimizer[name].clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), turn.optimizer[name].clip)
            self.optimizers[turn.name, name].step()
            self.optimizers[turn.name, name].zero_grad(set_to_none=True)
            for average in self.averages.get(id(module), []):
                average.update(count + 1)


def bare(method: str, on: str | Track, cycles: int) -> float:
    """Seconds per cycle of the same mathematics in a plain loop."""
    instance, _, track = setup(method, on)
    plain = Plain(instance, track.source(), track.batch_size)
    started = 0.0
    for cycle in range(cycles + 5):
        if cycle == 5:
            started = time.perf_counter()
        plain.cycle(cycle / cycles)
    return (time.perf_counter() - started) / cycles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{_processor()}, {os.cpu_count()} processors, 1 thread, torch {torch.__version__}; median of {options.pairs} pairs")
    print(f"{'track':<12}{'method':<8}{'bare ms':>9}{'loop ms':>9}{'ratio':>8}   lowest and highest pair")
    for track, method, cycles in (("mixture2d", "cd", 400), ("mixture2d", "dmd2", 100), ("digits", "cd", 25), ("digits", "dmd2", 8)):
        pairs = []
        for number in range(options.pairs):
            order = (bare, harness) if number % 2 else (harness, bare)
            seconds = {kind.__name__: kind(method, track, cycles) for kind in order}
            pairs.append((seconds["bare"], seconds["harness"]))
        ratios = sorted(h / b for b, h in pairs)
        plain, ours = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        print(
            f"{track:<12}{method:<8}{plain:>9.2f}{ours:>9.2f}{statistics.median(ratios):>8.3f}   {ratios[0]:.3f} to {ratios[-1]:.3f}",
            flush=True,
        )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
