"""Diff-Instruct on a toy: which loss moves what, in what order, on which inputs, under which guidance, and what a sample is."""

from __future__ import annotations

import copy
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
from distillbench.diffusion.base import Schedule
from distillbench.diffusion.schedules import EDM, Flow, VPLinear
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.networks import MLP, MLPConfig
from distillbench.parts.distribution_matching import fake_score_loss
from distillbench.parts.student import FewStepStudent
from distillbench.randomness import generator_for
from distillbench.training.loop import Loop
from distillbench.training.meter import networks_of
from distillbench_methods.diff_instruct import DiffInstruct

MIXTURE = standard_mixture()
SIZE = 16


class NoData:
    """Conditions, but no example may be drawn."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise AssertionError("data was drawn")

    conditions = MixtureSource(MIXTURE).conditions


def toy_teacher(schedule: Schedule | None = None, prediction: str = "velocity") -> Denoiser:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    return external(Denoiser(network, schedule or Flow(), prediction))


def made(*, seed: int = 0, guidance: float = 1.0, teacher: Denoiser | None = None, steps: tuple[int, ...] = (1,),
         **knobs: Any) -> tuple[DiffInstruct, Context]:  # fmt: skip
    context = Context(teacher=teacher or toy_teacher(), shape=(2,), steps=steps, seed=seed, guidance=guidance)
    method = DiffInstruct(make_config(DiffInstruct.Config, "diff_instruct", {"decay": "constant", **knobs}))
    method.build(context)
    return method, context


def batch(count: int = 0, size: int = SIZE, name: str = "t") -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=NoData(), generator=generator_for(0, name, count))


def trained(method: DiffInstruct, context: Context, cycles: int) -> Loop:
    loop = Loop(method, context, NoData(), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE)
    loop.train()
    return loop


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def stirred(method: DiffInstruct) -> DiffInstruct:
    """The fake score away from the teacher's."""
    with torch.no_grad():
        for i, p in enumerate(method.fake.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return method


def calls(method: DiffInstruct, context: Context, turn: Any, drawn: Batch) -> dict[str, list[tuple]]:
    """The inputs of each call of each network in one turn."""
    found: dict[str, list[tuple]] = {"student": [], "teacher": [], "fake": []}
    handles = []
    for name, denoiser in (("student", method.student), ("teacher", context.teacher), ("fake", method.fake)):
        if denoiser is not None:
            (network,) = networks_of([denoiser])
            handles.append(network.register_forward_pre_hook(lambda _m, args, name=name: found[name].append(args)))
    try:
        turn(drawn)
    finally:
        for handle in handles:
            handle.remove()
    return found


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find("diff_instruct").info == DiffInstruct.info


def test_the_claims_name_knobs_that_exist_and_ask_for_few_trainings() -> None:
    settings = set()
    for side in {side for claim in DiffInstruct.info.claims for side in (claim.better, claim.worse)}:
        name, _, knobs = side.partition("(")
        assert name in ("diff_instruct", "teacher")
        make_config(DiffInstruct.Config, name, dict(pair.split("=") for pair in knobs.rstrip(")").split(",") if pair))
        settings |= {knobs} - {""}
    assert 0 < len(settings) <= 5


# ---------------------------------------------------------------- turns


def test_a_cycle_is_the_fake_score_first_then_the_student_each_on_its_own_noise() -> None:
    """By hand, with two optimisers; the second cycle shows that moments and the average go on."""
    method, context = made()
    stirred(method)
    student, fake = copy.deepcopy(method.student), copy.deepcopy(method.fake)
    hand = copy.copy(method)
    hand.student, hand.fake = student, fake
    trained(method, context, 2)
    c = hand.config
    adam = [torch.optim.Adam(m.parameters(), lr=lr, betas=(0.0, 0.999)) for m, lr in ((fake, c.fake_lr), (student, c.lr))]
    for count in range(2):
        drawn = batch(count, name="turn/fake score")
        x, conditions = hand.generate(drawn)
        t = hand.times("lognormal", drawn)
        fake_score_loss(fake, x.detach(), t, drawn.randn(SIZE, 2), conditions).backward()
        adam[0].step()
        drawn = batch(count, name="turn/student")
        x, conditions = hand.generate(drawn)
        t, noise = hand.times("lognormal", drawn), drawn.randn(SIZE, 2)
        x_t = jump(Flow(), x.detach(), noise, t)
        with torch.no_grad():
            difference = fake.x0(x_t, t, conditions) - context.teacher.x0(x_t, t, conditions)
        for p in student.parameters():
            p.grad = None
        ((difference * x).sum() / SIZE).backward()
        adam[1].step()
        for p in fake.parameters():
            p.grad = None
    torch.testing.assert_close(weights(method.fake), weights(fake), rtol=0, atol=2e-5)
    torch.testing.assert_close(weights(method.student), weights(student), rtol=0, atol=2e-5)
    assert (weights(student) - weights(context.teacher)).abs().max() > 3e-4


def test_turns_draw_their_own_noise_and_the_student_is_called_at_one_level() -> None:
    method, context = made(sigma_init=1.7)
    turns = method.stages()[0].turns
    assert [turn.name for turn in turns] == ["fake score", "student"]
    z = [calls(method, context, turn.loss, batch(0, name=f"turn/{turn.name}"))["student"][0] for turn in turns]
    assert (z[0][0] != z[1][0]).all()
    level = 1.7 * 2  # data of deviation 1, levels as given for 0.5
    for _, t, _ in z:
        torch.testing.assert_close(t / (1 - t), torch.full((SIZE,), level), rtol=1e-5, atol=0)


def test_each_loss_reaches_its_own_network_only() -> None:
    method, context = made(guidance=2.0)
    stirred(method)
    for turn, moves, stays in (("student_turn", "student", "fake"), ("fake_turn", "fake", "student")):
        for module in (method.student, method.fake):  # what the loop does before a turn
            module.requires_grad_(module is getattr(method, moves)).zero_grad()
        (loss,) = getattr(method, turn)(batch()).values()
        loss.backward()
        assert max(g.abs().max() for g in gradients(getattr(method, moves))) > 0
        assert not gradients(getattr(method, stays))
        assert not gradients(context.teacher)


def test_no_gradient_reaches_either_score_even_where_nothing_is_frozen() -> None:
    method, _ = made(teacher=Denoiser(MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9)), Flow(), "velocity"))
    stirred(method).student_turn(batch())["matching"].backward()
    assert gradients(method.student)
    assert not gradients(method.fake) + gradients(method.teacher)


