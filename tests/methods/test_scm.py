"""Continuous-time consistency on a toy: what the loss is made of, the warm-up, guidance, what moves, resume, and the student."""

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
from distillbench.diffusion import Denoiser, Flow, Trig, jump
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts.student import FewStepStudent
from distillbench.parts.trigflow import HALF_PI, consistency_terms, lognormal_angles
from distillbench.randomness import generator_for, sample_noise
from distillbench.training import state
from distillbench.training.loop import Loop
from distillbench_methods.scm import ContinuousConsistency as SCM

SOURCE = MixtureSource(standard_mixture())
SIZE = 32


class Stop(Exception):
    """What ends a training in the middle."""


def toy_teacher() -> Denoiser:
    return external(Denoiser(MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9)), Flow(), "velocity"))


def made(*, steps: tuple[int, ...] = (1, 2, 4), guidance: float = 1.0, **knobs: Any) -> tuple[SCM, Context]:
    context = Context(teacher=toy_teacher(), shape=(2,), steps=steps, seed=0, guidance=guidance)
    method = SCM(make_config(SCM.Config, "scm", {"lr": 1e-3, **knobs}))
    method.build(context)
    return method, context


def batch(progress: float = 1.0, size: int = SIZE) -> Batch:
    return Batch(size=size, count=0, progress=progress, source=SOURCE, generator=generator_for(0, "t", 0))


def trained(method: SCM, context: Context, cycles: int, **options: Any) -> Loop:
    loop = Loop(method, context, SOURCE, Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, **options)
    loop.train()
    return loop


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def shaken(method: SCM) -> SCM:
    """The student away from the teacher, so that no term is zero."""
    with torch.no_grad():
        for i, p in enumerate(method.student.parameters()):
            p.add_(0.03 * math.cos(i))
    return method


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find(Path(__import__("distillbench_methods.scm", fromlist=["x"]).__file__).as_posix()).info == SCM.info


def test_the_claims_name_knobs_that_exist_and_few_ablations() -> None:
    changed = set()
    for claim in SCM.info.claims:
        for side in (claim.better, claim.worse):
            settings = dict(item.split("=") for item in side.removeprefix("scm").strip("()").split(",") if "=" in item)
            make_config(SCM.Config, "scm", settings)
            assert settings or side in ("scm", "cd", "dmd2", "teacher")
            changed |= {side} if settings else set()
    assert len(changed) <= 5


def test_the_searched_knobs_exist_and_hold_their_ranges() -> None:
    for search in SCM.info.tunes:
        for value in (search.low, search.high):
            make_config(SCM.Config, "scm", {search.knob: value})


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    "knobs", [{}, {"tangent": "clip", "sigma_data": 0.5, "p_mean": -1.0}, {"adaptive_weight": False, "c": 1.0}], ids=str
)
def test_the_loss_is_that_of_the_equations_on_the_batchs_own_draws(knobs: dict[str, Any]) -> None:
    method = shaken(made(**knobs)[0])
    c = method.config
    losses = method.loss(batch(0.05))
    again = batch(0.05)
    x, conditions = again.data()
    t = lognormal_angles(again.randn(SIZE), c.p_mean, c.p_std, c.sigma_data)
    x_t = (t.cos()[:, None] * x + c.sigma_data * t.sin()[:, None] * again.randn(SIZE, 2)).float()
    expected = consistency_terms(method.flow, method.student, method.teacher, x_t, t, conditions, r=0.5, kind=c.tangent, c=c.c,
                                 weighted=c.adaptive_weight)  # fmt: skip
    assert set(losses) == set(expected) == {"consistency"} | ({"log variance"} if c.adaptive_weight else set())
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-7)


def test_a_student_that_is_the_teacher_learns_nothing_until_the_warm_up_begins() -> None:
    method, _ = made()
    first, later = (method.loss(batch(progress))["consistency"].item() for progress in (0.0, 0.1))
    assert first < 1e-12 < 1e-3 < later


