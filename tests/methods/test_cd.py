"""Consistency distillation on a toy: the loss against closed forms, what moves, resume, guidance, and the student in its folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Batch, Conditions, Context, ContractError, external, is_external
from distillbench.budget import Budget
from distillbench.config import make_config
from distillbench.data.mixture import MixtureSource, standard_mixture
from distillbench.diffusion import Denoiser, ddim, jump
from distillbench.diffusion.schedules import Flow
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts.consistency import ConsistencyFunction, ConsistencyStudent, distance
from distillbench.randomness import generator_for
from distillbench.training import state
from distillbench.training.loop import Loop
from distillbench_methods.cd import ConsistencyDistillation as CD

SOURCE = MixtureSource(standard_mixture())
SIZE = 32
POINT = torch.tensor([0.3, -1.2])


class Stop(Exception):
    """What ends a training in the middle."""


class OnePoint:
    """Data that are one point."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        return POINT.expand(n, 2), Conditions.none(n)

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return Conditions.none(n)


def toy_teacher() -> Denoiser:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    return external(Denoiser(network, Flow(), "velocity"))


def made(*, steps: tuple[int, ...] = (1, 2, 4), seed: int = 0, guidance: float = 1.0, teacher: Denoiser | None = None,
         **knobs: Any) -> tuple[CD, Context]:  # fmt: skip
    context = Context(teacher=teacher or toy_teacher(), shape=(2,), steps=steps, seed=seed, guidance=guidance)
    method = CD(make_config(CD.Config, "cd", {"lr": 1e-3, "points": 12, **knobs}))
    method.build(context)
    return method, context


def batch(source: Any = None, count: int = 0, size: int = SIZE) -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=source or SOURCE, generator=generator_for(0, "t", count))


def trained(method: CD, context: Context, cycles: int, **options: Any) -> Loop:
    loop = Loop(method, context, SOURCE, Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, **options)
    loop.train()
    return loop


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def total(losses: dict[str, Tensor]) -> float:
    return sum(losses.values()).item()


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find(Path(__import__("distillbench_methods.cd", fromlist=["x"]).__file__).as_posix()).info == CD.info


def test_the_claims_name_knobs_that_exist() -> None:
    for claim in CD.info.claims:
        for side in (claim.better, claim.worse):
            settings = dict(item.split("=") for item in side.removeprefix("cd").strip("()").split(",") if "=" in item)
            make_config(CD.Config, "cd", settings)
            assert settings or side in ("cd", "teacher")


# ---------------------------------------------------------------- the loss


class PointNetwork(MLP):
    """Says that the data are one point, whatever it is asked."""

    def forward(self, x, t, conditions, **options):
        out = super().forward(x, t, conditions, **options)
        out.prediction = POINT + 0 * out.prediction
        return out


@pytest.mark.parametrize("knobs", [{}, {"skip": 3}, {"param": "flow", "spacing": "uniform"}, {"metric": "l2"}, {"metric": "huber_sample"}])
def test_on_data_in_one_point_the_exact_student_has_no_loss(knobs: dict[str, Any]) -> None:
    teacher = external(Denoiser(PointNetwork(MLPConfig(width=8, depth=2)), Flow(), "x0"))
    method, _ = made(teacher=teacher, **knobs)
    assert total(method.loss(batch(OnePoint(), size=512))) < 1e-6


