"""DisBack on a toy: what moves when, that the way is recorded and walked back, and that without it nothing but Diff-Instruct is left."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Batch, Conditions, Context, ContractError, external
from distillbench.budget import Budget
from distillbench.config import make_config
from distillbench.data.mixture import MixtureSource, standard_mixture
from distillbench.diffusion import Denoiser, jump
from distillbench.diffusion.schedules import Flow
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.networks import MLP, MLPConfig
from distillbench.parts.student import FewStepStudent
from distillbench.randomness import generator_for
from distillbench.training.loop import Loop
from distillbench_methods import disback
from distillbench_methods.diff_instruct import DiffInstruct
from distillbench_methods.disback import DisBack, equal_weights, mismatch

MIXTURE = standard_mixture()
SIZE = 16


class NoData:
    """Conditions, but no example may be drawn."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise AssertionError("data was drawn")

    conditions = MixtureSource(MIXTURE).conditions


def toy_teacher() -> Denoiser:
    return external(Denoiser(MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9)), Flow(), "velocity"))


def made(kind: type[DiffInstruct] = DisBack, *, guidance: float = 1.0, steps: tuple[int, ...] = (1,), **knobs: Any) -> tuple[Any, Context]:
    context = Context(teacher=toy_teacher(), shape=(2,), steps=steps, guidance=guidance)
    small = {"nodes": 3, "degrade_updates": 2, "degrade_share": 0.3, "walk_share": 0.3, "walk_updates": 1000} if kind is DisBack else {}
    method = kind(make_config(kind.Config, kind.info.id, {**small, **knobs}))
    method.build(context)
    return method, context


def batch(count: int = 0, size: int = SIZE, name: str = "t") -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=NoData(), generator=generator_for(0, name, count))


def trained(method: Any, context: Context, cycles: int = 20, **options: Any) -> Loop:
    loop = Loop(method, context, NoData(), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, **options)
    loop.train()
    return loop


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find(Path(disback.__file__).as_posix()).info == DisBack.info


def test_the_claims_name_knobs_that_exist_and_ask_for_few_trainings() -> None:
    configs = {"disback": DisBack.Config, "diff_instruct": DiffInstruct.Config}
    settings = set()
    for claim in DisBack.info.claims:
        for side in (claim.better, claim.worse):
            name, _, knobs = side.partition("(")
            if name != "teacher":
                make_config(configs[name], name, dict(pair.split("=") for pair in knobs.rstrip(")").split(",") if pair))
                settings |= {side} - {"disback"}
    assert 0 < len(settings) <= 5
    for search in DisBack.info.tunes:
        assert hasattr(DisBack.Config(), search.knob)


# ---------------------------------------------------------------- without a way it is Diff-Instruct


@pytest.mark.parametrize("weighting", ["inv_l1", "none"])
def test_without_nodes_it_is_diff_instruct_bit_for_bit(weighting: str) -> None:
    ours, theirs = made(nodes=0, weighting=weighting), made(DiffInstruct, weighting=weighting)
    spent = [trained(*pair).spent for pair in (ours, theirs)]
    for name in ("student", "average", "fake"):
        assert equal_weights(getattr(ours[0], name), getattr(theirs[0], name)), name
    assert spent[0].macs == spent[1].macs
    assert not equal_weights(ours[0].student, ours[0].original)


def test_nodes_that_are_all_the_teacher_leave_diff_instruct_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way's updates at rate 0. The check that a node is another network would stop it."""
    with pytest.raises(ContractError, match="nodes 3 and 2 have the same weights"):
        trained(*made(degrade_lr=0.0))
    monkeypatch.setattr(disback, "equal_weights", lambda one, other: False)
    ours, theirs = made(degrade_lr=0.0, fake_init="teacher", decay="constant"), made(DiffInstruct, weighting="inv_l1", decay="constant")
    loops = trained(*ours), trained(*theirs, cycles=17)
    assert loops[0].position.counts["student"] == loops[1].position.counts["student"] == 17
    for name in ("student", "average", "fake"):
        assert equal_weights(getattr(ours[0], name), getattr(theirs[0], name)), name
    assert ours[0].recorded == 3