def test_the_warm_up_is_a_share_of_the_training() -> None:
    method = shaken(made(warmup_r=0.2)[0])
    at = {p: method.loss(batch(p))["consistency"].item() for p in (0.0, 0.1, 0.2, 0.9)}
    assert at[0.2] == at[0.9] != at[0.1] != at[0.0]
    none = shaken(made(warmup_r=0.0)[0])
    assert none.loss(batch(0.0))["consistency"].item() == at[0.9]


def test_central_differences_give_the_same_loss() -> None:
    exact, differences = (shaken(made(jvp=name, tangent="none")[0]).loss(batch())["consistency"].item() for name in ("exact", "fd"))
    assert differences == pytest.approx(exact, rel=2e-3)
    assert differences != exact


def test_the_teacher_takes_no_gradient_and_the_student_does() -> None:
    method = shaken(made()[0])
    method.teacher.requires_grad_(True)  # even so
    sum(method.loss(batch()).values()).backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())


def test_a_step_along_the_gradient_lowers_the_derivative_along_the_flow() -> None:
    """The loss itself hardly moves; the tangent's length does."""
    method, context = made(lr=3e-3, adaptive_weight=False, warmup_r=0.0, tangent="none", decay="constant")
    before = method.loss(batch(size=512))["consistency"].item()
    trained(method, context, 150)
    assert method.loss(batch(size=512))["consistency"].item() < 0.7 * before


# ---------------------------------------------------------------- guidance


def test_the_scale_is_the_tracks_unless_named() -> None:
    track, named, plain = made(guidance=3.0)[0], made(scale=3.0)[0], made()[0]
    assert track.scale == named.scale == 3.0
    losses = [shaken(m).loss(batch())["consistency"].item() for m in (track, named, plain)]
    assert losses[0] == losses[1] != losses[2]


def test_an_embedded_scale_starts_as_a_no_op_is_learnt_and_is_asked_for_as_it_is() -> None:
    method, context = made_embedded()
    x, conditions = SOURCE.draw(SIZE, generator_for(0, "x", 0))
    told, untold = (method.student.x0(x, 0.5, conditions, guidance=value) for value in (2.0, None))
    torch.testing.assert_close(told, untold, rtol=0, atol=0)
    trained(method, context, 30)
    student = method.distilled()
    default, same, other = (student.generate(conditions, steps=2, seeds=range(SIZE), guidance=s).x for s in (None, 1.5, 2.0))
    assert torch.equal(default, same)
    assert not torch.allclose(default, other)


def made_embedded(**knobs: Any) -> tuple[SCM, Context]:
    context = Context(teacher=toy_teacher(), shape=(2,), steps=(1, 2, 4), seed=0, guidance=1.5)
    method = SCM(make_config(SCM.Config, "scm", {"lr": 1e-3, "guidance": "embedded", **knobs}))
    method.build(context)
    return method, context


def test_scales_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="outside scale_range"):
        made_embedded(scale=4.0)
    monkeypatch.setattr(MLP, "capabilities", frozenset({"jvp", "log variance"}))
    with pytest.raises(ContractError, match="takes the guidance scale"):
        made_embedded()


# ---------------------------------------------------------------- training


def test_a_short_training_moves_the_student_and_its_average_and_nothing_else() -> None:
    method, context = made()
    start, teacher = weights(method.student), weights(method.teacher)
    loop = trained(method, context, 20)
    assert loop.spent.updates == 20
    for module in (method.student, method.average):
        assert not torch.equal(weights(module), start)
    assert torch.equal(weights(method.teacher), teacher)
    assert not any(name.startswith("teacher") for name in state.tensors_of(method))
    assert torch.equal(weights(method.distilled().denoiser), weights(method.average))


