"""DMD on a toy: which pairs are made and for what share, which loss moves what, one cycle by hand, and the rest of the contract."""

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
from distillbench.diffusion import SOLVERS, Denoiser, jump, time_grid
from distillbench.diffusion.schedules import Flow, VPCosine
from distillbench.discovery import find
from distillbench.errors import NotApplicable, UsageError
from distillbench.networks import MLP, MLPConfig, Transformer, TransformerConfig
from distillbench.parts.distribution_matching import matching_gradient
from distillbench.parts.features import feature_distance
from distillbench.parts.student import FewStepStudent
from distillbench.randomness import generator_for
from distillbench.training import state
from distillbench.training.loop import Loop
from distillbench.training.meter import networks_of, pass_cost
from distillbench_methods.dmd import DMD

MIXTURE = standard_mixture()
SIZE = 16


class Stop(Exception):
    """What ends a training in the middle."""


class NoData:
    """Conditions, but no example may be drawn."""

    conditions = MixtureSource(MIXTURE).conditions

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise AssertionError("data was drawn")


def toy_teacher(schedule: Any = None, prediction: str = "velocity") -> Denoiser:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    return external(Denoiser(network, schedule or Flow(), prediction))


def made(*, seed: int = 0, guidance: float = 1.0, teacher: Denoiser | None = None, steps: tuple[int, ...] = (1,),
         folder: Path | None = None, **knobs: Any) -> tuple[DMD, Context]:  # fmt: skip
    context = Context(teacher=teacher or toy_teacher(), shape=(2,), steps=steps, seed=seed, guidance=guidance, folder=folder)
    method = DMD(make_config(DMD.Config, "dmd", {"ode_steps": 3, **knobs}))
    method.build(context)
    return method, context


def batch(count: int = 0, size: int = SIZE, name: str = "t") -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=NoData(), generator=generator_for(0, name, count))


def trained(method: DMD, context: Context, cycles: int, **options: Any) -> Loop:
    loop = Loop(method, context, NoData(), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, **options)
    loop.train()
    return loop


def stirred(method: DMD) -> DMD:
    """A fake score and a student that are no longer the teacher."""
    with torch.no_grad():
        for i, p in enumerate((*method.student.parameters(), *method.fake.parameters())):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return method


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def shares(**knobs: Any) -> dict[str, float]:
    return {stage.name: round(stage.share, 9) for stage in made(**knobs)[0].stages()}


def turns(**knobs: Any) -> dict[str, int]:
    return {turn.name: turn.repeat for turn in made(**knobs)[0].stages()[-1].turns}


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find(Path(__import__("distillbench_methods.dmd", fromlist=["x"]).__file__).as_posix()).info == DMD.info


def test_the_claims_and_the_tuning_name_knobs_that_exist_and_ask_for_few_trainings() -> None:
    settings = set()
    for claim in DMD.info.claims:
        for side in (claim.better, claim.worse):
            name, _, knobs = side.partition("(")
            assert name in ("dmd", "teacher")
            make_config(DMD.Config, "dmd", dict(pair.split("=") for pair in knobs.rstrip(")").split(",") if pair))
            settings |= {knobs} - {""}
    assert 0 < len(settings) <= 5
    for search in DMD.info.tunes:
        for value in search.choices or (search.low, search.high):
            make_config(DMD.Config, "dmd", {search.knob: value})


# ---------------------------------------------------------------- pairs


def test_pairs_have_a_stage_of_their_own_that_is_not_there_without_the_regression() -> None:
    assert shares(pair_share=0.3) == {"pairs": 0.3, "train": 0.7}
    assert shares(lambda_reg=0) == shares(pair_share=0) == {"train": 1.0}


def test_without_the_regression_no_pair_is_made() -> None:
    method, context = made(lambda_reg=0)
    loop = trained(method, context, 5)
    assert method.pairs.count() == 0
    assert loop.spent.updates == 2 * 5
    assert set(method.both_turn(batch())) == {"matching", "fake score"}


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize(("schedule", "prediction"), [(Flow(), "velocity"), (VPCosine(), "eps")], ids=["flow", "cosine"])
def test_pairs_are_what_the_guided_teachers_ode_makes_of_noise(solver: str, schedule: Any, prediction: str) -> None:
    method, context = made(solver=solver, guidance=2.5, teacher=toy_teacher(schedule, prediction), start=0.7)
    z, y, conditions = method.solved(batch())
    again = batch()
    labels = again.conditions()
    assert torch.equal(labels.field("label"), conditions.field("label"))
    assert torch.equal(again.randn(SIZE, 2), z)
    with torch.no_grad():
        start = float(schedule.sigma(1.0)) * z
        expected = SOLVERS[solver](context.teacher, start, labels, time_grid(schedule, 3), guidance_scale=2.5)
    assert torch.equal(y, expected)


