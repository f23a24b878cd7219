"""Five methods that are hard in five ways, sketched on the contract: what they list must be what the loop can run."""

from __future__ import annotations

import importlib.util
import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Batch, Conditions, Context, Method, Source, Stage, external, is_external
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import Flow
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.randomness import generator_for

CLASSES, LENGTH, VOCABULARY = 4, 10, 7


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sketch_{name}", Path(__file__).with_name(f"sketch_{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


DISBACK, DISTILLSPEC, HYPER_SD, MSD, PVD = (load(name) for name in ("disback", "distillspec", "hyper_sd", "msd", "pvd"))


class Labelled:
    """Points in the plane with a class."""

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return Conditions({"label": torch.randint(CLASSES, (n,), generator=generator)}, {"label": CLASSES})

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        conditions = self.conditions(n, generator)
        return torch.randn(n, 2, generator=generator) + conditions.field("label")[:, None], conditions


class Prompts:
    """Texts of random tokens behind prompts of two or three tokens; token 1 ends a text."""

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return Conditions({"prompt_length": torch.randint(2, 4, (n,), generator=generator)})

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        return torch.randint(VOCABULARY, (n, LENGTH), generator=generator), self.conditions(n, generator)


class Rays:
    """Rays from a sphere of radius 4 to near its centre."""

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        origin = 4 * nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1)
        aim = 0.3 * torch.randn(n, 3, generator=generator)
        return Conditions({"origin": origin, "direction": nn.functional.normalize(aim - origin, dim=1)})

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise AssertionError("field conversion asks for no images")


