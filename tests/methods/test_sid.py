"""SiD on a toy: what differs from diff_instruct, whose turns and student it shares: loss, graph, laws of levels, guidance, knobs."""

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
from distillbench.diffusion import Denoiser, broadcast, jump
from distillbench.diffusion.schedules import Flow
from distillbench.discovery import find
from distillbench.errors import NonFiniteError, UsageError
from distillbench.networks import MLP, MLPConfig, Transformer, TransformerConfig
from distillbench.parts.noise_levels import karras_level
from distillbench.randomness import generator_for
from distillbench.training.loop import Loop
from distillbench_methods.diff_instruct import DiffInstruct
from distillbench_methods.sid import SiD

MIXTURE = standard_mixture()
SIZE = 16


class NoData:
    """Conditions, but no example may be drawn."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise AssertionError("data was drawn")

    conditions = MixtureSource(MIXTURE).conditions


def toy_teacher(prediction: str = "velocity", seed: int = 9, schedule: Any = None) -> Denoiser:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(seed))
    return external(Denoiser(network, schedule or Flow(), prediction))


def made(*, tracks: float = 1.0, teacher: Denoiser | None = None, steps: tuple[int, ...] = (1,), kind: type[DiffInstruct] = SiD,
         **knobs: Any) -> tuple[Any, Context]:  # fmt: skip
    context = Context(teacher=teacher or toy_teacher(), shape=(2,), steps=steps, guidance=tracks)
    method = kind(make_config(kind.Config, kind.info.id, {"decay": "constant", **knobs}))
    method.build(context)
    return method, context


def batch(count: int = 0, size: int = SIZE, name: str = "t") -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=NoData(), generator=generator_for(0, name, count))


def trained(method: SiD, context: Context, cycles: int) -> Loop:
    loop = Loop(method, context, NoData(), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE)
    loop.train()
    return loop


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def stirred(method: SiD) -> SiD:
    """The fake score away from the teacher's."""
    with torch.no_grad():
        for i, p in enumerate(method.fake.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return method


def rows(denoiser: Denoiser, act: Any) -> list[Tensor]:
    """The labels of each call of a network."""
    found: list[Tensor] = []
    handle = denoiser.network.register_forward_pre_hook(lambda _, args: found.append(args[2].field("label")))
    try:
        act()
    finally:
        handle.remove()
    return found


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find("sid").info == SiD.info


def test_the_claims_name_knobs_that_exist_and_ask_for_few_trainings() -> None:
    settings = set()
    for side in {side for claim in SiD.info.claims for side in (claim.better, claim.worse)}:
        name, _, knobs = side.partition("(")
        assert name in ("sid", "diff_instruct", "teacher")
        make_config(SiD.Config, name, dict(pair.split("=") for pair in knobs.rstrip(")").split(",") if pair))
        settings |= {knobs} - {""}
    assert settings == {"alpha=0.0)", "alpha=-0.5)", "alpha=1.5)", "estimator=naive)"}


# ---------------------------------------------------------------- turns


def test_a_cycle_is_the_fake_score_then_the_student_through_both_scores() -> None:
    """By hand: the loss as the paper writes it, two optimisers, one draw of noise for each turn."""
    method, context = made(alpha=1.2)
    hand = copy.copy(stirred(method))
    hand.student, hand.fake = student, fake = copy.deepcopy(method.student), copy.deepcopy(method.fake)
    trained(method, context, 2)
    adam = [torch.optim.Adam(m.parameters(), lr=lr, betas=(0.0, 0.999)) for m, lr in ((fake, 1e-3), (student, 3e-4))]
    for count in range(2):
        drawn = batch(count, name="turn/fake score")
        with torch.no_grad():
            x, conditions = hand.generate(drawn)
        t, noise = hand.times("both", drawn), drawn.randn(SIZE, 2)
        adam[0].zero_grad()
        velocity = fake.velocity(jump(Flow(), x, noise, t), t, conditions)
        (velocity - (noise - x)).square().mean().backward()
        adam[0].step()
        drawn = batch(count, name="turn/student")
        x, conditions = hand.generate(drawn)
        t, noise = hand.times("karras", drawn), drawn.randn(SIZE, 2)
        x_t = jump(Flow(), x, noise, t)
        f_phi, f_psi = context.teacher.x0(x_t, t, conditions), fake.x0(x_t, t, conditions)
        omega = (x - f_phi).abs().mean(1, keepdim=True).clamp_min(1e-5).detach()
        adam[1].zero_grad()
        (100 / SIZE * ((f_phi - f_psi) * ((f_phi - x) - 1.2 * (f_phi - f_psi)) / omega).sum()).backward()
        adam[1].step()
    torch.testing.assert_close(weights(method.fake), weights(fake), rtol=0, atol=2e-5)
    torch.testing.assert_close(weights(method.student), weights(student), rtol=0, atol=2e-5)
    assert (weights(student) - weights(context.teacher)).abs().max() > 3e-4


@pytest.mark.parametrize("knobs", [{}, {"estimator": "naive"}, {"alpha": 0.0}])
def test_the_students_loss_moves_the_student_alone(knobs: dict[str, Any]) -> None:
    method, context = made(tracks=2.0, **knobs)
    stirred(method).fake.requires_grad_(False)
    method.student_turn(batch())["matching"].backward()
    assert max(p.grad.abs().max() for p in method.student.parameters()) > 0
    assert all(p.grad is None for d in (method.fake, context.teacher) for p in d.parameters())


def test_each_score_is_evaluated_once_a_sample() -> None:
    method, context = made()
    for denoiser in (context.teacher, method.fake):
        assert [len(labels) for labels in rows(denoiser, lambda: method.student_turn(batch()))] == [SIZE]


def test_the_first_gradient_is_zero_because_the_fake_score_starts_as_the_teacher() -> None:
    def largest(method: SiD) -> float:
        method.student_turn(batch())["matching"].backward()
        return max(p.grad.abs().max().item() for p in method.student.parameters())

    assert largest(made()[0]) < 1e-5 * largest(stirred(made()[0]))


def test_it_shares_diff_instructs_samples_and_noise() -> None:
    """On the same seed the two differ in the student's loss alone."""
    pair = [made(kind=kind, law="karras", fake_law="both", level_cut=0.8)[0] for kind in (SiD, DiffInstruct)]
    assert pair[0].fake_turn(batch())["fake score"].item() == pair[1].fake_turn(batch())["fake score"].item()
    assert [turn.name for turn in pair[0].stages()[0].turns] == [turn.name for turn in pair[1].stages()[0].turns]
    assert pair[0].grid == pair[1].grid


def test_levels_are_the_papers_for_the_student_and_half_of_them_for_the_fake_score() -> None:
    method, _ = made()
    t = method.times(method.config.law, batch(size=5000))
    level = t / (1 - t) / 2
    assert level.max().item() == pytest.approx(24.408, rel=0.01)
    assert level.median().item() == pytest.approx(karras_level(torch.tensor(0.4)).item(), rel=0.1)
    assert (method.config.fake_law, SiD.Config(fake_law="lognormal").fake_law) == ("both", "lognormal")


def test_lsg_only_scales() -> None:
    losses = [stirred(made(lsg=lsg)[0]).student_turn(batch())["matching"].item() for lsg in (1.0, 100.0)]
    assert losses[1] == pytest.approx(100 * losses[0], rel=1e-5)


# ---------------------------------------------------------------- long and short guidance


@pytest.mark.parametrize(
    ("knobs", "scales"),
    [({}, (2.0, 2.0, 2.0)), ({"guide_fake": False}, (1.0, 1.0, 2.0)), ({"kappa1": 1.0}, (1.0, 2.0, 2.0)),
     ({"guidance": 4.5}, (4.5, 4.5, 4.5)), ({"guidance": 4.5, "kappa1": 1.5, "kappa2": 3.0}, (1.5, 3.0, 4.5)),
     ({"guide_fake": False, "kappa2": 2.5}, (1.0, 2.5, 2.0))],
)  # fmt: skip
def test_long_and_short_is_one_scale_everywhere_unless_told(knobs: dict[str, Any], scales: tuple[float, ...]) -> None:
    method, context = made(tracks=2.0, **knobs)
    assert (method.train_scale, method.fake_scale, method.scale) == scales
    doubled = [
        sum(map(len, rows(method.fake, lambda: method.fake_turn(batch())))) // SIZE,
        sum(map(len, rows(method.fake, lambda: method.student_turn(batch())))) // SIZE,
        sum(map(len, rows(context.teacher, lambda: method.student_turn(batch())))) // SIZE,
    ]
    assert doubled == [2 if scale != 1 else 1 for scale in scales]


@pytest.mark.parametrize("prediction", ["velocity", "eps"])
def test_under_kappa1_the_guided_prediction_denoises(prediction: str) -> None:
    method, _ = made(tracks=3.0, null_prob=0.0, teacher=toy_teacher(prediction))
    stirred(method)
    drawn = batch()
    x, conditions = method.generate(drawn)
    x, t, noise = x.detach(), method.times("both", drawn), drawn.randn(SIZE, 2)
    x_t = jump(Flow(), x, noise, t)
    said = [method.fake.predict(x_t, t, c) for c in (conditions, conditions.null())]
    read, target = (lambda p: p.velocity, noise - x) if prediction == "velocity" else (lambda p: p.eps, noise)
    guided = read(said[1]) + 3.0 * (read(said[0]) - read(said[1]))
    assert method.fake_turn(batch())["fake score"].item() == pytest.approx((guided - target).square().mean().item(), rel=1e-4)


def test_conditions_are_dropped_for_a_share_of_the_samples_if_any_fake_score_is_guided() -> None:
    for knobs, share in (
        ({}, 0.1),
        ({"kappa1": 1.0}, 0.1),
        ({"kappa2": 1.0}, 0.1),
        ({"guide_fake": False}, 0.0),
        ({"null_prob": 1.0}, 1.0),
    ):
        method, _ = made(tracks=2.0, **knobs)
        (labels,) = rows(method.fake, lambda method=method: method.fake_turn(batch(size=4000)))
        assert (labels[:4000] == MIXTURE.classes).double().mean().item() == pytest.approx(share, abs=0.02)
        assert (rows(method.student, lambda method=method: method.fake_turn(batch()))[0] < MIXTURE.classes).all()


# ---------------------------------------------------------------- the rest of the contract


@pytest.mark.parametrize(
    "knobs", [{"fake": "none"}, {"weighting": "sigma"}, {"estimator": "l1"}, {"alpha": 11}, {"norm_floor": 0.0}, {"betas": (0.9,)}]
)
def test_impossible_knobs_are_refused_in_one_line(knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)


def test_one_step_only() -> None:
    with pytest.raises(ContractError, match="sid trains a student of one step"):
        made(steps=(1, 2))


def test_a_training_that_runs_away_ends_in_one_clear_line() -> None:
    method, context = made(alpha=1.5, lr=1e20)
    with pytest.raises(NonFiniteError, match=r"of turn '(student|fake score)' is (nan|inf|-inf)") as caught:
        trained(stirred(method), context, 20)
    assert "\n" not in str(caught.value)


def test_two_runs_are_the_same_and_the_samples_are_the_averages() -> None:
    conditions, samples = MIXTURE.conditions(torch.arange(8)), []
    for _ in range(2):
        method, context = made()
        trained(method, context, 3)
        samples.append(method.distilled().generate(conditions, steps=1, seeds=range(8)))
    assert torch.equal(samples[0].x, samples[1].x)
    assert samples[0].evaluations == 1
    assert method.distilled().denoiser is method.average


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_trains_on_images_too(guidance: float) -> None:
    config = TransformerConfig(channels=1, size=8, patch=2, width=16, depth=2, heads=2, classes=8)
    context = Context(teacher=external(Denoiser(Transformer(config), Flow(), "velocity")), shape=(1, 8, 8), steps=(1,), guidance=guidance)
    method = SiD()
    method.build(context)
    Loop(method, context, NoData(), Budget("toy", 3, "steps"), unit=1, batch_size=4).train()
    x, conditions = method.generate(batch(size=3))
    t, noise = torch.full((3,), 0.5, dtype=torch.float64), torch.randn(3, 1, 8, 8, generator=generator_for(0, "noise", 0))
    x_t = jump(Flow(), x, noise, t)
    real = context.teacher.x0(x_t, t, conditions, guidance_scale=guidance)
    fake = method.fake.x0(x_t, t, conditions, guidance_scale=guidance)
    omega = broadcast((x - real).abs().mean((1, 2, 3)), x)
    by_hand = 100 / 3 * ((real - fake) * (fake - x) / omega).sum().item()
    assert math.isfinite(by_hand)
    assert method.student_loss(x, t, noise, conditions).item() == pytest.approx(by_hand, rel=1e-3)
    assert method.distilled().generate(MIXTURE.conditions(torch.arange(3)), steps=1, seeds=range(3)).x.shape == (3, 1, 8, 8)


def test_the_file_names_no_other_method_than_the_one_it_extends() -> None:
    source = Path(__import__("distillbench_methods.sid", fromlist=["x"]).__file__).read_text()
    assert [line for line in source.splitlines() if line.startswith("from .")] == ["from .diff_instruct import DiffInstruct"]