def test_a_limit_on_the_pairs_leaves_the_rest_of_their_share_to_training() -> None:
    method, context = made(n_pairs=3 * SIZE - 1, pair_share=0.5)
    loop = trained(method, context, 30)
    assert method.pairs.count() == 3 * SIZE
    assert (loop.position.counts["pairs"], loop.position.counts["both"]) == (3, 30 - 3)


def test_pairs_are_charged_by_what_their_solver_evaluates() -> None:
    spent = []
    for ode_steps in (3, 6, 9):
        method, context = made(n_pairs=SIZE, ode_steps=ode_steps)
        spent.append(trained(method, context, 10).spent.macs)
    one_pass = pass_cost(context.teacher, (2,), MIXTURE.conditions(torch.zeros(1, dtype=torch.long)))
    assert spent[1] - spent[0] == spent[2] - spent[1]
    assert 1 <= (spent[1] - spent[0]) / (3 * SIZE * one_pass) < 1.2  # the toy's passes cost little more than its solver's sums


def test_without_a_share_pairs_are_made_as_they_are_used() -> None:
    method, context = made(pair_share=0)
    loop = trained(method, context, 4)
    assert method.pairs.count() == 0
    assert loop.spent.updates == 2 * 4
    assert "regression" in method.both_turn(batch())


