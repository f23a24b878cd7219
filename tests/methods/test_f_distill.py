"""f-distill on a toy: where it is DMD2 and where not, how the weights reach the gradient, and the state of its bins."""

from __future__ import annotations

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
from distillbench.diffusion import Denoiser, broadcast
from distillbench.diffusion.schedules import Flow, VPCosine
from distillbench.diffusion.solvers import jump
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.networks.transformer import Transformer, TransformerConfig
from distillbench.parts.distribution_matching import matching_gradient
from distillbench.parts.divergences import DIVERGENCES
from distillbench.parts.student import FewStepStudent
from distillbench.randomness import generator_for
from distillbench.training.loop import Loop
from distillbench_methods.dmd2 import DMD2
from distillbench_methods.f_distill import FDistill

MIXTURE = standard_mixture()
SIZE = 16


def made(steps: int = 1, *, kind: type[DMD2] = FDistill, seed: int = 0, guidance: float = 1.0, schedule: Any = None,
         track_batch: int = 256, **knobs: Any) -> tuple[Any, Context]:  # fmt: skip
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    teacher = external(Denoiser(network, schedule or Flow(), "velocity" if schedule is None else "eps"))
    context = Context(teacher=teacher, shape=(2,), steps=(steps,), seed=seed, guidance=guidance, batch_size=track_batch)
    method = kind(make_config(kind.Config, kind.info.id, {"lr": 1e-3, **knobs}))
    method.build(context)
    return method, context


def batch(count: int = 0, size: int = SIZE) -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=MixtureSource(MIXTURE), generator=generator_for(0, "t", count))


def trained(method: DMD2, context: Context, cycles: int, folder: Path | None = None) -> Loop:
    loop = Loop(method, context, MixtureSource(MIXTURE), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, folder=folder,
                checkpoint_seconds=0.0)  # fmt: skip
    loop.train()
    return loop


def only(method: Any, *moving: nn.Module) -> None:
    """What the loop does before a turn."""
    for module in (method.student, method.average, method.guide, method.bins):
        module.requires_grad_(False)
    for module in moving:
        module.requires_grad_(True)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def asked(network: nn.Module) -> list[tuple]:
    """A list that grows with each call of a network."""
    calls: list[tuple] = []
    network.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


def test_the_card_is_read_from_the_source_alone_and_its_claims_name_knobs_that_exist() -> None:
    info = find(Path(__import__("distillbench_methods.f_distill", fromlist=["x"]).__file__).as_posix()).info
    assert info == FDistill.info
    assert info.per_step
    for claim in info.claims:
        for side in (claim.better, claim.worse):
            name, _, knobs = side.partition("(")
            assert name in ("f_distill", "dmd2", "teacher")
            make_config(FDistill.Config, "f_distill", dict(pair.split("=") for pair in knobs.rstrip(")").split(",") if pair))
    for search in info.tunes:
        for choice in search.choices or (search.low, search.high):
            make_config(FDistill.Config, "f_distill", {search.knob: choice})


# ---------------------------------------------------------------- where it is DMD2

AS_DMD2 = {"divergence": "rkl", "noise": "separate", "gan_features": "fake", "head_lr": None, "ratio_clamp": (0.1, 20.0)}
FIELDS = ("t_min", "t_max", "fake_per_gen", "lambda_gan", "lambda_dis", "warmup", "half_life")


@pytest.mark.parametrize(("steps", "knobs"), [(1, {}), (2, {"gan_features": "teacher"}), (1, {"gan_start": 0.5}), (1, {"gan": False})])
def test_reverse_kl_in_dmd2s_plan_is_dmd2(steps: int, knobs: dict[str, Any]) -> None:
    defaults = DMD2.Config()
    theirs, context = made(steps, kind=DMD2, guidance=1.5, **knobs)
    mine, same = made(steps, guidance=1.5, **{**AS_DMD2, **{name: getattr(defaults, name) for name in FIELDS}, **knobs})
    loops = trained(theirs, context, 6), trained(mine, same, 6)
    assert loops[0].position.counts == loops[1].position.counts
    for a, b in zip(*(loop.position.losses for loop in loops), strict=True):
        for name in a.keys() - {"passes", "turn"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5)
    start = weights(context.teacher)
    for name in ("student", "average", "fake"):
        ours, paper = weights(getattr(mine, name)), weights(getattr(theirs, name))
        assert (paper - start).abs().max() > 1e-3
        torch.testing.assert_close(ours, paper, rtol=1e-5, atol=1e-6)
    if theirs.config.gan:
        torch.testing.assert_close(weights(mine.heads), weights(theirs.head), rtol=1e-5, atol=1e-6)


def test_another_divergence_is_not() -> None:
    students = []
    for divergence in ("rkl", "kl"):
        method, context = made(**{**AS_DMD2, "divergence": divergence})
        trained(method, context, 4)
        students.append(weights(method.student))
    assert (students[0] - students[1]).abs().max() > 1e-4


# ---------------------------------------------------------------- the generator's turn