class TinyField(PVD.Field):  # type: ignore[name-defined]
    """A linear volume under linear heads."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.volume = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 16))
        self.heads = nn.Linear(16 + 3, 3)
        redraw(self, generator)

    def forward(self, x: Tensor, direction: Tensor, depth: str) -> dict[str, Tensor]:
        features = self.volume(x)
        if depth == "features":
            return {"features": features}
        return {"features": features, "colour": self.heads(torch.cat((features, direction), dim=1)).sigmoid()}

    def other(self, kind: str, generator: torch.Generator) -> TinyField:
        return TinyField(5, generator)

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> TinyField:
        return cls(5, generator_for(0, "field", 0))


class TinyLanguage(DISTILLSPEC.LanguageModel):  # type: ignore[name-defined]
    """The next token from the present one."""

    end = 1

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        redraw(self, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)

    def draft(self) -> TinyLanguage:
        return TinyLanguage(generator_for(0, "draft", 0))

    def write(self, prompts: Conditions, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        text = torch.full((len(prompts), LENGTH), 2)
        for i in range(1, LENGTH):
            chosen = torch.multinomial((self(text[:, i - 1]) / temperature).softmax(-1), 1, generator=generator)[:, 0]
            text[:, i] = torch.where(i >= prompts.field("prompt_length"), chosen, text[:, i])
        return text

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> TinyLanguage:
        return cls(generator_for(0, "draft", 0))


def redraw(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)


@dataclass(frozen=True)
class Case:
    method: Callable[[], Method]
    teacher: Callable[[], nn.Module]
    source: Source
    shape: tuple[int, ...]
    stages: tuple[str, ...]


def denoiser() -> nn.Module:
    network = MLP(MLPConfig(width=8, depth=2, classes=CLASSES), generator_for(0, "teacher", 0))
    return Denoiser(network, Flow(), "velocity")


def case(module: ModuleType, name: str, stages: str, **knobs: Any) -> Any:
    kind = getattr(module, name)
    worlds: dict[str, tuple[Callable[[], nn.Module], Source, tuple[int, ...]]] = {
        "diffusion": (denoiser, Labelled(), (2,)),
        "language": (lambda: TinyLanguage(generator_for(0, "target", 0)), Prompts(), (LENGTH,)),
        "radiance": (lambda: TinyField(6, generator_for(0, "field", 0)), Rays(), (3,)),
    }
    identity = "-".join([kind.info.id, *(f"{k}={v}" for k, v in knobs.items())])
    return pytest.param(Case(lambda: kind(kind.Config(**knobs)), *worlds[kind.info.domain[0]], tuple(stages.split(", "))), id=identity)


CASES = [
    case(HYPER_SD, "HyperSD", "8 segments, 4 segments, 2 segments, 1 segments, feedback, one step"),
    case(MSD, "MSD", "matching, adversarial"),
    case(MSD, "MSD", "pretraining, matching, adversarial", width=4, students=2),
    case(DISBACK, "DisBack", "teacher", nodes=0),
    case(DISBACK, "DisBack", "record 1, teacher", nodes=1),
    case(DISBACK, "DisBack", "record 1, record 2, record 3, node 2, node 1, teacher", nodes=3),
    case(DISTILLSPEC, "DistillSpec", "distil"),
    case(DISTILLSPEC, "DistillSpec", "distil", data="fixed", divergence="tvd"),
    case(DISTILLSPEC, "DistillSpec", "target text, distil", data="target", divergence="rkl", kept=16),
    case(DISTILLSPEC, "DistillSpec", "target text, distil", data="mixed", divergence="jsd", kept=16),
    case(PVD, "PVD", "features, points, pixels"),
    case(PVD, "PVD", "features, points, pixels", train_heads=False),
]
every_case = pytest.mark.parametrize("case", CASES)


def built(case: Case) -> Method:
    method = case.method()
    catalog = Conditions({"label": torch.arange(CLASSES)}, {"label": CLASSES})
    method.build(Context(external(case.teacher()), case.shape, method.info.steps, guidance=2.0, catalog=catalog))
    return method


def modules(method: Method) -> dict[str, nn.Module]:
    return {name: value for name, value in vars(method).items() if isinstance(value, nn.Module)}


def state(method: Method) -> dict[str, Tensor]:
    tensors = {name: value.clone() for name, value in vars(method).items() if isinstance(value, Tensor)}
    return tensors | {f"{name}.{key}": value.clone() for name, m in modules(method).items() for key, value in m.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def outline(stages: list[Stage]) -> list[Any]:
    return [(s.name, s.share, s.ema, s.reset, [(t.name, t.repeat, t.batch_size, dict(t.optimizer), {k: id(m) for k, m in t.updates.items()})
                                               for t in s.turns]) for s in stages]  # fmt: skip


def batch(case: Case, turn: str, count: int = 0) -> Batch:
    return Batch(size=8, count=count, progress=0.5, source=case.source, generator=generator_for(0, f"turn/{turn}", count))


@every_case
def test_stages_are_listed_without_changing_anything(case: Case) -> None:
    method = built(case)
    before = state(method)
    first, second = method.stages(), method.stages()
    assert tuple(stage.name for stage in first) == case.stages
    assert outline(first) == outline(second)
    assert not changed(before, state(method))


@every_case
def test_shares_turns_and_optimizers_fit_together(case: Case) -> None:
    stages = built(case).stages()
    assert sum(stage.share for stage in stages) == pytest.approx(1.0, abs=1e-9)
    assert min(stage.share for stage in stages) > 0
    moved: dict[tuple[str, str], int] = {}
    for stage in stages:
        assert len({turn.name for turn in stage.turns}) == len(stage.turns) > 0
        for turn in stage.turns:
            assert set(turn.updates) == set(turn.optimizer)
            assert "/" not in turn.name
            for name, module in turn.updates.items():
                # One optimiser serves (turn, name) in every stage, so it must always mean the same module.
                assert moved.setdefault((turn.name, name), id(module)) == id(module)


@every_case
def test_every_module_is_found_in_the_attributes(case: Case) -> None:
    method = built(case)
    for name, value in vars(method).items():
        if isinstance(value, (list, tuple, set, dict)):
            assert not any(isinstance(item, (nn.Module, Tensor)) for item in (value.values() if isinstance(value, dict) else value)), name
    found = {id(m) for root in modules(method).values() for m in root.modules() if not is_external(root)}
    assert all(id(module) in found for stage in method.stages() for turn in stage.turns for module in turn.updates.values())


@every_case
def test_averages_have_sources_that_their_stage_moves(case: Case) -> None:
    method = built(case)
    for stage in method.stages():
        moved = {id(p) for turn in stage.turns for module in turn.updates.values() for p in module.parameters()}
        for name, ema in stage.ema.items():
            kept, source = operator.attrgetter(name)(method), operator.attrgetter(ema.of)(method)
            assert [(k, v.shape) for k, v in kept.state_dict().items()] == [(k, v.shape) for k, v in source.state_dict().items()]
            assert not {id(p) for p in kept.parameters()} & {id(p) for p in source.parameters()}
            assert {id(p) for p in source.parameters()} <= moved


@every_case
def test_every_turn_moves_exactly_what_it_names(case: Case) -> None:
    """Walk through the stages, one execution of each turn, with plain gradient steps in place of the loop."""
    method = built(case)
    for stage in method.stages():
        if stage.begin is not None:
            stage.begin()
        for turn in stage.turns:
            own = [p for module in turn.updates.values() for p in module.parameters()]
            for root in modules(method).values():
                root.requires_grad_(False)
            for parameter in own:
                parameter.requires_grad_(True)
            before, loss = state(method), turn.loss(batch(case, turn.name))
            if turn.is_work:
                assert loss is None
                assert changed(before, state(method))
                continue
            assert loss is not None
            assert not changed(before, state(method)), "a loss is pure"
            total = loss if isinstance(loss, Tensor) else torch.stack(list(loss.values())).sum()
            assert torch.isfinite(total)
            total.backward()
            for name, module in turn.updates.items():
                assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()), (turn.name, name)
            with torch.no_grad():
                for parameter in own:
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=0.01)
                    parameter.grad = None
            names = {name for name, p in ((f"{r}.{k}", p) for r, m in modules(method).items() for k, p in m.named_parameters())
                     if any(p is q for q in own)}  # fmt: skip
            assert changed(before, state(method)) <= names
        if stage.end is not None:
            stage.end()


@every_case
def test_a_repeated_execution_changes_nothing_more(case: Case) -> None:
    """Losses and work depend on the batch's count alone, so a resumed run that repeats them ends in the same state."""
    method, drawn = built(case), torch.get_rng_state()
    for stage in method.stages():
        for turn in stage.turns:
            first = turn.loss(batch(case, turn.name, 3))
            before = state(method)
            second = turn.loss(batch(case, turn.name, 3))
            assert not changed(before, state(method))
            if isinstance(first, Tensor):
                assert torch.equal(first, second)  # type: ignore[arg-type]
    assert torch.equal(drawn, torch.get_rng_state()), "noise comes from the batch, never from global state"