def test_the_regression_draws_its_own_minibatch_of_the_size_it_is_told() -> None:
    for ratio, n in ((1.0, SIZE), (0.5, SIZE // 2), (0.01, 1)):
        method, _ = made(pair_ratio=ratio)
        method.make(batch())
        z, y, conditions = method.drawn(batch(1))
        assert len(z) == len(y) == len(conditions) == n
        x, _ = method.generate(batch(1))
        assert len(x) == SIZE


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("lambda_reg", [0.25, 2.0])
@pytest.mark.parametrize("kind", ["l2", "features"])
def test_the_regression_by_hand(kind: str, lambda_reg: float) -> None:
    method, context = made(reg_distance=kind, lambda_reg=lambda_reg, start=0.8)
    stirred(method).make(batch())
    found = method.regression(batch(1))
    again = batch(1)
    z, y, conditions = method.pairs.draw(again)
    mine = method.student.x0(0.8 * z, 0.8, conditions)
    eps = again.randn(SIZE, 2)
    seen = [context.teacher.predict(jump(Flow(), v, eps, 0.3), 0.3, conditions, taps=("hidden2",)).features["hidden2"] for v in (mine, y)]
    expected = (mine - y).square().mean() if kind == "l2" else feature_distance(*seen)
    assert found.item() == pytest.approx(lambda_reg * expected.item(), rel=1e-4)
    found.backward()
    assert len(gradients(method.student)) == len(list(method.student.parameters()))
    assert not gradients(context.teacher) + gradients(method.fake)


@pytest.mark.parametrize("lambda_dm", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["inv_l1", "sigma/alpha", "none"])
def test_the_matching_gradient_by_hand_with_the_teacher_guided_alone(weighting: str, lambda_dm: float) -> None:
    method, context = made(guidance=3.0, weighting=weighting, lambda_dm=lambda_dm, t_min=0.1, t_max=0.6)
    x, conditions = stirred(method).generate(batch())
    x = x.detach().requires_grad_()
    method.matching(batch(1), x, conditions).backward()
    again = batch(1)
    t = 0.1 + 0.5 * again.rand(SIZE)
    x_t = jump(Flow(), x.detach(), again.randn(SIZE, 2), t)
    with torch.no_grad():
        real = context.teacher.x0(x_t, t, conditions, guidance_scale=3.0)
        g = matching_gradient(x, real, method.fake.x0(x_t, t, conditions), Flow(), t, weighting=weighting)
    torch.testing.assert_close(x.grad, lambda_dm * g.float() / x.numel(), rtol=1e-4, atol=1e-7)


def test_each_loss_reaches_its_own_network_only() -> None:
    method, _ = made(guidance=2.0)
    stirred(method).make(batch())
    x, conditions = method.generate(batch())
    (method.matching(batch(1), x, conditions) + method.regression(batch(1))).backward()
    assert not gradients(method.fake)
    assert max(g.abs().max() for g in gradients(method.student)) > 0
    method.student.zero_grad()
    method.fake_loss(batch(1), x, conditions).backward()
    assert not gradients(method.student)
    assert max(g.abs().max() for g in gradients(method.fake)) > 0


def test_one_cycle_is_the_papers_student_first_then_fake_score_on_the_same_samples() -> None:
    """By hand, with two optimisers, in the paper's order; the second cycle shows that moments go on."""
    method, context = made(guidance=2.0, n_pairs=SIZE, decay="constant", warmup=0.0, lr=1e-3, fake_lr=2e-3)
    stirred(method)
    hand = copy.copy(method)
    hand.student, hand.fake = copy.deepcopy(method.student), copy.deepcopy(method.fake)
    trained(method, context, 3)  # one of pairs, two of training
    student, fake = (list(v.parameters()) for v in (hand.student, hand.fake))
    optimizers = [torch.optim.AdamW(p, lr=lr, weight_decay=0.01) for p, lr in ((student, 1e-3), (fake, 2e-3))]
    for count in range(2):
        drawn = batch(count, name="turn/both")
        x, conditions = hand.generate(drawn)
        (hand.matching(drawn, x, conditions) + hand.regression(drawn)).backward()
        nn.utils.clip_grad_norm_(student, 10.0)
        optimizers[0].step()
        hand.fake_loss(drawn, x, conditions).backward()
        nn.utils.clip_grad_norm_(fake, 10.0)
        optimizers[1].step()
        for p in (*student, *fake):
            p.grad = None
    for mine, theirs in ((method.student, hand.student), (method.fake, hand.fake)):
        torch.testing.assert_close(weights(mine), weights(theirs), rtol=0, atol=2e-6)
    assert torch.equal(weights(method.average), weights(method.student))


@pytest.mark.parametrize(
    ("knobs", "rows"),
    [
        ({}, (2, 1, 2)),
        ({"guidance": 3.0}, (2, 2, 2)),
        ({"lambda_reg": 0}, (1, 1, 2)),
        ({"pair_ratio": 0.5}, (1.5, 1, 2)),
        ({"lambda_dm": 0}, (1, 0, 0)),
        ({"fake": "none"}, (2, 1, 0)),
    ],
    ids=str,
)
def test_a_cycle_evaluates_what_the_paper_says_and_nothing_twice(knobs: dict[str, Any], rows: tuple[float, ...]) -> None:
    method, context = made(**knobs)
    method.make(batch())
    found = dict.fromkeys(("student", "teacher", "fake"), 0)
    labels: list[Tensor] = []
    networks = {"student": method.student, "teacher": context.teacher, "fake": method.fake}
    handles = []
    for name, denoiser in networks.items():
        for network in networks_of([denoiser]) if denoiser is not None else []:

            def hook(_: nn.Module, args: tuple, name: str = name) -> None:
                found[name] += len(args[0])
                labels.extend([args[2].field("label")] if name == "fake" else [])

            handles.append(network.register_forward_pre_hook(hook))
    for turn in method.stages()[-1].turns:
        turn.loss(batch(1))
    for handle in handles:
        handle.remove()
    assert tuple(count / SIZE for count in found.values()) == rows
    assert all((each < MIXTURE.classes).all() for each in labels)  # the fake score always has its condition


# ---------------------------------------------------------------- turns


def test_turns_follow_the_ratio_and_what_is_left_out() -> None:
    assert turns() == {"both": 1}
    assert turns(fake_per_gen=5) == {"student": 1, "fake": 5}
    assert turns(lambda_dm=0) == turns(fake="none") == {"student": 1}


@pytest.mark.parametrize("repeat", [2, 5])
def test_the_fake_score_may_be_updated_more_often(repeat: int) -> None:
    method, context = made(fake_per_gen=repeat, lambda_reg=0)
    before = weights(method.fake)
    counts = trained(method, context, 3).position.counts
    assert (counts["student"], counts["fake"]) == (3, 3 * repeat)
    assert (weights(method.student) - weights(context.teacher)).abs().max() > 1e-4
    assert (weights(method.fake) - before).abs().max() > 1e-4


def test_regression_alone_has_no_fake_score_and_learns_the_pairs() -> None:
    method, context = made(lambda_dm=0, lambda_reg=1, lr=1e-2)
    assert method.fake is None
    before = weights(context.teacher)

    @torch.no_grad()
    def loss() -> float:
        return method.regression(batch(0, size=256)).item()

    start = loss()
    trained(method, context, 80)
    assert loss() < 0.5 * start
    assert torch.equal(weights(context.teacher), before)


# ---------------------------------------------------------------- the rest of the contract


@pytest.mark.parametrize("at", [2, 9])  # in the pairs, in training
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(at: int, tmp_path: Path) -> None:
    whole, context = made(pair_share=0.4, half_life=5.0)
    expected = trained(whole, context, 14)

    def stop(progress: Any) -> None:
        if progress.spent.cycles == at:
            raise Stop

    first, context = made(folder=tmp_path, pair_share=0.4, half_life=5.0)
    with pytest.raises(Stop):
        trained(first, context, 14, folder=tmp_path, checkpoint_seconds=0, report=stop)
    second, context = made(folder=tmp_path, pair_share=0.4, half_life=5.0)
    resumed = trained(second, context, 14, folder=tmp_path)
    assert (resumed.spent.updates, resumed.spent.macs) == (expected.spent.updates, expected.spent.macs)
    assert second.pairs.state_dict() == whole.pairs.state_dict()
    assert whole.pairs.count() > 2 * SIZE
    for name, tensor in state.tensors_of(whole).items():
        assert torch.equal(tensor, state.tensors_of(second)[name]), name


@pytest.mark.parametrize("start", [1.0, 0.8])
def test_a_sample_is_one_call_at_the_start(start: float, tmp_path: Path) -> None:
    method, context = made(start=start)
    trained(method, context, 4)
    student, conditions = method.distilled(), MIXTURE.conditions(torch.arange(8))
    inputs: list[tuple] = []
    handle = student.denoiser.network.register_forward_pre_hook(lambda _, args: inputs.append(args))
    samples = student.generate(conditions, steps=1, seeds=range(8))
    handle.remove()
    ((seen, t, _),) = inputs
    assert (t == start).all()
    assert samples.evaluations == 1
    torch.testing.assert_close(samples.x, seen - start * student.denoiser.network(seen, t, conditions).prediction)
    student.save(tmp_path)
    assert torch.equal(FewStepStudent.load(tmp_path).generate(conditions, steps=1, seeds=range(8)).x, samples.x)


def test_one_step_only() -> None:
    for steps in ((1, 2), (4,)):
        with pytest.raises(ContractError, match="one step"):
            made(steps=steps)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"lambda_reg": 0, "lambda_dm": 0}, "nothing to learn from"),
        ({"t_min": 0.5, "t_max": 0.4}, "is not below t_max"),
        ({"betas": (0.9,)}, "betas are two numbers"),
        ({"fake_per_gen": 0}, "fake_per_gen"),
        ({"reg_distance": "lpips"}, "reg_distance"),
        ({"weighting": "sigma"}, "weighting"),
        ({"reg_distance": "features", "tap": "hidden9"}, "no tap 'hidden9'"),
    ],
    ids=str,
)
def test_impossible_knobs_are_refused_in_one_line(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, ContractError), match=message) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)


