"""InstaFlow on toys: which pairs each stage sees, its losses by hand, what moves, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Batch, Context, ContractError, external, is_external
from distillbench.budget import Budget
from distillbench.config import make_config
from distillbench.data.mixture import MixtureSource, standard_mixture
from distillbench.diffusion import Denoiser, VPLinear, dpmpp_2m, euler, heun, time_grid
from distillbench.diffusion.schedules import Flow
from distillbench.discovery import find
from distillbench.errors import NotApplicable, UsageError
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts.features import feature_distance
from distillbench.parts.student_by_steps import StudentBySteps
from distillbench.randomness import generator_for
from distillbench.training import state
from distillbench.training.loop import Loop
from distillbench_methods.instaflow import InstaFlow

SOURCE = MixtureSource(standard_mixture())
SIZE = 32


class Stop(Exception):
    """What ends a training in the middle."""


class NoData:
    """A source of conditions alone."""

    conditions = SOURCE.conditions

    def draw(self, n: int, generator: torch.Generator) -> Any:
        raise AssertionError("drew data")


def toy_teacher(schedule: Any = None, prediction: str = "velocity") -> Denoiser:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    return external(Denoiser(network, schedule or Flow(), prediction))


def made(*, steps: tuple[int, ...] = (1, 2, 4), guidance: float = 1.0, teacher: Denoiser | None = None, folder: Path | None = None,
         **knobs: Any) -> tuple[InstaFlow, Context]:  # fmt: skip
    context = Context(teacher=teacher or toy_teacher(), shape=(2,), steps=steps, guidance=guidance, folder=folder)
    method = InstaFlow(make_config(InstaFlow.Config, "instaflow", {"lr": 1e-3, "ode_steps": 4, "flow_steps": 3, **knobs}))
    method.build(context)
    return method, context


def batch(count: int = 0, progress: float = 0.0, size: int = SIZE) -> Batch:
    return Batch(size=size, count=count, progress=progress, source=NoData(), generator=generator_for(0, "t", count))


def trained(method: InstaFlow, context: Context, cycles: int, **options: Any) -> Loop:
    loop = Loop(method, context, NoData(), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, **options)
    loop.train()
    return loop


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def plan(**knobs: Any) -> dict[str, float]:
    return {stage.name: round(stage.share, 9) for stage in made(**knobs)[0].stages()}


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find(Path(__import__("distillbench_methods.instaflow", fromlist=["x"]).__file__).as_posix()).info == InstaFlow.info


def test_the_claims_and_the_tuning_name_knobs_that_exist() -> None:
    for claim in InstaFlow.info.claims:
        for side in (claim.better, claim.worse):
            settings = dict(item.split("=") for item in side.removeprefix("instaflow").strip("()").split(",") if "=" in item)
            make_config(InstaFlow.Config, "instaflow", settings)
            assert settings or side in ("instaflow", "teacher")
    for search in InstaFlow.info.tunes:
        for value in search.choices or (search.low, search.high):
            make_config(InstaFlow.Config, "instaflow", {search.knob: value})


# ---------------------------------------------------------------- stages


def test_pairs_and_trainings_alternate_and_share_the_budget() -> None:
    shares = {"pair_share": 0.3, "distill_share": 0.4}
    assert plan(**shares) == {"pairs 0": 0.15, "reflow 0": 0.3, "pairs 1": 0.15, "distil": 0.4}
    assert plan(**shares, n_reflow=2) == {"pairs 0": 0.1, "reflow 0": 0.15, "pairs 1": 0.1, "reflow 1": 0.15, "pairs 2": 0.1, "distil": 0.4}
    assert plan(**shares, n_reflow=0) == {"pairs 0": 0.3, "distil": 0.7}
    assert plan(**shares, distill=False) == plan(**shares, steps=(2, 4)) == {"pairs 0": 0.3, "reflow 0": 0.7}


@pytest.mark.parametrize(("solver", "function"), [("dpmpp_2m", dpmpp_2m), ("heun", heun), ("euler", euler)])
def test_the_first_pairs_are_the_guided_teachers_and_later_ones_the_averages_of_the_flow(solver: str, function: Any) -> None:
    method, _ = made(solver=solver, guidance=2.5, reflow_guidance=1.5, drop=0.1)
    with torch.no_grad():
        for p in method.flow_average.parameters():
            p.add_(0.05)
    for k, (denoiser, solve, n, scale) in enumerate([(method.teacher, function, 4, 2.5), (method.flow_average, euler, 3, 1.5)]):
        method.make(k, batch())
        again = batch()
        conditions = again.conditions()
        noise = again.randn(SIZE, 2)
        with torch.no_grad():
            x = solve(denoiser, noise, conditions, time_grid(Flow(), n), guidance_scale=scale)
        drawn = dict(zip(*[each.tolist() for each in (noise[:, 0], x)], strict=True))
        stored = method.pairs.draw(batch(), round=k)
        assert [drawn[z] for z in stored[0][:, 0].tolist()] == stored[1].tolist()


def test_no_two_stages_share_a_pair() -> None:
    method, context = made(n_reflow=2, pair_share=0.3)
    trained(method, context, 60)
    noises = []
    for k in range(3):
        assert method.pairs.count(k) > 0
        held = method.pairs.draw(batch(size=2000), round=k)
        noises.append(set(held[0][:, 0].tolist()))
    assert not noises[0] & noises[1]
    assert not noises[1] & noises[2]
    assert not noises[0] & noises[2]


def test_a_limit_on_the_pairs_leaves_the_rest_of_their_share_to_training() -> None:
    method, context = made(n_pairs=3 * SIZE - 1, pair_share=0.5, distill_share=0.3)
    loop = trained(method, context, 40)
    assert (method.pairs.count(0), method.pairs.count(1)) == (3 * SIZE, 3 * SIZE)
    assert loop.spent.updates == 40 - 6


def test_without_a_share_for_pairs_they_are_made_as_they_are_used() -> None:
    method, context = made(pair_share=0)
    before = weights(method.student)
    loop = trained(method, context, 10)
    assert loop.spent.updates == 10
    assert method.pairs.count(0) == method.pairs.count(1) == 0
    assert not torch.equal(weights(method.average), before)


# ---------------------------------------------------------------- losses


def test_the_reflow_loss_is_the_squared_error_of_the_velocity_on_the_lines_of_its_pairs() -> None:
    method, _ = made(tau_eps=0.01)
    method.make(0, batch())
    loss = method.flow_loss(0, batch(1))
    again = batch(1)
    noise, x, conditions = method.pairs.draw(again)
    tau = 0.01 + 0.99 * again.rand(SIZE)
    with torch.no_grad():
        errors = []
        for i in range(SIZE):
            at = tau[i].item() * x[i] + (1 - tau[i].item()) * noise[i]
            velocity = -method.flow.velocity(at[None], 1 - tau[i].item(), conditions[i : i + 1])[0]  # the paper's direction
            errors.append((velocity - (x[i] - noise[i])).square().mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "parts"), [("l2", "l"), ("features", "f"), ("l2+features", "lf"), ("l2-features", "l")])
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_the_distillation_loss_compares_one_euler_step_with_the_pair(kind: str, parts: str, level: float) -> None:
    method, _ = made(distill_loss=kind, feature_time=level)
    method.make(1, batch())
    losses = method.distil_loss(1, batch(1))
    again = batch(1)
    noise, x, conditions = method.pairs.draw(again, round=1)
    with torch.no_grad():
        mine = euler(method.student, noise, conditions, [1.0, 0.0])
        eps = again.randn(SIZE, 2)
        seen = [method.teacher.predict((1 - level) * y + level * eps, level, conditions, taps=("hidden2",)).features["hidden2"]
                for y in (mine, x)]  # fmt: skip
    expected = {"l2": (mine - x).square().mean(), "features": feature_distance(*seen)}
    assert list(losses) == [name for name in expected if name[0] in parts]
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4)


def test_features_take_over_for_the_last_part_of_distillation() -> None:
    method, _ = made(feature_share=0.4, distill_loss="l2-features")
    method.make(1, batch())
    assert list(method.distil_loss(1, batch(progress=0.59))) == ["l2"]
    assert list(method.distil_loss(1, batch(progress=0.61))) == ["features"]


@pytest.mark.parametrize("loss", ["l2", "features"])
def test_gradients_reach_the_student_alone(loss: str) -> None:
    method, _ = made(distill_loss=loss)
    method.make(1, batch())
    sum(method.distil_loss(1, batch()).values()).backward()
    assert all(p.grad is not None for p in method.student.parameters())
    for other in (method.teacher, method.flow, method.flow_average):
        assert all(p.grad is None for p in other.parameters())


def test_dropped_conditions_train_the_unconditional_flow() -> None:
    method, _ = made(drop=0.9)
    method.make(0, batch())
    method.flow_loss(0, batch()).backward()
    assert method.flow.network.label.weight.grad[-1].abs().sum() > 0  # the row of the null label


# ---------------------------------------------------------------- training


def test_a_training_begins_at_the_teacher_and_distillation_at_the_reflowed_average() -> None:
    method, context = made()
    start = weights(method.teacher)
    for network in (method.flow, method.flow_average, method.student, method.average):
        assert torch.equal(weights(network), start)
    with torch.no_grad():
        for p in method.flow_average.parameters():
            p.add_(0.1)
    moved = weights(method.flow_average)
    method.begin_distil()
    assert torch.equal(weights(method.student), moved)
    assert torch.equal(weights(method.average), moved)
    method.begin_reflow()
    assert torch.equal(weights(method.flow), moved)
    trained(method, context, 40)
    for network in (method.flow, method.flow_average, method.student, method.average):
        assert not torch.equal(weights(network), moved)
    assert torch.equal(weights(method.teacher), start)
    assert all(is_external(p) for p in method.teacher.network.modules())
    assert not any(name.startswith("teacher") for name in state.tensors_of(method))


@pytest.mark.parametrize("n_reflow", [0, 1, 2])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path, n_reflow: int) -> None:
    knobs = {"n_reflow": n_reflow, "pair_share": 0.4}
    whole, context = made(**knobs)
    expected = trained(whole, context, 24)
    for at in (3, 11, 20):  # in the first pairs, in the middle, in distillation

        def stop(progress: Any, at: int = at) -> None:
            if progress.spent.cycles == at:
                raise Stop

        folder = tmp_path / str(at)
        first, context = made(folder=folder, **knobs)
        with pytest.raises(Stop):
            trained(first, context, 24, folder=folder, checkpoint_seconds=0, report=stop)
        second, context = made(folder=folder, **knobs)
        resumed = trained(second, context, 24, folder=folder)
        assert (resumed.spent.updates, resumed.spent.macs) == (expected.spent.updates, expected.spent.macs)
        assert resumed.position.averages == expected.position.averages
        assert second.pairs.state_dict() == whole.pairs.state_dict()
        for name, tensor in state.tensors_of(whole).items():
            assert torch.equal(tensor, state.tensors_of(second)[name]), name


@pytest.mark.parametrize(
    "knobs",
    [
        {"n_reflow": 0, "distill_loss": "l2-features"},
        {"n_reflow": 3, "decay": "cosine", "warmup": 0.1},
        {"distill": False, "time_sampling": "k-grid"},
        {"time_sampling": "t0", "steps": (1,), "distill_loss": "l2+features"},
        {"steps": (2, 4), "optimizer": "adamw", "weight_decay": 0.1},
        {"drop": 0.1, "reflow_guidance": 1.5, "solver": "heun", "half_life": 0},
        {"teacher": toy_teacher(VPLinear(), "eps"), "guidance": 2.0},
    ],
    ids=str,
)
def test_every_variant_trains_and_samples(knobs: dict[str, Any]) -> None:
    method, context = made(**knobs)
    trained(method, context, 24)
    student = method.distilled()
    conditions = SOURCE.conditions(3, generator_for(0, "x", 0))
    assert student.steps == context.steps
    for steps in context.steps:
        samples = student.generate(conditions, steps=steps, seeds=[0, 1, 2])
        assert samples.evaluations == steps
        assert bool(samples.x.isfinite().all())


# ---------------------------------------------------------------- the student


def test_one_step_is_the_distilled_network_and_more_are_the_reflowed_one(tmp_path: Path) -> None:
    method, context = made()
    trained(method, context, 24)
    student = method.distilled()
    assert torch.equal(weights(student.denoiser_for(1)), weights(method.average))
    assert student.denoiser_for(2) is student.denoiser_for(4) is method.flow_average
    assert not torch.equal(weights(method.average), weights(method.flow_average))
    student.save(tmp_path)
    conditions = SOURCE.conditions(6, generator_for(0, "x", 0))
    loaded = StudentBySteps.load(tmp_path)
    for steps in (1, 2, 4):
        one, other = (each.generate(conditions, steps=steps, seeds=range(6)).x for each in (student, loaded))
        assert torch.equal(one, other)


def test_without_distillation_all_steps_are_the_reflowed_networks_and_without_reflow_the_teachers() -> None:
    undistilled, _ = made(distill=False)
    assert all(undistilled.distilled().denoiser_for(n) is undistilled.flow_average for n in (1, 2, 4))
    direct, context = made(n_reflow=0)
    trained(direct, context, 12)
    assert torch.equal(weights(direct.distilled().denoiser_for(2)), weights(direct.teacher))
    assert not torch.equal(weights(direct.distilled().denoiser_for(1)), weights(direct.teacher))


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"n_reflow": 4}, UsageError, "it goes from 0 to 3"),
        ({"n_reflow": 0, "distill": False}, UsageError, "nothing to train"),
        ({"n_reflow": 0, "steps": (2, 4)}, UsageError, "ask for 1 step too"),
        ({"pair_share": 0.6, "distill_share": 0.4}, UsageError, "leave nothing for reflow"),
        ({"time_sampling": "t0"}, UsageError, "gives 1 step and no more"),
        ({"reflow_guidance": 1.5}, UsageError, "set drop"),
        ({"betas": "0.9"}, UsageError, "betas are two numbers"),
        ({"distill_loss": "lpips"}, UsageError, "unknown value of knob distill_loss"),
        ({"tap": "hidden9", "distill_loss": "features"}, ContractError, "no tap 'hidden9'"),
    ],
    ids=str,
)
def test_wrong_knobs_are_refused_in_one_line(knobs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)


def test_features_are_asked_of_networks_that_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLP, "capabilities", frozenset())
    made()
    with pytest.raises(NotApplicable, match="hidden features"):
        made(distill_loss="l2-features")
