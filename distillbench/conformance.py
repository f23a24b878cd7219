"""The kit that every method must pass, ours or a stranger's: `distillbench check TARGET`."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .api import Conditions, Method, Source, Student
from .budget import Budget
from .config import load_recipe, make_config
from .discovery import Found, find
from .errors import ContractError
from .info import MethodInfo
from .networks import KINDS, Backbone
from .runner import Watch
from .tracks import get_track
from .tracks.base import Track
from .tracks.facts import FACTS
from .training import state
from .training.short import CYCLES, Short, short_run


@dataclass(frozen=True)
class Result:
    """One line of the kit."""

    name: str
    passed: bool
    detail: str = ""
    skipped: bool = False


class Kit:
    """The checks of one method on one track, with the track's recipe."""

    def __init__(self, found: Found, method_class: type[Method], track: Track):
        self.info: MethodInfo = found.info
        self.method_class, self.track = method_class, track
        recipe = load_recipe(found.path.parent, track.facts.name, found.info.id)
        self.config = make_config(method_class.Config, found.info.id, recipe.values)
        self.trained_for = (min(found.info.steps),) if found.info.per_step else tuple(found.info.steps)

    def short(self, **options: Any) -> Short:
        steps = options.pop("steps", self.trained_for)
        return short_run(self.method_class, self.config, self.track, steps, **options)

    @cached_property
    def trained(self) -> Short:
        """One short training that several checks look at; none of them changes it."""
        return self.short()

    def checks(self) -> dict[str, Callable[[], str]]:
        return {
            "stages": self.stages, "state round trip": self.round_trip, "kill and resume": self.resume,
            "no global randomness": self.no_global_randomness, "sample i depends on seed i alone": self.alone,
            "declared steps work": self.declared_steps, "budget kept": self.budget_kept,
            "student without pickle": self.files, "needs declared": self.needs,
        }  # fmt: skip

    def stages(self) -> str:
        method = self.trained.method
        first, second = method.stages(), method.stages()
        told = [[(s.name, s.share, [t.name for t in s.turns]) for s in listed] for listed in (first, second)]
        _demand(told[0] == told[1], "stages() gives another list on its second call; it must be pure")
        return f"{len(first)} stage{'s' if len(first) > 1 else ''}, {sum(len(s.turns) for s in first)} turns"

    def round_trip(self) -> str:
        trained, fresh = self.trained, self.short(stop_after=1)
        before = trained.tensors
        state.restore(fresh.method, before, state.numbers_of(trained.method))
        after = fresh.tensors
        wrong = [name for name in before if not torch.equal(before[name], after[name])]
        _demand(not wrong, f"{wrong[:1]} is not what was saved")
        return f"{len(before)} tensors"

    def resume(self) -> str:
        whole, before = self.trained.tensors, _global_generators()
        with tempfile.TemporaryDirectory() as folder:
            self.short(folder=Path(folder), stop_after=CYCLES // 2)
            resumed = self.short(folder=Path(folder)).tensors
        wrong = [name for name in whole if not torch.equal(whole[name], resumed[name])]
        why = "is there state that is no module, tensor or number in vars(self)?"
        if moved := _moved(before):
            why = f"the global generator of {moved} is no part of the state"
        _demand(not wrong, f"{wrong[:1]} differs between a broken and an unbroken run; {why}")
        return "bit for bit"

    def no_global_randomness(self) -> str:
        before = _global_generators()
        student = self.short().method.distilled()
        for steps in student.steps:
            self._generate(student, steps, 4)
        moved = _moved(before)
        _demand(not moved, f"the global generator of {moved} was used; draw from the batch, context.generator(name) or the seeds")
        return ""

    def alone(self) -> str:
        student = self.trained.method.distilled()
        conditions, seeds = self._few(6)
        worst = 0.0
        for steps in student.steps:
            together = student.generate(conditions, steps=steps, seeds=seeds).x
            for i in range(len(seeds)):
                one = student.generate(conditions[i : i + 1], steps=steps, seeds=seeds[i : i + 1]).x
                worst = max(worst, float((one[0] - together[i]).abs().max() / (1 + together[i].abs().max())))
        _demand(worst < 1e-4, f"a sample changes by {worst:.1e} with the batch that it is in")
        return f"within {worst:.0e}"

    def declared_steps(self) -> str:
        groups = [(n,) for n in self.info.steps] if self.info.per_step else [tuple(self.info.steps)]
        for group in groups:
            student = self.short(steps=group, budget=Budget("check", 2, "steps")).method.distilled()
            for steps in group:
                _demand(steps in student.steps, f"{steps} steps are declared, the student offers {student.steps}")
                with Watch(student) as watch:
                    samples = self._generate(student, steps, 4)
                _demand(tuple(samples.x.shape) == (4, *self.track.shape), f"samples at {steps} steps have shape {tuple(samples.x.shape)}")
                _demand(
                    watch.rows <= 4 * samples.evaluations, f"{steps} steps say {samples.evaluations} evaluations, spend {watch.rows / 4:g}"
                )
        return ", ".join(map(str, self.info.steps))

    def budget_kept(self) -> str:
        one, short = self.short(stop_after=1).loop.spent.macs, self.trained
        assert short.spent is not None
        passes = 0.6 * short.spent.macs / short.loop.unit
        again = self.short(budget=Budget("check", passes, "passes"))
        assert again.spent is not None
        cycle = max(one, short.spent.macs // max(1, short.spent.cycles)) / again.loop.unit
        over = again.spent.passes - passes
        _demand(over <= 2.0 * cycle, f"overran by {over:.0f} passes, a cycle is {cycle:.0f}")
        return f"over by {over / cycle:.2f} cycles"

    def files(self) -> str:
        student = self.trained.method.distilled()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            student.save(folder)
            foreign = [path.name for path in folder.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".json")]
            _demand(not foreign, f"the student wrote {foreign}; only safetensors and json are kept")
            loaded = self.method_class.student_type.load(folder)
        for steps in student.steps:
            same = torch.equal(self._generate(student, steps, 4).x, self._generate(loaded, steps, 4).x)
            _demand(same, f"the loaded student gives other samples at {steps} steps")
        return ""

    def needs(self) -> str:
        source = self.track.source() if "real data" in self.info.needs else _NoData(self.track.source())
        with _only(self.info.needs):
            short = self.short(source=source)
        # An entry of a trace says at its third place how deep in forward-mode derivatives the network was called.
        forward_mode = any(entry[2] >= 0 for key in short.loop.meter.prices for entry in key[1:])
        _demand("jvp" in self.info.needs or not forward_mode, _undeclared("jvp"))
        return ", ".join(self.info.needs) or "nothing"

    def _few(self, n: int) -> tuple[Conditions, list[int]]:
        conditions, seeds = self.track.evaluation()
        rows = torch.linspace(0, len(conditions) - 1, n).long()
        return conditions[rows], [int(seeds[int(row)]) for row in rows]

    def _generate(self, student: Student, steps: int, n: int) -> Any:
        conditions, seeds = self._few(n)
        return student.generate(conditions, steps=steps, seeds=seeds)


class _NoData:
    """A source that gives conditions and refuses data."""

    def __init__(self, source: Source):
        self.conditions = source.conditions

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise ContractError(_undeclared("real data"))


def _undeclared(need: str) -> str:
    return f"the method uses {need!r}, but its needs do not name it"


def _global_generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]


