"""SwiftBrush on a toy: which loss moves what, in what order, on which inputs, where the adapters sit, and what a sample is."""

from __future__ import annotations

import copy
import math
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
from distillbench.diffusion.schedules import Flow, VPTable
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.networks import MLP, MLPConfig, Transformer, TransformerConfig
from distillbench.parts.student import FewStepStudent
from distillbench.randomness import generator_for
from distillbench.training.loop import Loop
from distillbench.training.meter import networks_of
from distillbench_methods.swiftbrush import SwiftBrush

MIXTURE = standard_mixture()
SIZE = 16
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
STABLE_DIFFUSION = VPTable(tuple((1 - BETAS).cumprod(0).tolist()))


class NoData:
    """Conditions, but no example may be drawn."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise AssertionError("data was drawn")

    conditions = MixtureSource(MIXTURE).conditions


def toy_teacher(schedule: Schedule | None = None, prediction: str = "velocity") -> Denoiser:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    return external(Denoiser(network, schedule or Flow(), prediction))


def made(*, seed: int = 0, guidance: float = 1.0, teacher: Denoiser | None = None, steps: tuple[int, ...] = (1,),
         **knobs: Any) -> tuple[SwiftBrush, Context]:  # fmt: skip
    context = Context(teacher=teacher or toy_teacher(), shape=(2,), steps=steps, seed=seed, guidance=guidance)
    method = SwiftBrush(make_config(SwiftBrush.Config, "swiftbrush", {"lr": 1e-3, **knobs}))
    method.build(context)
    return method, context


def batch(count: int = 0, size: int = SIZE, name: str = "t") -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=NoData(), generator=generator_for(0, name, count))


def trained(method: SwiftBrush, context: Context, cycles: int, source: Any = None) -> Loop:
    loop = Loop(method, context, source or NoData(), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE)
    loop.train()
    return loop


def only(method: SwiftBrush, *moving: nn.Module) -> None:
    """What the loop does before a turn."""
    for module in (method.student, method.average, method.fake):
        module.requires_grad_(False)
    for module in moving:
        module.requires_grad_(True)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def stirred(method: SwiftBrush) -> SwiftBrush:
    """Adapters away from zero, so that the fake score is another than the teacher."""
    with torch.no_grad():
        for i, p in enumerate(method.fake.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return method


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find(Path(__import__("distillbench_methods.swiftbrush", fromlist=["x"]).__file__).as_posix()).info == SwiftBrush.info


def test_the_claims_name_knobs_that_exist_and_ask_for_few_trainings() -> None:
    settings = set()
    for claim in SwiftBrush.info.claims:
        for side in (claim.better, claim.worse):
            name, _, knobs = side.partition("(")
            assert name in ("swiftbrush", "teacher")
            make_config(SwiftBrush.Config, "swiftbrush", dict(pair.split("=") for pair in knobs.rstrip(")").split(",") if pair))
            settings |= {knobs} - {""}
    assert 0 < len(settings) <= 5


@pytest.mark.parametrize("g", [1.0, 2.0, 4.5, 7.5])
@pytest.mark.parametrize("knobs", [{}, {"weighting": "1"}, {"weighting": "inv_l1"}, {"lora_rank": 0}])
def test_with_adapters_at_zero_the_first_gradient_is_exactly_zero(g: float, knobs: dict[str, Any]) -> None:
    method, _ = made(g=g, **knobs)
    only(method, method.student)
    x, conditions = method.generate(batch())
    method.student_loss(batch(1), x, conditions).backward()
    assert all(p.abs().max() == 0 for p in gradients(method.student))
    stirred(method).student_loss(batch(1), *method.generate(batch())).backward()
    assert max(p.abs().max() for p in gradients(method.student)) > 1e-6


def test_one_cycle_is_the_papers_student_first_then_adapters_on_the_same_samples() -> None:
    """By hand, with two optimisers, in the paper's order; the second cycle shows that moments and averages go on."""
    method, context = made(guidance=3.0, null_prob=0.5)
    stirred(method)
    hand = copy.copy(method)
    hand.student, hand.fake = copy.deepcopy(method.student), copy.deepcopy(method.fake)
    trained(method, context, 2)
    student, fake = (list(v.parameters()) for v in (hand.student, hand.fake))
    optimizers = torch.optim.Adam(student, lr=1e-3), torch.optim.Adam(fake, lr=hand.config.fake_lr)
    for count in range(2):
        drawn = batch(count, name="turn/both")
        x, conditions = hand.generate(drawn)
        hand.student_loss(drawn, x, conditions).backward()
        nn.utils.clip_grad_norm_(student, 1.0)
        optimizers[0].step()
        assert all(p.grad is None for p in fake)
        hand.fake_loss(drawn, x, conditions).backward()
        nn.utils.clip_grad_norm_(fake, 1.0)
        optimizers[1].step()
        for p in (*student, *fake):
            p.grad = None
    for mine, theirs in ((method.student, hand.student), (method.fake, hand.fake)):
        torch.testing.assert_close(weights(mine), weights(theirs), rtol=0, atol=2e-6)
    assert (weights(method.student) - weights(context.teacher)).abs().max() > 1e-3