# ---------------------------------------------------------------- what moves when


def test_the_student_stands_still_while_recording_and_the_nodes_while_walking() -> None:
    method, context = made(degrade_lr=1e-2)
    seen: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def look(progress: Any) -> None:
        both = torch.cat([weights(method.student), weights(method.average)])
        seen.append((progress.stage, both, weights(method.nodes), weights(method.teacher)))

    loop = trained(method, context, report=look)
    teacher = weights(context.teacher)
    recording = [one for one in seen if one[0] == "recording"]
    assert len(recording) == loop.position.counts["record"] == 3
    assert loop.position.counts["degradation"] == 6
    for _, student, _, target in recording:
        assert torch.equal(student, torch.cat([teacher, teacher]))
        assert torch.equal(target, teacher)
    later = [one for one in seen if one[0] != "recording"]
    assert all(torch.equal(nodes, recording[-1][2]) for _, _, nodes, _ in later)
    assert not torch.equal(later[-1][1], recording[-1][1])
    assert list(dict.fromkeys(stage for stage, *_ in later)) == ["node 2", "node 1", "teacher"]
    for stage, _, _, target in later:
        assert torch.equal(target, weights(method.node({"node 2": 2, "node 1": 1, "teacher": 0}[stage])))
    assert equal_weights(method.teacher, context.teacher)  # bit for bit at the end