def test_training_moves_student_and_fake_score_needs_no_data_and_leaves_the_teacher() -> None:
    method, context = made(fake_per_student=3)
    before = weights(context.teacher).clone()
    loop = trained(method, context, 3)
    assert torch.equal(weights(context.teacher), before)
    assert (loop.position.counts["student"], loop.position.counts["fake score"]) == (3, 9)
    for module in (method.student, method.fake, method.average):
        assert (weights(module) - before).abs().max() > 1e-5


def test_without_a_fake_score_the_student_descends_sds() -> None:
    method, context = made(fake="none")
    assert method.fake is None
    assert [turn.name for turn in method.stages()[0].turns] == ["student"]
    drawn = batch()
    x, conditions = method.generate(drawn)
    t, noise = method.times("lognormal", drawn), drawn.randn(SIZE, 2)
    held = x.detach().requires_grad_()
    method.student_loss(held, t, noise, conditions).backward()
    real = context.teacher.x0(jump(Flow(), held.detach(), noise, t), t, conditions)
    torch.testing.assert_close(held.grad, (held.detach() - real) / SIZE, rtol=1e-4, atol=1e-6)
    assert trained(method, context, 3).spent.updates == 3


def test_the_first_gradient_is_zero_because_the_fake_score_starts_as_the_teacher() -> None:
    method, _ = made()
    method.student_turn(batch())["matching"].backward()
    assert all(g.abs().max() == 0 for g in gradients(method.student))


@pytest.mark.parametrize("law", ["lognormal", "karras"])
@pytest.mark.parametrize("fake_law", ["lognormal", "karras", "both"])
def test_each_loss_draws_its_own_law_of_levels(law: str, fake_law: str) -> None:
    method, context = made(law=law, fake_law=fake_law)
    for turn, name, kind in ((method.student_turn, "teacher", law), (method.fake_turn, "fake", fake_law)):
        drawn = batch(1)
        method.generate(drawn)
        expected = method.times(kind, drawn).float()
        (_, t, _), *_ = calls(method, context, turn, batch(1))[name]
        torch.testing.assert_close(t, expected)