def test_training_moves_student_and_adapters_and_needs_no_images() -> None:
    method, context = made()
    before = {name: value.clone() for name, value in (*context.teacher.state_dict().items(), *method.fake.state_dict().items())}
    loop = trained(method, context, 4)
    assert all(torch.equal(value, before[name]) for name, value in context.teacher.state_dict().items())
    adapters = {name for name, _ in method.fake.named_parameters()}
    for name, value in method.fake.state_dict().items():
        assert torch.equal(value, before[name]) != (name in adapters), name
    assert {name.rsplit(".", 1)[1] for name in adapters} == {"up", "down"}
    assert (weights(method.student) - weights(context.teacher)).abs().max() > 1e-4
    assert loop.position.counts["both"] == 4
    assert [turn.name for turn in method.stages()[0].turns] == ["both"]


def test_each_loss_reaches_its_own_network_only() -> None:
    method, _ = made(guidance=2.0)
    stirred(method)
    only(method, method.student, method.fake)
    x, conditions = method.generate(batch())
    method.student_loss(batch(1), x, conditions).backward()
    assert not gradients(method.fake)
    assert max(g.abs().max() for g in gradients(method.student)) > 0
    method.student.zero_grad()
    method.fake_loss(batch(1), x, conditions).backward()
    assert not gradients(method.student)
    assert max(g.abs().max() for g in gradients(method.fake)) > 0


def test_the_fake_scores_loss_by_hand() -> None:
    for knobs, power in (({}, 2), ({"fake_weighting": "plain"}, 0)):
        method, _ = made(**knobs)
        stirred(method)
        x, conditions = method.generate(batch())
        drawn = batch(1)
        t, eps = 0.001 + 0.999 * drawn.rand(SIZE), drawn.randn(SIZE, 2)
        x_t = jump(Flow(), x.detach(), eps, t)
        said = method.fake.predict(x_t, t, conditions)
        error = (said.eps - eps) if power else (said.velocity - (eps - x.detach()))
        expected = ((1 - t)[:, None] ** power * error.square()).mean()
        assert method.fake_loss(batch(1), x, conditions).item() == pytest.approx(expected.item(), rel=1e-4)