@pytest.mark.parametrize(
    "knobs",
    [
        {"tangent": "clip", "optimizer": "radam", "decay": "constant"},
        {"tangent": "none", "adaptive_weight": False, "warmup_r": 0.0},
        {"jvp": "fd", "sigma_data": 0.5, "p_mean": -1.0, "optimizer": "adamw", "weight_decay": 0.01},
        {"half_life": 0, "clip": None, "batch_size": 16, "grid": "1.5,0.9"},
    ],
    ids=str,
)
def test_every_variant_trains_and_samples(knobs: dict[str, Any]) -> None:
    method, context = made(guidance=2.0, **knobs)
    before = weights(method.student)
    trained(method, context, 5)
    assert not torch.equal(weights(method.student), before)
    conditions = SOURCE.conditions(3, generator_for(0, "x", 0))
    for steps in (1, 2, 4):
        samples = method.distilled().generate(conditions, steps=steps, seeds=[0, 1, 2])
        assert samples.evaluations == steps
        assert bool(samples.x.isfinite().all())


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, context = made()
    expected = trained(whole, context, 12)

    def stop_at_five(progress: Any) -> None:
        if progress.spent.cycles == 5:
            raise Stop

    first, context = made()
    with pytest.raises(Stop):
        trained(first, context, 12, folder=tmp_path, checkpoint_seconds=0, report=stop_at_five)
    second, context = made()
    resumed = trained(second, context, 12, folder=tmp_path)
    assert resumed.spent.macs == expected.spent.macs
    for name in ("student", "average"):
        assert torch.equal(weights(getattr(second, name)), weights(getattr(whole, name)))


# ---------------------------------------------------------------- the student


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_sampling_is_the_papers_alternation_in_its_own_units(sigma_data: float) -> None:
    """f at pi/2, fresh noise at t_mid, f again: by hand with x_t = cos t x0 + sin t sigma_data eps."""
    method = shaken(made(sigma_data=sigma_data, t_mid=1.0, half_life=0)[0])
    conditions = SOURCE.conditions(6, generator_for(0, "x", 0))
    start, fresh = (sigma_data * sample_noise(range(6), (2,), draw) for draw in (0, 1))
    flow, f = method.flow, method.average
    with torch.no_grad():
        x0 = flow.clean(f, start, HALF_PI, conditions)
        expected = flow.clean(f, math.cos(1.0) * x0 + math.sin(1.0) * fresh, 1.0, conditions)
    student = method.distilled()
    assert student.denoiser.path == Trig()
    torch.testing.assert_close(student.generate(conditions, steps=1, seeds=range(6)).x, x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.generate(conditions, steps=2, seeds=range(6)).x, expected, rtol=1e-5, atol=1e-5)


def test_the_student_starts_as_the_teacher() -> None:
    method, _ = made(sigma_data=0.5)
    x, conditions = SOURCE.draw(SIZE, generator_for(0, "x", 0))
    x_t = jump(Flow(), x, torch.ones_like(x), 0.6)
    of_teacher = toy_teacher().x0(x_t, 0.6, conditions)
    torch.testing.assert_close(method.student.on(Flow()).x0(x_t, 0.6, conditions), of_teacher, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("embedded", [False, True])
def test_the_student_survives_its_folder_bit_for_bit(tmp_path: Path, embedded: bool) -> None:
    method, context = made_embedded() if embedded else made(sigma_data=0.5)
    trained(method, context, 3)
    student = method.distilled()
    student.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = FewStepStudent.load(tmp_path)
    conditions = SOURCE.conditions(6, generator_for(0, "x", 0))
    assert (loaded.steps, loaded.grids, loaded.guidance_input) == ((1, 2, 4), student.grids, 1.5 if embedded else None)
    for steps in (1, 2, 4):
        assert torch.equal(*(each.generate(conditions, steps=steps, seeds=range(6)).x for each in (student, loaded)))


def test_a_student_refuses_steps_it_has_not() -> None:
    with pytest.raises(UsageError, match="trained for 1, 2, 4 steps, not 3"):
        made()[0].distilled().generate(Conditions.none(1), steps=3, seeds=[0])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tangent": "rms"}, "unknown value of knob tangent"),
        ({"betas": "0.9"}, "betas are two numbers"),
        ({"scale_range": "2,1"}, "two rising numbers"),
        ({"grid": "0.5,1.0"}, "fall strictly"),
        ({"grid": "1.7,1.0"}, "fall strictly"),
        ({"sigma_data": 0}, "it goes from 0.001"),
        ({"jvp": "autograd"}, "unknown value of knob jvp"),
    ],
    ids=str,
)
def test_wrong_knobs_are_refused_in_one_line(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)