def test_the_rate_falls_over_the_whole_training_and_fake_lr_is_lr_unless_given() -> None:
    method, _ = made(decay="cosine", fake_lr=None, lr=7e-4)
    for turn in method.stages()[0].turns:
        (config,) = turn.optimizer.values()
        assert (config.lr, config.decay, config.over, config.betas, config.clip) == (7e-4, "cosine", "training", (0.0, 0.999), None)


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize(("knobs", "rows"), [({}, (1, 1)), ({"guidance": 3.0}, (2, 1)), ({"guidance": 3.0, "guide_fake": True}, (2, 2))])
def test_guidance_doubles_what_is_guided_and_nothing_is_evaluated_twice(knobs: dict[str, Any], rows: tuple[int, int]) -> None:
    method, context = made(**knobs)
    found = calls(method, context, method.student_turn, batch())
    assert tuple(sum(len(args[0]) for args in found[name]) // SIZE for name in ("teacher", "fake")) == rows


def test_the_track_guides_unless_told() -> None:
    scales = [(m.scale, m.fake_scale) for m, _ in (made(guidance=3.0), made(guidance=3.0, guide_fake=True), made())]
    assert scales == [(3.0, 1.0), (3.0, 3.0), (1.0, 1.0)]
    method, _ = DiffInstruct(DiffInstruct.Config(guidance=4.5)), None
    method.build(Context(teacher=toy_teacher(), shape=(2,), steps=(1,), guidance=3.0))
    assert (method.scale, method.fake_scale) == (4.5, 1.0)


def test_a_guided_fake_score_learns_without_conditions_too_and_no_other_does() -> None:
    for knobs, share in (({"guide_fake": True, "null_prob": 0.3}, 0.3), ({"null_prob": 0.3}, 0.0)):
        method, context = made(guidance=2.0, **knobs)
        found = calls(method, context, method.fake_turn, batch(size=4000))
        (_, _, conditions), *_ = found["fake"]
        assert (conditions.field("label") == MIXTURE.classes).double().mean().item() == pytest.approx(share, abs=0.03)
        assert (found["student"][0][2].field("label") < MIXTURE.classes).all()


# ---------------------------------------------------------------- the student


@pytest.mark.parametrize("path", [Flow(), EDM(), VPLinear()], ids=lambda path: path.name)
def test_a_sample_is_one_call_at_sigma_init_on_any_path(path: Schedule, tmp_path: Path) -> None:
    method, context = made(teacher=toy_teacher(path, "eps"), data_std=0.5)
    conditions, student = MIXTURE.conditions(torch.arange(6)), method.distilled()
    inputs: list[tuple] = []
    handle = student.denoiser.network.register_forward_pre_hook(lambda _, args: inputs.append(args))
    sample = student.generate(conditions, steps=1, seeds=range(6))
    handle.remove()
    ((_, t, _),) = inputs
    assert sample.evaluations == 1
    alpha, sigma = path.levels(t.double())
    torch.testing.assert_close(sigma / alpha, torch.full((6,), 2.5, dtype=torch.float64), rtol=1e-4, atol=0)
    student.save(tmp_path)
    loaded = FewStepStudent.load(tmp_path)
    assert torch.equal(loaded.generate(conditions, steps=1, seeds=range(6)).x, sample.x)
    z = batch().randn(6, 2)
    torch.testing.assert_close(
        method.student.x0(path.start(method.grid[0]) * z, method.grid[0], conditions),
        context.teacher.x0(path.start(method.grid[0]) * z, method.grid[0], conditions),
    )


def test_the_average_that_is_scored_follows_the_student() -> None:
    for half_life, same in ((0.0, True), (700.0, False)):
        method, context = made(half_life=half_life)
        trained(method, context, 12)
        assert torch.equal(weights(method.average), weights(method.student)) == same
        assert method.distilled().denoiser is method.average


def test_one_step_only() -> None:
    for steps in ((1, 2), (4,)):
        with pytest.raises(ContractError, match="diff_instruct trains a student of one step"):
            made(steps=steps)


@pytest.mark.parametrize(
    "knobs",
    [{"betas": (0.9,)}, {"fake_per_student": 0}, {"law": "both"}, {"weighting": "sigma"}, {"sigma_init": 0.0}, {"level_cut": 1.5},
     {"fake": "sds"}, {"clip": 0.0}, {"null_prob": 2}],
)  # fmt: skip
def test_impossible_knobs_are_refused_in_one_line(knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)