def calls(method: SwiftBrush, context: Context, turn: Any, drawn: Batch) -> dict[str, list[Tensor]]:
    """The labels of each call of each network in one turn."""
    found: dict[str, list[Tensor]] = {"student": [], "teacher": [], "fake": []}
    handles = []
    for name, denoiser in (("student", method.student), ("teacher", context.teacher), ("fake", method.fake)):
        (network,) = networks_of([denoiser])
        hook = lambda _m, args, name=name: found[name].append(args[2].field("label"))  # noqa: E731
        handles.append(network.register_forward_pre_hook(hook))
    try:
        turn(drawn)
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize(("knobs", "rows"), [({}, (1, 1, 2)), ({"g": 4.5}, (1, 2, 3)), ({"g": 4.5, "guide_fake": False}, (1, 2, 2))])
def test_a_cycle_evaluates_what_the_paper_says_and_nothing_twice_without_guidance(knobs: dict, rows: tuple) -> None:
    method, context = made(**knobs)
    found = calls(method, context, method.both_turn, batch())
    assert tuple(sum(len(labels) for labels in found[name]) // SIZE for name in ("student", "teacher", "fake")) == rows


def test_conditions_are_dropped_for_a_whole_batch_of_the_fake_score_one_time_in_ten() -> None:
    method, context = made(guidance=2.0)
    dropped, n = 0, 400
    for count in range(n):
        found = calls(method, context, lambda drawn: method.fake_loss(drawn, *method.generate(drawn)), batch(count, size=4))
        (labels,) = found["fake"]
        gone = labels == MIXTURE.classes
        assert gone.all() or not gone.any()
        dropped += int(gone.all())
        assert not (found["student"][0] == MIXTURE.classes).any()
    assert abs(dropped - 0.1 * n) < 4 * math.sqrt(n * 0.1 * 0.9)


@pytest.mark.parametrize("knobs", [{"null_prob": 1.0}, {"null_prob": 1.0, "g": 3.0, "guide_fake": False}])
def test_a_fake_score_that_is_not_guided_is_never_without_conditions(knobs: dict[str, Any]) -> None:
    method, context = made(**knobs)
    found = calls(method, context, method.both_turn, batch())
    assert all((labels < MIXTURE.classes).all() for labels in found["fake"])


def test_both_scores_take_the_tracks_guidance_unless_told() -> None:
    scales = [(m.scale, m.fake_scale) for m, _ in (made(guidance=3.0), made(guidance=3.0, g=4.5), made(g=4.5, guide_fake=False), made())]
    assert scales == [(3.0, 3.0), (4.5, 4.5), (4.5, 1.0), (1.0, 1.0)]


def test_without_a_fake_score_the_student_descends_sds() -> None:
    method, context = made(fake="none", guidance=2.0)
    assert method.fake is None
    drawn, again = batch(), batch()
    x, conditions = method.generate(drawn)
    x = x.detach().requires_grad_()
    method.student_loss(drawn, x, conditions).backward()
    method.generate(again)
    t = 0.02 + 0.96 * again.rand(SIZE)
    eps = again.randn(SIZE, 2)
    said = context.teacher.eps(jump(Flow(), x.detach(), eps, t), t, conditions, guidance_scale=2.0)
    torch.testing.assert_close(x.grad, (t[:, None] ** 2 * (said - eps)).float() / x.numel(), rtol=1e-4, atol=1e-8)
    loop = trained(method, context, 3)
    assert (weights(method.student) - weights(context.teacher)).abs().max() > 1e-4
    assert loop.position.counts["student"] == loop.spent.updates == 3


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_a_sample_is_the_papers_x0_from_the_prediction_at_the_last_timestep(prediction: str) -> None:
    method, context = made(teacher=toy_teacher(STABLE_DIFFUSION, prediction))
    student, seeds = method.distilled(), list(range(6))
    conditions = MIXTURE.conditions(torch.arange(6))
    inputs: list[tuple] = []
    handle = student.denoiser.network.register_forward_pre_hook(lambda _, args: inputs.append(args))
    x = student.generate(conditions, steps=1, seeds=seeds).x
    handle.remove()
    ((z, t, _),) = inputs
    assert (t == 1).all()
    alpha, sigma = STABLE_DIFFUSION.alphas_cumprod[-1] ** 0.5, (1 - STABLE_DIFFUSION.alphas_cumprod[-1]) ** 0.5
    output = context.teacher.network(z, t, conditions).prediction
    torch.testing.assert_close(x, (z - sigma * output) / alpha if prediction == "eps" else output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "eps"])
def test_the_raw_output_may_be_the_sample(prediction: str, tmp_path: Path) -> None:
    method, context = made(teacher=toy_teacher(STABLE_DIFFUSION if prediction == "eps" else None, prediction), parameterisation="raw")
    z, conditions = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), MIXTURE.conditions(torch.arange(6))
    raw = context.teacher.network(z, torch.ones(6), conditions).prediction
    torch.testing.assert_close(method.student.x0(z, 1.0, conditions), raw)
    trained(method, context, 2)
    student = method.distilled()
    student.save(tmp_path)
    loaded = FewStepStudent.load(tmp_path)
    assert torch.equal(*(s.generate(conditions, steps=1, seeds=range(6)).x for s in (student, loaded)))


# ---------------------------------------------------------------- the fake score