def test_each_exchange_changes_the_teachers_weights_and_what_the_student_is_told() -> None:
    method, context = made(degrade_lr=1e-2)
    trained(method, context)
    told = []
    for i in (2, 1, 0):
        method.backtrack(i)
        method.backtrack(i)  # a second time changes nothing
        x = torch.randn(SIZE, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        t, conditions = torch.full((SIZE,), 0.5, dtype=torch.float64), batch().conditions()
        method.student_loss(x, t, batch().randn(SIZE, 2), conditions).backward()
        told.append((weights(method.teacher), x.grad))
    for (before, gradient), (after, next_gradient) in pairwise(told):
        assert (before - after).abs().max() > 1e-4
        assert (gradient - next_gradient).abs().max() > 1e-6


def test_a_node_holds_what_the_degrading_teacher_was_after_its_updates() -> None:
    """By hand: M updates of the fake score's loss on samples of the teacher's copy, N times."""
    method, context = made(degrade_lr=1e-2, decay="constant")
    hand, _ = made()
    trained(method, context)
    optimizer = torch.optim.Adam(hand.fake.parameters(), lr=1e-2, betas=(0.0, 0.999))
    hand.student.requires_grad_(False)
    for count in range(6):
        optimizer.zero_grad()
        hand.fake_turn(batch(count, name="turn/degradation"))["fake score"].backward()
        optimizer.step()
        if count % 2:
            torch.testing.assert_close(weights(method.node(count // 2 + 1)), weights(hand.fake), rtol=0, atol=2e-6)


def test_the_loss_falls_along_the_way_and_its_start_is_the_teacher() -> None:
    method, context = made(nodes=4, degrade_updates=20, degrade_lr=1e-2, degrade_share=0.4, batch_size=64)
    assert method.node(0) is context.teacher

    @torch.no_grad()
    def loss(node: Denoiser) -> float:
        method.fake.load_state_dict(node.state_dict())
        method.student.load_state_dict(context.teacher.state_dict())
        return method.fake_turn(batch(size=8192))["fake score"].item()

    trained(method, context, 10)
    losses = [loss(method.node(i)) for i in range(5)]
    noise = 0.01 * losses[0]
    assert all(later <= before + noise for before, later in pairwise(losses)), losses
    assert losses[4] < 0.8 * losses[0]


@pytest.mark.parametrize(("start", "node"), [("last node", 3), ("teacher", 0)])
def test_the_fake_score_starts_where_it_is_told_with_fresh_moments_and_the_students_go_on(start: str, node: int) -> None:
    method, context = made(fake_init=start, fake_lr=0.0, degrade_lr=1e-2)
    loop = Loop(method, context, NoData(), Budget("toy", 20, "steps"), unit=1, batch_size=SIZE)
    steps: dict[str, dict[str, int]] = {}

    def look(progress: Any) -> None:
        steps[progress.stage] = {key: int(o.state_dict()["state"][0]["step"]) for key, o in loop._optimizers.items()}

    loop.report = look
    loop.train()
    assert equal_weights(method.fake, method.node(node))
    assert steps["recording"] == {"degradation/fake": 6}
    assert steps["teacher"] == {"fake score/fake": 17, "student/student": 17}  # no node's stage began them again


@pytest.mark.parametrize(("knobs", "recorded", "way"), [
    ({"degrade_share": 0.05}, 1, ["teacher"]), ({"degrade_share": 0.1}, 2, ["node 1", "teacher"]), ({"nodes": 1}, 1, ["teacher"]),
])  # fmt: skip
def test_the_way_back_starts_before_the_last_node_that_the_budget_allowed(knobs: dict[str, Any], recorded: int, way: list[str]) -> None:
    method, context = made(**knobs, degrade_lr=1e-2)
    stages: list[str] = []
    trained(method, context, report=lambda progress: stages.append(progress.stage))
    assert method.recorded == recorded
    assert list(dict.fromkeys(stages)) == ["recording", *way]
    assert equal_weights(method.teacher, context.teacher)


def test_what_recording_and_nodes_leave_of_their_shares_comes_to_the_teacher() -> None:
    method, context = made(walk_updates=2, degrade_lr=1e-2, degrade_share=0.3, walk_share=0.3)
    stages: list[str] = []
    trained(method, context, 40, report=lambda progress: stages.append(progress.stage))
    assert {name: stages.count(name) for name in dict.fromkeys(stages)} == {"recording": 3, "node 2": 2, "node 1": 2, "teacher": 33}


def test_recorded_weights_may_be_an_average() -> None:
    method, context = made(node_half_life=50.0, degrade_lr=1e-2, fake_lr=0.0)
    trained(method, context)
    plain, other = made(degrade_lr=1e-2, fake_lr=0.0)
    trained(plain, other)
    moved = [(weights(m.node(3)) - weights(context.teacher)).norm().item() for m in (method, plain)]
    assert 0 < moved[0] < 0.5 * moved[1]
    assert equal_weights(method.fake, method.node(3))


# ---------------------------------------------------------------- conditions, guidance, mismatch


@pytest.mark.parametrize(("guidance", "share"), [(1.0, 0.0), (3.0, 0.3)])
def test_conditions_are_dropped_while_recording_for_a_guided_teacher_only(guidance: float, share: float) -> None:
    method, _ = made(guidance=guidance, degrade_null_prob=0.3)
    labels: dict[str, Tensor] = {}
    for name in ("student", "fake"):
        hook = lambda _m, args, name=name: labels.__setitem__(name, args[2].field("label"))  # noqa: E731
        getattr(method, name).network.register_forward_pre_hook(hook)
    method.degrade_turn(batch(size=4000))
    gone = (labels["fake"] == MIXTURE.classes).double().mean().item()
    assert abs(gone - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-12
    assert not (labels["student"] == MIXTURE.classes).any()


def test_dropped_conditions_teach_a_node_what_to_say_without_them() -> None:
    """At null_prob 0 the unconditional branch only drifts; its loss must be lower with dropping."""
    losses = []
    for null_prob in (0.0, 0.5):
        method, context = made(guidance=2.0, degrade_null_prob=null_prob, nodes=1, degrade_updates=60, degrade_lr=3e-3)
        trained(method, context, 2)
        method.fake.load_state_dict(method.node(1).state_dict())
        method.student.load_state_dict(context.teacher.state_dict())
        method.config = make_config(DisBack.Config, "disback", {"degrade_null_prob": 1.0})
        with torch.no_grad():
            losses.append(method.degrade_turn(batch(size=8192))["degradation"].item())
    assert losses[1] < losses[0]


def test_the_mismatch_by_hand_and_that_it_is_0_for_equal_scores() -> None:
    method, context = made()
    t, noise = torch.full((SIZE,), 0.4, dtype=torch.float64), batch(1).randn(SIZE, 2)
    x, conditions = batch().randn(SIZE, 2), batch().conditions()
    assert mismatch(x, t, noise, conditions, context.teacher, method.fake).item() == 0
    with torch.no_grad():
        for p in method.fake.parameters():
            p.mul_(1.1)
        x_t = jump(Flow(), x, noise, t)
        fake = method.fake.x0(x_t, t, conditions)
        for scale in (1.0, 3.0):
            real = context.teacher.x0(x_t, t, conditions, guidance_scale=scale)
            found = mismatch(x, t, noise, conditions, context.teacher, method.fake, guidance_scale=scale)
            expected = (fake - real).abs().sum() / (x - real).abs().sum()
            torch.testing.assert_close(found, expected)


def test_an_adaptive_way_leaves_a_node_when_the_mismatch_stops_falling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disback, "WATCH_EVERY", 1)
    values = iter([0.5, 0.4, 0.45, 0.41, 0.9] + [0.9 - 0.01 * k for k in range(50)])
    monkeypatch.setattr(disback, "mismatch", lambda *args, **options: torch.tensor(next(values)))
    method, context = made(advance="adaptive", patience=2, degrade_lr=1e-2, walk_share=0.6)
    stages: list[str] = []
    trained(method, context, 40, report=lambda progress: stages.append(progress.stage))
    assert stages.count("node 2") == 4  # two lows, then two without a new one
    assert stages.count("node 1") == round(0.9 * 40) - 4 - 3  # it falls all along there, so the share ends it
    assert stages.count("teacher") == 4


def test_an_adaptive_run_that_was_broken_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disback, "WATCH_EVERY", 2)
    knobs = {"advance": "adaptive", "patience": 1, "degrade_lr": 1e-2, "walk_share": 0.6, "node_half_life": 3.0}
    whole, context = made(**knobs)
    trained(whole, context)
    for stop in (2, 9):

        def halt(progress: Any, stop: int = stop) -> None:
            if progress.spent.cycles == stop:
                raise KeyboardInterrupt

        broken, context = made(**knobs)
        with pytest.raises(KeyboardInterrupt):
            trained(broken, context, folder=tmp_path / str(stop), checkpoint_seconds=0.0, report=halt)
        resumed, context = made(**knobs)
        trained(resumed, context, folder=tmp_path / str(stop))
        for name in ("student", "average", "fake", "nodes", "teacher"):
            assert equal_weights(getattr(whole, name), getattr(resumed, name)), (stop, name)
        assert (whole.lowest, whole.stale, whole.recorded) == (resumed.lowest, resumed.stale, resumed.recorded)


# ---------------------------------------------------------------- the rest of the contract


def test_one_step_only() -> None:
    with pytest.raises(ContractError, match="disback trains a student of one step"):
        made(steps=(1, 2))


@pytest.mark.parametrize("knobs", [
    {"fake": "none"}, {"degrade_share": 0.6, "walk_share": 0.5}, {"degrade_updates": 0}, {"nodes": -1}, {"fake_init": "data"},
    {"advance": "never"}, {"betas": (0.9,)}, {"patience": 0},
])  # fmt: skip
def test_impossible_knobs_are_refused_in_one_line(knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)


def test_without_nodes_there_may_be_no_fake_score() -> None:
    method, context = made(nodes=0, fake="none")
    trained(method, context, 3)
    assert not equal_weights(method.student, context.teacher)


def test_the_student_survives_its_folder(tmp_path: Path) -> None:
    method, context = made(degrade_lr=1e-2)
    trained(method, context)
    student = method.distilled()
    student.save(tmp_path)
    conditions = MIXTURE.conditions(torch.arange(8))
    assert torch.equal(*(s.generate(conditions, steps=1, seeds=range(8)).x for s in (student, FewStepStudent.load(tmp_path))))