def _moved(before: tuple[Any, ...]) -> str:
    """Whose global generators have been drawn from since: "torch and numpy", or nothing."""
    pairs = zip(("torch", "numpy", "random"), before, _global_generators(), strict=True)
    return " and ".join(name for name, a, b in pairs if not (torch.equal(a, b) if name == "torch" else a == b))


# What of a network cannot be had without its method (for taps: without the check that every use of one passes).
_SURGERY = {
    "taps": "_check_tap", "second time": "with_second_time", "guidance input": "with_guidance_input",
    "log variance": "with_log_variance", "resized": "resized", "lora": "lora",
}  # fmt: skip


@contextmanager
def _only(needs: tuple[str, ...]) -> Iterator[None]:
    """While active, networks refuse the surgery and the taps that `needs` does not name."""
    kept = []
    for need, name in _SURGERY.items():
        for kind in (Backbone, *KINDS.values()):
            if need not in needs and name in vars(kind):
                kept.append((kind, name, vars(kind)[name]))
                setattr(kind, name, _refusing(need))
    try:
        yield
    finally:
        for kind, name, function in kept:
            setattr(kind, name, function)


def _refusing(need: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise ContractError(_undeclared(need))

    return refuse


def _demand(holds: bool, why: str) -> None:
    if not holds:
        raise ContractError(why)


def check_method(target: Any, tracks: tuple[str, ...] | None = None) -> Iterator[Result]:
    """All checks of a method, one by one; a check that fails says why and the next goes on."""
    found = find(target)
    method_class = found.load()
    yield _outcome("card", lambda: _card(found, method_class))
    for name in tracks or tuple(facts.name for facts in FACTS.values() if not facts.extra):
        track = get_track(name)
        missing = track.missing(found.info)
        if missing:
            yield Result(f"{track.id}", True, missing, skipped=True)
            continue
        try:
            kit = Kit(found, method_class, track)
        except Exception as error:
            yield Result(f"{track.id}: knobs", False, str(error))
            continue
        checks = kit.checks() if name == "mixture2d" or tracks else {"declared steps work": kit.declared_steps}
        trains = True
        for title, check in checks.items():
            if not trains:
                yield Result(f"{track.id}: {title}", True, "not reached: the method does not train", skipped=True)
                continue
            result = _outcome(f"{track.id}: {title}", check)
            trains = result.passed or title != "stages"
            yield result


def _card(found: Found, method_class: type[Method]) -> str:
    _demand(issubclass(method_class, Method), f"{method_class.__name__} is no distillbench.api.Method")
    _demand(
        issubclass(getattr(method_class, "student_type", object), Student),
        "student_type must name the Student class that load() is asked of",
    )
    _demand(dataclasses.is_dataclass(method_class.Config), "Config must be a frozen dataclass")
    _demand(method_class.info == found.info, "info differs between source and class; write it as literals")
    _demand(
        ("real data" in found.info.needs) == ("real" in found.info.data_access),
        f"needs {'name' if 'real data' in found.info.needs else 'do not name'} 'real data', data_access is {found.info.data_access!r}",
    )
    undocumented = [f.name for f in dataclasses.fields(method_class.Config) if not f.metadata.get("doc")]
    _demand(not undocumented, f"knobs without a word of documentation: {', '.join(undocumented)}; use knob(default, doc)")
    return f"{found.info.id} {found.info.version}, {len(dataclasses.fields(method_class.Config))} knobs"


def _outcome(name: str, check: Callable[[], str]) -> Result:
    try:
        return Result(name, True, check())
    except Exception as error:
        text = " ".join(str(error).split())
        return Result(name, False, text if isinstance(error, ContractError) else f"{type(error).__name__}: {text}")