def seen(method: Any, drawn: Batch) -> dict[str, Any]:
    """What the generator's turn draws, drawn once more: the noised samples of its scores, and what all sees in them."""
    c = method.config
    x, conditions = method.generate(drawn)
    u = c.t_min + (c.t_max - c.t_min) * drawn.rand(SIZE)
    x_t = jump(Flow(), x, drawn.randn(SIZE, 2), u)
    teacher = method.teacher.predict(x_t, u, conditions, guidance_scale=method.scale, taps=(method.tap,))
    return {"x": x, "t": u, "x_t": x_t, "conditions": conditions, "teacher": teacher, "fake": method.fake.x0(x_t, u, conditions)}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_samples_gradient_is_dmd2s_times_its_weight(name: str, guidance: float) -> None:
    method, context = made(divergence=name, lambda_gan=0.0, bins=0, guidance=guidance)
    trained(method, context, 2)  # so that fake and teacher differ
    only(method)
    found = seen(method, batch())
    x = found["x"].detach().requires_grad_()
    method.generate = lambda drawn: (type(method).generate(method, drawn), (x, found["conditions"]))[1]
    method.generator_loss(True, batch())["matching"].backward()

    logits = method.heads[0](found["teacher"].features[method.tap])
    ratio = logits.double().exp().clamp(0.1, 20)
    h = torch.ones_like(ratio) if name == "rkl" else DIVERGENCES[name].h(ratio) / DIVERGENCES[name].h(ratio).mean()
    plain = matching_gradient(x.detach(), found["teacher"].x0, found["fake"], Flow(), found["t"])
    assert name == "rkl" or h.std() > 1e-3
    torch.testing.assert_close(x.grad * x.numel(), broadcast(h, x) * plain, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("trunk", "share"), [("teacher", "shared"), ("fake", "shared"), ("teacher", "separate"), ("fake", "separate")])
def test_one_pass_of_each_network_gives_scores_ratio_and_gan(trunk: str, share: str) -> None:
    method, _ = made(gan_features=trunk, noise=share)
    teacher, fake = asked(method.teacher.network), asked(method.fake.network)
    only(method, method.student)
    losses = method.generator_loss(True, batch())
    extra = share == "separate"
    assert (len(teacher), len(fake)) == (1 + (extra and trunk == "teacher"), 1 + (extra and trunk == "fake"))
    losses["gan"].backward()
    assert max(p.grad.abs().max().item() for p in method.student.parameters() if p.grad is not None) > 1e-8
    assert all(p.grad is None for p in [*method.guide.parameters(), *method.teacher.parameters()])


def test_the_scores_and_the_ratio_carry_no_gradient() -> None:
    method, _ = made()
    only(method, method.student, method.guide)  # even if all were left trainable
    found = seen(method, batch())
    losses = method.generator_loss(True, batch())
    losses["matching"].backward()
    assert all(p.grad is None for p in method.guide.parameters())
    # The samples alone carry it: with a fake score equal to the teacher there is none, whatever the ratio.
    assert torch.equal(found["fake"], found["teacher"].x0)
    assert all((p.grad == 0).all() for p in method.student.parameters() if p.grad is not None)


def test_shared_noise_shows_the_critic_what_the_scores_see_and_separate_noise_does_not() -> None:
    for share, same in (("shared", True), ("separate", False)):
        method, _ = made(gan_features="fake", noise=share, divergence="rkl")
        teacher, head = asked(method.teacher.network), asked(method.heads[0])
        only(method, method.student)
        method.generator_loss(True, batch())
        ((x_t, t, conditions),) = teacher
        features = method.fake.network(x_t, t, conditions, taps=(method.tap,)).features[method.tap]
        assert torch.allclose(head[0][0], features) == same


def test_reverse_kl_and_a_weight_of_zero_ask_the_critic_nothing() -> None:
    method, _ = made(divergence="rkl", lambda_gan=0.0)
    heads = asked(method.heads[0])
    assert set(method.generator_loss(True, batch())) == {"matching"}
    assert not heads
    method, _ = made(lambda_gan=0.0)
    heads = asked(method.heads[0])
    assert set(method.generator_loss(True, batch())) == {"matching"}
    assert len(heads) == 1  # for the ratio


# ---------------------------------------------------------------- the guidance turn


def test_score_and_critic_are_trained_on_the_same_noised_samples_and_the_trunk_is_not() -> None:
    method, _ = made()
    only(method, method.guide)
    fake, teacher = asked(method.fake.network), asked(method.teacher.network)
    losses = method.guidance_loss(True, batch())
    assert torch.equal(fake[0][0], teacher[0][0])
    assert torch.equal(fake[0][1], teacher[0][1])
    assert not torch.equal(teacher[0][1], teacher[1][1])  # real examples at their own levels
    losses["discriminator"].backward()
    assert all(p.grad is None for p in method.fake.parameters())
    assert all(p.grad is not None for p in method.heads.parameters())