@every_case
def test_ends_copy_weights_and_can_be_replayed(case: Case) -> None:
    method = built(case)
    for stage in method.stages():
        for step in (stage.begin, stage.end):
            if step is not None:
                for root in modules(method).values():
                    root.requires_grad_(False)
                step()
                once = state(method)
                step()
                assert not changed(once, state(method))


def test_disback_records_what_the_fake_score_was() -> None:
    case = CASES[5].values[0]
    method: Any = built(case)
    for number, stage in enumerate(method.stages()[:3]):
        with torch.no_grad():
            for parameter in method.fake.parameters():
                parameter += 1.0
        stage.end()
        assert torch.equal(next(method.nodes[number].parameters()), next(method.fake.parameters()))
    firsts = [next(node.parameters()).flatten()[0].item() for node in method.nodes]
    assert firsts[0] < firsts[1] < firsts[2]


def test_msd_routes_every_condition_to_one_student_and_draws_only_its_part() -> None:
    case = CASES[1].values[0]
    method: Any = built(case)
    method.config = replace(method.config, students=2)
    method.build(Context(method.teacher, (2,), (1,), catalog=Conditions({"label": torch.arange(CLASSES)}, {"label": CLASSES})))
    assert method.route.tolist() == [0, 0, 1, 1]
    seen = batch(case, "student 1").conditions(lambda c: method.within(1, c)).field("label")
    assert set(seen.tolist()) == {2, 3}


def test_distillspec_keeps_the_end_token_and_nothing_behind_it() -> None:
    tokens = torch.tensor([[1, 5, 3, 1, 4, 1], [2, 2, 5, 5, 5, 5]])
    keep = DISTILLSPEC.completion(tokens, torch.tensor([2, 3]), 1)
    assert keep.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]


def test_pvd_weight_of_the_features_follows_the_whole_training() -> None:
    case = CASES[10].values[0]
    method: Any = built(case)
    for stage in method.stages():
        values = []
        for overall in (0.1, 0.12):
            b = Batch(size=8, count=0, progress=0.5, overall=overall, source=case.source, generator=generator_for(0, "turn", 0))
            values.append(stage.turns[0].loss(b)["features"].item())
        assert values[1] / values[0] == pytest.approx(math.exp(-0.02 * method.config.decay), rel=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.values[0].shape == (2,)])
def test_students_make_the_same_sample_in_any_batch_and_from_disk(case: Case, tmp_path: Path) -> None:
    student = built(case).distilled()
    conditions = Conditions({"label": torch.tensor([3, 0, 2, 0, 1])}, {"label": CLASSES})
    whole = student.generate(conditions, steps=1, seeds=[5, 6, 7, 8, 9]).x
    alone = torch.cat([student.generate(conditions[[i]], steps=1, seeds=[5 + i]).x for i in range(5)])
    assert torch.allclose(whole, alone, atol=1e-6)
    student.save(tmp_path)
    again = type(student).load(tmp_path).generate(conditions, steps=1, seeds=[5, 6, 7, 8, 9]).x
    assert torch.equal(whole, again)