def test_the_loss_is_the_distance_to_the_target_after_one_ddim_step_summed_over_the_thirds_of_the_grid() -> None:
    method, _ = made(points=9, skip=2)
    with torch.no_grad():
        for p in method.target.parameters():
            p.add_(0.05)
    losses = method.loss(batch())
    again = batch()  # the same draws by hand
    x, conditions = again.data()
    n = again.choice(9, SIZE)
    eps = again.randn(SIZE, 2)
    expected = torch.zeros(SIZE)
    for i in range(SIZE):
        row = slice(i, i + 1)
        t, s = method.times[n[i]].item(), method.times[min(int(n[i]) + 2, 9)].item()
        x_t = jump(method.teacher.path, x[row], eps[row], t)
        x_s = ddim(method.teacher, x_t, conditions[row], [t, s])
        target = x_s if s == 0 else method.target(x_s, s, conditions[row])
        expected[i] = distance(method.student(x_t, t, conditions[row]), target, "huber")
    assert int(((n + 2) >= 9).sum()) > 0
    assert total(losses) == pytest.approx(expected.mean().item(), rel=1e-4)
    for k, name in enumerate(("noisy", "middle", "clean")):
        assert losses[name].item() == pytest.approx(expected[n // 3 == k].sum().item() / SIZE, rel=1e-4)


def test_below_the_lowest_point_the_target_is_the_teachers_point_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = made()
    with torch.no_grad():
        for p in method.target.parameters():
            p.fill_(float("nan"))  # so that any use of the target's network shows
        for p in method.student.parameters():
            p.add_(0.05)
    drawn = batch()
    monkeypatch.setattr(drawn, "choice", lambda n, *shape: torch.full(shape, n - 1))
    losses = method.loss(drawn)
    assert 0 < losses["clean"].item() < 1
    assert losses["noisy"].item() == losses["middle"].item() == 0


def test_the_target_takes_no_gradient_and_the_student_does() -> None:
    for mu in (0.95, 0.0):
        method, _ = made(target_ema=mu)
        method.teacher.requires_grad_(True)  # even so
        sum(method.loss(batch()).values()).backward()
        assert all(p.grad is not None for p in method.student.parameters())
        assert all(p.grad is None for p in method.teacher.parameters())
        assert mu == 0 or all(p.grad is None for p in method.target.parameters())


def test_the_interval_weighting_divides_by_the_length_of_the_step() -> None:
    plain, weighted = (made(param="flow", spacing="uniform", points=8, weighting=name)[0] for name in ("uniform", "interval"))
    assert total(weighted.loss(batch())) == pytest.approx(8 * total(plain.loss(batch())), rel=1e-5)


# ---------------------------------------------------------------- guidance


def test_w_is_the_guidance_scale_less_one_and_zero_is_unguided_bit_for_bit() -> None:
    plain, _ = made()
    none, _ = made(guidance=4.0, w=0.0)
    track, _ = made(guidance=4.0)
    named, _ = made(w=3.0)
    assert total(none.loss(batch())) == total(plain.loss(batch()))
    assert track.w == 3.0
    assert total(track.loss(batch())) == total(named.loss(batch())) != total(plain.loss(batch()))


def test_an_embedded_w_starts_as_a_no_op_is_learnt_and_is_asked_for_as_scale_less_one() -> None:
    method, context = made(w_range="0,5", guidance=3.0)
    x, conditions = SOURCE.draw(SIZE, generator_for(0, "x", 0))
    with_w, without = (method.student(x, 0.5, conditions, guidance=value) for value in (5.0, None))
    torch.testing.assert_close(with_w, without, rtol=0, atol=0)
    trained(method, context, 30)
    student = method.distilled()
    seeds = range(SIZE)
    default, same, other = (student.generate(conditions, steps=2, seeds=seeds, guidance=scale).x for scale in (None, 3.0, 6.0))
    assert torch.equal(default, same)
    assert not torch.allclose(default, other)
    by_hand = method.average(x, 0.5, conditions, guidance=2.0)
    shown = ConsistencyFunction(student.denoiser)(x, 0.5, conditions, guidance=student.guidance_input)
    assert torch.equal(by_hand, shown)


def test_guidance_that_cannot_be_had_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = made()
    conditions = SOURCE.conditions(2, generator_for(0, "x", 0))
    with pytest.raises(UsageError, match="takes none"):
        method.distilled().generate(conditions, steps=1, seeds=[0, 1], guidance=2.0)
    with pytest.raises(UsageError, match="outside w_range"):
        made(w_range="5,15")
    monkeypatch.setattr(MLP, "capabilities", frozenset({"taps"}))
    with pytest.raises(ContractError, match="guidance scale as an input"):
        made(w_range="0,5")


# ---------------------------------------------------------------- training


def test_a_short_training_moves_the_student_and_both_averages_and_nothing_else() -> None:
    method, context = made()
    start, teacher = weights(method.student), weights(method.teacher)
    loop = trained(method, context, 20)
    assert loop.spent.updates == 20
    assert loop.position.averages == {"average": 20, "target": 20}
    moved = (weights(method.student) - start).norm()
    for average in (method.target, method.average):
        assert 0 < (weights(average) - start).norm() < 1.5 * moved
        assert not torch.equal(weights(average), weights(method.student))
    assert torch.equal(weights(method.teacher), teacher)
    assert all(is_external(p) for p in method.teacher.network.modules())
    assert not any(name.startswith("teacher") for name in state.tensors_of(method))


def test_the_target_keeps_mu_of_itself() -> None:
    method, context = made(target_ema=0.9)
    start = weights(method.student)
    trained(method, context, 1)
    expected = 0.9 * start + 0.1 * weights(method.student)
    torch.testing.assert_close(weights(method.target), expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(expected, start, rtol=1e-5, atol=1e-7)


def test_without_a_target_average_no_copy_is_kept() -> None:
    method, context = made(target_ema=0.0)
    assert method.target is method.student
    assert not any(name.startswith("target") for name in state.tensors_of(method))
    assert list(method.stages()[0].ema) == ["average"]
    assert trained(method, context, 5).spent.updates == 5


@pytest.mark.parametrize(
    "knobs",
    [
        {"param": "flow", "spacing": "uniform", "solver": "heun"},
        {"param": "vp", "points": 50, "w_range": "0,3"},
        {"param": "edm", "spacing": "karras", "solver": "heun", "metric": "huber_sample", "optimizer": "radam"},
        {"param": "trig", "skip": 2, "metric": "l2", "target_ema": 0, "weighting": "interval", "decay": "linear", "warmup": 0.1},
    ],
    ids=lambda knobs: knobs["param"],
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
    assert resumed.spent.updates == expected.spent.updates == 12
    assert resumed.position.averages == expected.position.averages
    for name in ("student", "target", "average"):
        assert torch.equal(weights(getattr(second, name)), weights(getattr(whole, name)))


# ---------------------------------------------------------------- the student


@pytest.mark.parametrize("knobs", [{}, {"param": "edm", "sigma_data": 1.0}, {"param": "vp", "w_range": "0,3"}], ids=["trig", "edm", "vp"])
def test_the_student_survives_its_folder_bit_for_bit(tmp_path: Path, knobs: dict[str, Any]) -> None:
    method, context = made(**knobs)
    trained(method, context, 3)
    student = method.distilled()
    student.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = ConsistencyStudent.load(tmp_path)
    conditions = SOURCE.conditions(6, generator_for(0, "x", 0))
    assert loaded.steps == student.steps == (1, 2, 4)
    assert (loaded.sigma_data, loaded.guidance_input) == (student.sigma_data, student.guidance_input)
    for steps in (1, 2, 4):
        one, other = (each.generate(conditions, steps=steps, seeds=range(6)).x for each in (student, loaded))
        assert torch.equal(one, other)


def test_a_sample_depends_on_its_condition_and_seed_alone() -> None:
    student = made()[0].distilled()
    conditions = SOURCE.conditions(6, generator_for(0, "x", 0))
    together = student.generate(conditions, steps=4, seeds=range(6)).x
    alone = student.generate(conditions[2:4], steps=4, seeds=[2, 3]).x
    torch.testing.assert_close(together[2:4], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, student.generate(conditions, steps=4, seeds=range(6, 12)).x)


def test_the_scored_student_is_the_slow_average() -> None:
    method, context = made()
    trained(method, context, 5)
    assert torch.equal(weights(method.distilled().denoiser), weights(method.average))


def test_a_student_refuses_steps_and_modes_it_has_not() -> None:
    student = made()[0].distilled()
    with pytest.raises(UsageError, match="trained for 1, 2, 4 steps, not 3"):
        student.generate(Conditions.none(1), steps=3, seeds=[0])
    with pytest.raises(UsageError, match="fresh noise"):
        ConsistencyStudent(copy.copy(student.denoiser), {1: (1.0,)}, (2,), mode="deterministic")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"param": "ve"}, "unknown value of knob param"),
        ({"target_ema": 1.0}, "it goes from 0 to 0.999"),
        ({"w_range": "3"}, "two rising numbers"),
        ({"w_range": "5,1"}, "two rising numbers"),
        ({"w_range": "1,5", "w": 9}, "lies outside w_range"),
        ({"param": "vp", "solver": "heun"}, "needs a smooth path"),
        ({"skip": 12}, "leaps over the whole grid"),
        ({"betas": "0.9"}, "betas are two numbers"),
        ({"metric": "lpips"}, "unknown value of knob metric"),
        ({"param": "vp", "points": 600}, "too fine"),
        ({"points": 3}, "gives no 4 steps"),
    ],
    ids=str,
)
def test_wrong_knobs_are_refused_in_one_line(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)