def test_heads_have_an_optimiser_of_their_own() -> None:
    method, context = made(head_lr=0.0, fake_lr=2e-3, gan_start=0.5, gan_rate=0.25)
    first, second = method.stages()
    assert set(first.turns[1].updates) == {"guide"}
    assert {name: o.lr for name, o in second.turns[1].optimizer.items()} == {"fake": 5e-4, "heads": 0.0}
    before = weights(method.heads)
    trained(method, context, 4)
    assert torch.equal(weights(method.heads), before)
    assert (weights(method.fake) - weights(context.teacher)).abs().max() > 1e-4


def test_a_critic_of_zeros_pays_no_penalty_and_one_that_is_steep_does() -> None:
    method, _ = made(r1=100.0)
    only(method, method.guide)
    steep = method.guidance_loss(True, batch())["r1"].item()
    for parameter in method.heads.parameters():
        nn.init.zeros_(parameter)
    losses = method.guidance_loss(True, batch())
    assert steep > 1e-3
    assert losses["r1"].item() == 0
    assert losses["discriminator"].item() == pytest.approx(2 * math.log(2), rel=1e-6)
    plain, _ = made()
    assert set(plain.guidance_loss(True, batch())) == {"fake score", "discriminator"}


def test_the_penalty_approaches_the_gradients_square_times_the_perturbations() -> None:
    method, _ = made(r1=1.0, r1_std=1e-3)
    n = 256
    value = method.guidance_loss(True, batch(size=n))["r1"].item()
    again = batch(size=n)
    method.generate(again)
    again.rand(n), again.randn(n, 2)
    example, conditions = again.data()
    t = method.level(again)[1]
    real_t = jump(Flow(), example, again.randn(n, 2), t).requires_grad_()
    (slope,) = torch.autograd.grad(method.judge(real_t, t, conditions).sum(), real_t)
    along = (slope * again.randn(n, 2)).sum(1)  # of the gradient, along the perturbation
    assert value == pytest.approx(1e-6 * along.square().mean().item(), rel=1e-2)


def test_several_heads_at_several_depths() -> None:
    method, context = made(heads=3)
    assert method.taps == ("hidden1", "hidden2", "hidden3")
    logits = method.judge(torch.randn(5, 2), torch.full((5,), 0.5), MIXTURE.conditions(torch.arange(5)))
    assert logits.shape == (5, 3)
    trained(method, context, 2)
    one, _ = made(tap="hidden1")
    assert one.taps == ("hidden1",)
    more, _ = made(heads=9)
    assert len(more.taps) == 3  # no more than there are taps


# ---------------------------------------------------------------- the rest of the contract


@pytest.mark.parametrize(
    "knobs",
    [{"gan": False}, {"ratio_clamp": (2.0, 1.0)}, {"ratio_clamp": (1.0,)}, {"noise": "separate", "r1": 1.0}, {"divergence": "renyi"},
     {"t_min": 0.5, "t_max": 0.4}, {"rho": 1.0}, {"bins": -1}],
)  # fmt: skip
def test_impossible_knobs_are_refused_in_one_line(knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)


def test_one_step_count_a_training_under_its_own_name() -> None:
    method, context = made()
    context.steps = (1, 2, 4)
    with pytest.raises(ContractError, match="f_distill trains one student"):
        method.build(context)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("schedule", [None, VPCosine()])
def test_the_student_survives_its_folder(steps: int, schedule: Any, tmp_path: Path) -> None:
    method, context = made(steps, schedule=schedule, guidance=2.0, half_life=0.0)
    counts = trained(method, context, 2).position.counts
    assert counts["guidance"] == 4 * counts["generator"] == 8
    student = method.distilled()
    conditions, seeds = MIXTURE.conditions(torch.arange(8)), list(range(8))
    before = student.generate(conditions, steps=steps, seeds=seeds)
    student.save(tmp_path)
    after = FewStepStudent.load(tmp_path).generate(conditions, steps=steps, seeds=seeds)
    assert torch.equal(before.x, after.x)
    assert (before.evaluations, student.steps) == (steps, (steps,))


def test_a_study_may_start_from_another_student() -> None:
    class Shifted(FDistill):
        def build(self, context: Context) -> None:
            super().build(context)
            for network in (self.student.network, self.average.network):
                nn.init.constant_(network.last.bias, 3.0)

    method, context = made(kind=Shifted)
    trained(method, context, 1)
    assert (method.student.network.last.bias - 3).abs().max() < 0.1


def test_on_maps_it_trains_with_heads_at_two_depths() -> None:
    config = TransformerConfig(channels=1, size=8, patch=2, width=16, depth=2, heads=2, classes=8)

    class Images(MixtureSource):
        def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
            return torch.randn(n, 1, 8, 8, generator=generator), self.conditions(n, generator)

    teacher = external(Denoiser(Transformer(config, torch.Generator().manual_seed(0)), Flow(), "velocity"))
    method = FDistill(FDistill.Config(heads=2, rho=0.9))
    context = Context(teacher=teacher, shape=(1, 8, 8), steps=(1,), guidance=2.0)
    method.build(context)
    loop = Loop(method, context, Images(MIXTURE), Budget("toy", 2, "steps"), unit=1, batch_size=4)
    loop.train()
    assert loop.position.counts["guidance"] == 8
    assert {"ratio history", "matching", "gan"} < loop.position.losses[0].keys()