def test_features_are_asked_of_networks_that_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLP, "capabilities", frozenset())
    made(reg_distance="features", lambda_reg=0)
    with pytest.raises(NotApplicable, match="hidden features"):
        made(reg_distance="features")


@pytest.mark.parametrize("kind", ["l2", "features"])
def test_it_trains_on_images_too(kind: str) -> None:
    config = TransformerConfig(channels=1, size=8, patch=2, width=16, depth=2, heads=2, classes=8)
    context = Context(teacher=external(Denoiser(Transformer(config), Flow(), "velocity")), shape=(1, 8, 8), steps=(1,), guidance=2.0)
    method = DMD(DMD.Config(ode_steps=2, reg_distance=kind))
    method.build(context)
    Loop(method, context, NoData(), Budget("toy", 5, "steps"), unit=1, batch_size=4).train()
    x = method.distilled().generate(MIXTURE.conditions(torch.arange(3)), steps=1, seeds=range(3)).x
    assert x.shape == (3, 1, 8, 8)
    assert bool(x.isfinite().all())


@pytest.mark.parametrize(
    "knobs",
    [
        {"teacher": toy_teacher(VPCosine(), "eps"), "guidance": 2.0},
        {"weighting": "sigma^3/alpha", "solver": "heun", "pair_ratio": 0.5},
        {"fake": "none", "lambda_reg": 0, "start": 0.8},
        {"fake_per_gen": 2, "reg_distance": "features", "feature_time": 0.0, "half_life": 5.0},
    ],
    ids=str,
)
def test_every_variant_trains_and_samples(knobs: dict[str, Any]) -> None:
    method, context = made(**knobs)
    trained(method, context, 6)
    assert (weights(method.average) - weights(context.teacher)).abs().max() > 1e-4
    x = method.distilled().generate(MIXTURE.conditions(torch.arange(3)), steps=1, seeds=range(3)).x
    assert bool(x.isfinite().all())
