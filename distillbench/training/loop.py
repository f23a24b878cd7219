"""The only training loop: turns, optimisers, averages, meter, checkpoints, resume."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import Batch, Context, Loss, Method, Source, Stage, Turn
from ..budget import Budget
from ..errors import BadFileError, ContractError, NonFiniteError
from ..randomness import generator_for
from . import checkpoint, state
from .costs import Counting
from .meter import Meter, networks_of
from .optimizers import Average, make_optimizer, pack, rate_factor, unpack
from .position import Interrupted, Position, Progress, Spent, check_stages
from .signals import Guard

LOG_POINTS = 200  # of the loss curves, over a whole run


@dataclass
class _Group:
    """One network that a turn updates."""

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    config: Any
    averages: list[str]


class Loop:
    """Trains a built method within a budget. `unit` is the teacher pass in multiply-adds."""

    def __init__(self, method: Method, context: Context, source: Source, budget: Budget, *, unit: int, batch_size: int, run: str = "run",
                 folder: Path | None = None, precision: str = "float32", meter: Meter | None = None, checkpoint_seconds: float = 20.0,
                 turn_limit: float = 600.0, report: Callable[[Progress], None] | None = None,
                 warn: Callable[[str], None] = print):  # fmt: skip
        self.method, self.context, self.source, self.budget, self.unit = method, context, source, budget, unit
        self.batch_size, self.run_name, self.folder, self.precision = batch_size, run, folder, precision
        self.meter = meter or Meter()
        self.checkpoint_seconds, self.turn_limit, self.report, self.warn = checkpoint_seconds, turn_limit, report, warn
        self.spent = Spent()
        self.position = Position()
        self.stages = method.stages()
        check_stages(method, self.stages, batch_size)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._groups: dict[str, dict[str, _Group]] = {}
        self._averages: dict[str, Average] = {}
        self._parameters: list[Tensor] = []
        self._moving: list[Tensor] | None = None

    # ------------------------------------------------------------------ the run

    def train(self) -> Spent:
        """Run to the end of the budget, resuming from the folder's checkpoint if there is one."""
        self._resume()
        self._started = time.perf_counter() - self.spent.seconds
        self._processor_started = time.process_time() - self.spent.processor_seconds
        self._saved_at = time.perf_counter()
        try:
            with Guard(self.turn_limit) as guard:
                while self.position.stage < len(self.stages):
                    self._stage(self.stages[self.position.stage], guard)
        finally:
            self.meter.close()
        self._tick()
        return self.spent

    def _stage(self, stage: Stage, guard: Guard) -> None:
        if not self.position.begun:
            if stage.begin is not None:
                stage.begin()
            for key in [key for key in self._optimizers if key.split("/")[0] in stage.reset]:
                del self._optimizers[key]
            self.position.stage_start, self.position.begun = self._used(), True
        self._prepare(stage)
        target = self.budget.amount * min(1.0, sum(s.share for s in self.stages[: self.position.stage + 1]))
        while self._used() < target and not (stage.done is not None and stage.done()):
            before = self.spent.macs
            for turn in stage.turns:
                for _ in range(turn.repeat):
                    guard.restart(turn.name)
                    self._execute(turn, target)
            self.spent.cycles += 1
            if self.spent.macs == before:
                raise ContractError(f"{self.method.info.id}: a cycle of stage {stage.name!r} ran no network, so no budget can end it")
            self._between(stage, guard)
        if stage.end is not None:
            stage.end()
        self.position.stage, self.position.begun = self.position.stage + 1, False
        self._drop_optimizers()
        self._save()

    def _between(self, stage: Stage, guard: Guard) -> None:
        """Between two cycles: report, checkpoint, stop if asked to."""
        now = time.perf_counter()
        self._tick(now)
        if self.report is not None:
            self.report(Progress(self._overall(), stage.name, self.spent))
        if guard.stopped or now - self._saved_at > self.checkpoint_seconds:
            self._save()
        if guard.stopped:
            raise Interrupted("stopped; the state is kept, the same command goes on from here")

    def _tick(self, now: float | None = None) -> None:
        self.spent.seconds = (now or time.perf_counter()) - self._started
        self.spent.processor_seconds = time.process_time() - self._processor_started
        self.spent.passes = self.spent.macs / self.unit

    def _used(self) -> float:
        if self.budget.unit == "passes":
            return self.spent.macs / self.unit
        return self.spent.seconds if self.budget.unit == "seconds" else float(self.spent.cycles)

    def _overall(self) -> float:
        return min(1.0, self._used() / self.budget.amount)

    # ------------------------------------------------------------------ a turn

    def _prepare(self, stage: Stage) -> None:
        """Look up what the stage's turns move; once a stage, because begin may have exchanged networks."""
        roots = [*state.modules_of(self.method).values(), *([self.context.teacher] if isinstance(self.context.teacher, nn.Module) else [])]
        self.meter.tracer.watch(networks_of(roots))
        self._parameters = list({id(p): p for root in roots for p in root.parameters()}.values())
        self._moving = None
        get: dict[str, Callable] = {name: operator.attrgetter(name) for name in [*stage.ema, *(ema.of for ema in stage.ema.values())]}
        self._averages = {name: Average(ema, get[name](self.method), get[ema.of](self.method)) for name, ema in stage.ema.items()}
        self._groups = {turn.name: {name: self._group(stage, turn, name, get) for name in turn.updates} for turn in stage.turns}

    def _group(self, stage: Stage, turn: Turn, name: str, get: dict[str, Callable]) -> _Group:
        parameters: list[Tensor] = list(turn.updates[name].parameters())
        own = {id(p) for p in parameters}
        key = f"{turn.name}/{name}"
        if key not in self._optimizers:
            self._optimizers[key] = make_optimizer(parameters, turn.optimizer[name])
        averages = [a for a, ema in stage.ema.items() if any(id(p) in own for p in get[ema.of](self.method).parameters())]
        return _Group(parameters, self._optimizers[key], turn.optimizer[name], averages)

    def _execute(self, turn: Turn, target: float) -> None:
        count = self.position.counts.get(turn.name, 0)
        self.position.counts[turn.name] = count + 1
        span = max(1e-12, target - self.position.stage_start)
        progress = min(1.0, max(0.0, (self._used() - self.position.stage_start) / span))
        groups = self._groups[turn.name]
        self._only_move([p for group in groups.values() for p in group.parameters])
        if turn.is_work:
            with Counting() as counting:
                self._losses(turn, count, progress)
            self.spent.macs += counting.macs.total
            return
        if self.meter.exact:
            with Counting() as counting:
                terms = self._backward(turn, count, progress)
            self.spent.macs += counting.macs.total
        else:
            with self.meter.tracer.recording():
                terms = self._backward(turn, count, progress)
            self.spent.macs += self.meter.price((self.position.stage, turn.name), count, lambda: self._replay(turn, count, progress)).total
        self._log(turn, terms)
        for group in groups.values():
            self._update(turn, group, progress)
        self.spent.images += turn.batch_size or self.batch_size

    def _only_move(self, parameters: list[Tensor]) -> None:
        """requires_grad for these and no others."""
        if self._moving is not None and len(self._moving) == len(parameters) and all(map(operator.is_, self._moving, parameters)):
            return
        for parameter in self._parameters if self._moving is None else self._moving:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self._moving = parameters

    def _losses(self, turn: Turn, count: int, progress: float, part: int = 0) -> Loss:
        size = (turn.batch_size or self.batch_size) // turn.accumulate
        generator = generator_for(self.context.seed, f"turn/{turn.name}", count * turn.accumulate + part)
        batch = Batch(size=size, count=count, progress=progress, overall=self._overall(), source=self.source, generator=generator,
                      device=self.context.device)  # fmt: skip
        if self.precision == "float32":
            return turn.loss(batch)
        with torch.autocast(torch.device(self.context.device).type, dtype=getattr(torch, self.precision)):
            return turn.loss(batch)

    def _backward(self, turn: Turn, count: int, progress: float) -> dict[str, Tensor]:
        shown: dict[str, Tensor] = {}
        for part in range(turn.accumulate):
            losses = self._losses(turn, count, progress, part)
            if losses is None:
                raise ContractError(f"{self.method.info.id}: turn {turn.name!r} updates {', '.join(turn.updates)} but returned no loss")
            terms = {"loss": losses} if isinstance(losses, Tensor) else dict(losses)
            total = sum(terms.values()) / turn.accumulate if turn.accumulate > 1 or len(terms) > 1 else next(iter(terms.values()))
            if not isinstance(total, Tensor) or total.dim() != 0:
                raise ContractError(f"{self.method.info.id}: turn {turn.name!r} must return scalar losses")
            if not math.isfinite(total.item()):
                raise NonFiniteError(f"the loss of turn {turn.name!r} is {total.item()} at its execution {count + 1}")
            total.backward()
            shown = terms
        return {name: term.detach() for name, term in shown.items()}

    def _replay(self, turn: Turn, count: int, progress: float) -> None:
        """The turn's losses and gradients once more; the gradients already there are kept."""
        held = [(p, p.grad) for group in self._groups[turn.name].values() for p in group.parameters]
        for parameter, _ in held:
            parameter.grad = None
        self._backward(turn, count, progress)
        for parameter, grad in held:
            parameter.grad = grad

    def _update(self, turn: Turn, group: _Group, progress: float) -> None:
        config = group.config
        if config.clip is not None:
            norm = nn.utils.clip_grad_norm_(group.parameters, config.clip).item()
            if not math.isfinite(norm):
                raise NonFiniteError(f"the gradient of turn {turn.name!r} is {norm} at its execution {self.position.counts[turn.name]}")
        for entry in group.optimizer.param_groups:
            entry["lr"] = config.lr * rate_factor(config, progress if config.over == "stage" else self._overall())
        group.optimizer.step()
        group.optimizer.zero_grad(set_to_none=True)
        self.spent.updates += 1
        for name in group.averages:
            self.position.averages[name] = self.position.averages.get(name, 0) + 1
            self._averages[name].update(self.position.averages[name])

    def _log(self, turn: Turn, terms: dict[str, Tensor]) -> None:
        """Keep a point of the loss curves, about LOG_POINTS of each turn over the run."""
        point = int(LOG_POINTS * self._overall())
        if self.position.counts.get(f"log/{turn.name}", -1) < point:
            self.position.counts[f"log/{turn.name}"] = point
            values = {name: term.item() for name, term in terms.items()}
            self.position.losses.append({"passes": self.spent.macs / self.unit, "turn": turn.name, **values})

    # ------------------------------------------------------------------ state

    def _drop_optimizers(self) -> None:
        later = {turn.name for stage in self.stages[self.position.stage :] for turn in stage.turns}
        self._optimizers = {key: opt for key, opt in self._optimizers.items() if key.split("/")[0] in later}

    def _save(self) -> None:
        if self.folder is None:
            return
        self._tick()
        self.position.spent = asdict(self.spent)
        tensors = {f"state/{name}": tensor for name, tensor in state.tensors_of(self.method).items()}
        for key, optimizer in self._optimizers.items():
            tensors |= pack(f"optimizer/{key}", optimizer)
        meta = {"run": self.run_name, "position": asdict(self.position), "numbers": state.numbers_of(self.method),
                "optimizers": list(self._optimizers)}  # fmt: skip
        checkpoint.write(self.folder / "checkpoint.safetensors", tensors, meta)
        self._saved_at = time.perf_counter()

    def _resume(self) -> None:
        path = None if self.folder is None else self.folder / "checkpoint.safetensors"
        if path is None or not path.exists():
            return
        try:
            tensors, meta = checkpoint.read(path, self.run_name)
            state.restore(self.method, {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}, meta["numbers"])
        except BadFileError as error:
            kept = checkpoint.set_aside(path)
            self.warn(f"{error}; set aside as {kept.name}, starting afresh")
            return
        self.position = Position(**meta["position"])
        used = self.position.spent
        self.spent = Spent(**{"processor_seconds": used["seconds"], **used})  # a checkpoint of before they were counted: the clock's
        moved = {f"{turn.name}/{name}": (turn.updates[name], turn.optimizer[name])
                 for stage in self.stages for turn in stage.turns for name in turn.updates}  # fmt: skip
        for key in meta["optimizers"]:
            optimizer = make_optimizer(moved[key][0].parameters(), moved[key][1])
            unpack(f"optimizer/{key}", optimizer, tensors)
            self._optimizers[key] = optimizer