def test_adapters_go_where_the_paper_puts_them_or_on_every_linear_layer() -> None:
    method, context = made(lora_rank=8, lora_alpha=13.5)
    assert method.fake.network.config.lora_targets == ()
    assert method.fake.network.first.scaling == pytest.approx(108 / 64)
    assert method.fake.network.first.down.shape[0] == 8
    chosen, _ = made(lora_targets=("hidden.1", "to_q"))
    assert {name.rsplit(".", 1)[0] for name, _ in chosen.fake.named_parameters()} == {"network.hidden.1"}
    full, _ = made(lora_rank=0)
    assert full.fake.network.config == context.teacher.network.config
    assert len(list(full.fake.parameters())) == len(list(context.teacher.parameters()))


def test_the_rank_is_at_most_the_width_and_the_scaling_stays() -> None:
    method, _ = made()
    assert method.fake.network.config.lora_rank == 16
    assert method.fake.network.first.scaling == pytest.approx(108 / 64)


@pytest.mark.parametrize("repeat", [2, 5])
def test_the_fake_score_may_be_updated_more_often(repeat: int) -> None:
    method, context = made(fake_per_student=repeat)
    counts = trained(method, context, 3).position.counts
    assert (counts["student"], counts["fake"]) == (3, 3 * repeat)
    assert (weights(method.student) - weights(context.teacher)).abs().max() > 1e-4


@pytest.mark.parametrize("weighting", ["alpha^2", "plain"])
def test_the_fake_score_learns_the_students_samples(weighting: str) -> None:
    method, context = made(fake_weighting=weighting, lr=0.0, fake_lr=1e-2)

    @torch.no_grad()
    def loss() -> float:
        return method.fake_turn(batch(0, size=4096))["fake score"].item()

    before = loss()
    trained(method, context, 60)
    assert loss() < 0.9 * before
    assert torch.equal(weights(method.student), weights(context.teacher))


# ---------------------------------------------------------------- the rest of the contract


def test_one_step_only() -> None:
    for steps in ((1, 2), (4,)):
        with pytest.raises(ContractError, match="one step"):
            made(steps=steps)


@pytest.mark.parametrize(
    "knobs",
    [{"t_min": 0.5, "t_max": 0.4}, {"betas": (0.9,)}, {"fake_per_student": 0}, {"fake": "lora"}, {"weighting": "sigma"}, {"null_prob": 2}],
)
def test_impossible_knobs_are_refused_in_one_line(knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)


def test_the_student_survives_its_folder_and_a_run_is_the_same_twice(tmp_path: Path) -> None:
    conditions, samples = MIXTURE.conditions(torch.arange(8)), []
    for seed in (0, 0, 1):
        method, context = made(seed=seed)
        trained(method, context, 3)
        samples.append(method.distilled().generate(conditions, steps=1, seeds=range(8)))
    method.distilled().save(tmp_path)
    loaded = FewStepStudent.load(tmp_path)
    assert loaded.steps == (1,)
    assert torch.equal(loaded.generate(conditions, steps=1, seeds=range(8)).x, samples[2].x)
    assert torch.equal(samples[0].x, samples[1].x)
    assert not torch.equal(samples[0].x, samples[2].x)
    assert samples[0].evaluations == 1


def test_the_average_that_is_scored_follows_the_student() -> None:
    for half_life, same in ((0.0, True), (700.0, False)):
        method, context = made(half_life=half_life)
        trained(method, context, 40)
        assert torch.equal(weights(method.average), weights(method.student)) == same


def test_it_trains_on_images_too() -> None:
    config = TransformerConfig(channels=1, size=8, patch=2, width=16, depth=2, heads=2, classes=8)
    context = Context(teacher=external(Denoiser(Transformer(config), Flow(), "velocity")), shape=(1, 8, 8), steps=(1,))
    method = SwiftBrush(SwiftBrush.Config(lora_targets=("qkv",)))
    method.build(context)
    loop = Loop(method, context, NoData(), Budget("toy", 3, "steps"), unit=1, batch_size=4)
    loop.train()
    assert {name.rsplit(".", 2)[-2] for name, _ in method.fake.named_parameters()} == {"qkv"}
    assert method.distilled().generate(MIXTURE.conditions(torch.arange(3)), steps=1, seeds=range(3)).x.shape == (3, 1, 8, 8)
