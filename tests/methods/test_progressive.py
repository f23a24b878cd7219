"""Progressive distillation on a toy: its stages, their losses by hand, what is handed on, resume, and the students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Batch, Context, external
from distillbench.budget import Budget
from distillbench.config import make_config
from distillbench.data.mixture import MixtureSource, standard_mixture
from distillbench.diffusion import Denoiser, Flow, ddim, jump, time_grid
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts.simulation import step_grid
from distillbench.parts.student_by_steps import StudentBySteps
from distillbench.randomness import generator_for
from distillbench.training.loop import Loop
from distillbench_methods.progressive import ProgressiveDistillation as PD
from distillbench_methods.progressive import interval_times, loss_weight

SOURCE = MixtureSource(standard_mixture())
SIZE = 32
POINT = torch.tensor([0.3, -1.2])


class Stop(Exception):
    """What ends a training in the middle."""


def made(*, steps: tuple[int, ...] = (1, 2, 4), seed: int = 0, guidance: float = 1.0, scale: float | None = None,
         teacher: Denoiser | None = None, **knobs: Any) -> tuple[PD, Context]:  # fmt: skip
    """A built method on a toy; guidance is the track's, scale the knob."""
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    teacher = external(teacher or Denoiser(network, Flow(), "velocity"))
    context = Context(teacher=teacher, shape=(2,), steps=steps, seed=seed, guidance=guidance)
    method = PD(make_config(PD.Config, "progressive", {"start_steps": 8, "guidance": scale, **knobs}))
    method.build(context)
    return method, context


def batch(size: int = SIZE) -> Batch:
    return Batch(size=size, count=0, progress=0.0, source=SOURCE, generator=generator_for(0, "t", 0))


def trained(method: PD, context: Context, cycles: int, **options: Any) -> Loop:
    loop = Loop(method, context, SOURCE, Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, **options)
    loop.train()
    return loop


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find(Path(__import__("distillbench_methods.progressive", fromlist=["x"]).__file__).as_posix()).info == PD.info


def test_the_claims_and_what_is_tuned_name_knobs_that_exist() -> None:
    ablations = set()
    for claim in PD.info.claims:
        for side in (claim.better, claim.worse):
            name, _, knobs = side.partition("(")
            assert name in ("progressive", "teacher")
            make_config(PD.Config, "progressive", dict(pair.split("=") for pair in knobs.rstrip(")").split(",") if pair))
            ablations.add(knobs)
    assert len(ablations - {""}) <= 5
    for search in PD.info.tunes:
        for value in search.choices or (search.low, search.high):
            make_config(PD.Config, "progressive", {search.knob: value})


class PointNetwork(MLP):
    """Says that the data are one point, whatever it is asked."""

    def forward(self, x, t, conditions, **options):
        out = super().forward(x, t, conditions, **options)
        out.prediction = POINT + 0 * out.prediction
        return out


@pytest.mark.parametrize("knobs", [{}, {"path": "trig"}, {"loss_weight": "v_mse"}, {"direct": True}], ids=str)
def test_on_data_in_one_point_the_exact_student_has_no_loss_in_any_stage(knobs: dict[str, Any]) -> None:
    method, _ = made(teacher=Denoiser(PointNetwork(MLPConfig(width=8, depth=2)), Flow(), "x0"), **knobs)
    for stage in method.stages():
        (loss,) = stage.turns[0].loss(batch()).values()
        assert 0 <= loss.item() < 1e-9


def test_a_student_is_trained_at_the_times_at_which_it_is_called() -> None:
    student = made()[0].distilled()
    for n in (1, 2, 4):
        assert sorted(interval_times(torch.arange(n), n, 2)[0].tolist(), reverse=True) == list(student.grids[n]) == list(step_grid(n))
    assert student.mode == "deterministic"


def test_plain_snr_leaves_the_last_student_as_it_came() -> None:
    for kind, still in (("snr", True), ("snr_trunc", False)):
        method, context = made(loss_weight=kind)
        trained(method, context, 12)
        assert torch.equal(weights(method.kept["1"]), weights(method.kept["2"])) == still


# ---------------------------------------------------------------- stages


def test_stages_are_shares_of_the_budget_in_which_the_last_two_count_double() -> None:
    stages = made(start_steps=32)[0].stages()
    assert [stage.name for stage in stages] == ["to 16 steps", "to 8 steps", "to 4 steps", "to 2 steps", "to 1 step"]
    assert [round(7 * stage.share, 9) for stage in stages] == [1, 1, 1, 2, 2]
    assert all(stage.reset == ("distil",) for stage in stages)
    assert all(stage.turns[0].optimizer["student"].decay == "linear" for stage in stages)
    assert not any(stage.reset for stage in made(reset_optimizer=False)[0].stages())
    assert [stage.name for stage in made(steps=(4,))[0].stages()] == ["to 4 steps"]


def test_direct_distillation_spends_the_same_on_each_count_in_one_stage() -> None:
    stages = made(start_steps=32, direct=True)[0].stages()
    assert [(stage.name, round(7 * stage.share, 9)) for stage in stages] == [("to 4 steps", 3), ("to 2 steps", 2), ("to 1 step", 2)]
    assert len(made(start_steps=32, direct=True, steps=(2,))[0].stages()) == 1


@pytest.mark.parametrize("knobs", [{}, {"direct": True}, {"path": "trig", "loss_weight": "v_mse"}, {"halving_factor": 4}])
def test_the_loss_is_the_weighted_error_against_the_trajectory_of_the_stages_teacher(knobs: dict[str, Any]) -> None:
    method, _ = made(steps=(1, 2), **knobs)
    with torch.no_grad():
        for p in method.parent.parameters():
            p.add_(0.05)  # so that the two teachers differ
    path, before = method.teacher.path, 8
    for stage in method.stages():
        steps = int(stage.name.split()[1])
        direct = method.config.direct
        teacher = method.teacher if direct or before == 8 else method.parent
        parts = (8 if direct else before) // steps
        again = batch()  # the same draws by hand
        x, conditions = again.data()
        i = again.choice(steps, SIZE)
        t, end = (i.double() + 1) / steps, i.double() / steps
        z = jump(path, x, again.randn(SIZE, 2), t)
        expected = 0.0
        for k in range(SIZE):
            row = slice(k, k + 1)
            with torch.no_grad():
                landed = ddim(teacher, z[row], conditions[row], torch.linspace(t[k], end[k], parts + 1, dtype=torch.float64))
                (alpha, sigma), (alpha_end, sigma_end) = path.levels(t[k]), path.levels(end[k])
                target = (landed - sigma_end / sigma * z[row]) / (alpha_end - sigma_end / sigma * alpha)
                error = (method.student.x0(z[row], t[row], conditions[row]) - target).square().mean()
            expected += (loss_weight(method.config.loss_weight, path, t[row]) * error).item() / SIZE
        losses = stage.turns[0].loss(batch())
        assert losses[f"{steps} steps"].item() == pytest.approx(expected, rel=2e-3)
        before = steps


def test_guidance_is_the_first_teachers_and_later_ones_have_it_in_their_weights() -> None:
    method, _ = made(guidance=3.0)
    calls: list[int] = []
    for module in (method.teacher, method.parent, method.student):
        module.network.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    for stage, rows in zip(method.stages(), (2 * SIZE, SIZE, SIZE), strict=True):
        calls.clear()
        stage.turns[0].loss(batch())
        assert calls == [rows, rows, SIZE]
    plain, same, other = (made(guidance=track, scale=knob)[0] for track, knob in ((3.0, None), (1.0, 3.0), (3.0, 1.0)))
    losses = [each.stages()[0].turns[0].loss(batch())["4 steps"].item() for each in (plain, same, other)]
    assert losses[0] == losses[1] != losses[2]


def test_only_the_student_learns_and_the_target_takes_no_gradient() -> None:
    method, _ = made()
    for stage in method.stages():
        for module in (method.teacher, method.parent):
            module.requires_grad_(True)  # even so
        sum(stage.turns[0].loss(batch()).values()).backward()
        assert all(p.grad is None for module in (method.teacher, method.parent) for p in module.parameters())
        assert any(p.grad.abs().max() > 0 for p in method.student.parameters())


def test_handing_on_makes_the_student_the_next_teacher_and_keeps_it_twice_the_same() -> None:
    method, _ = made(half_life=5.0)
    start, teacher = weights(method.student), weights(method.teacher)
    with torch.no_grad():
        for p in method.average.parameters():
            p.add_(0.1)
    for _ in range(2):
        method.hand_on(4)
        for module in (method.student, method.parent, method.kept["4"]):
            assert torch.equal(weights(module), weights(method.average))
    assert torch.equal(weights(method.kept["2"]), start)
    method.hand_on(8)  # nobody asked for this one
    assert set(method.kept) == {"1", "2", "4"}
    assert torch.equal(weights(method.teacher), teacher)


def test_a_training_ends_with_a_student_for_each_count_and_the_teacher_as_it_was() -> None:
    method, context = made()
    teacher = weights(method.teacher)
    loop = trained(method, context, 15)
    assert loop.spent.updates == loop.position.counts["distil"] == 15
    kept = [weights(method.kept[name]) for name in ("4", "2", "1")]
    assert not any(torch.equal(a, b) for a, b in ((kept[0], kept[1]), (kept[1], kept[2]), (kept[0], teacher)))
    assert torch.equal(kept[2], weights(method.student))
    assert torch.equal(weights(method.teacher), teacher)


def test_it_learns_the_first_teachers_endpoint() -> None:
    method, context = made(lr=5e-3)
    trained(method, context, 600)
    conditions = SOURCE.conditions(256, generator_for(0, "x", 0))
    z = torch.randn(256, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        goal = ddim(method.teacher, z, conditions, time_grid(method.teacher.path, 8))
        for steps in (1, 2):
            times = time_grid(method.teacher.path, steps)
            before, after = (ddim(net, z, conditions, times) - goal for net in (method.teacher, method.distilled().denoiser_for(steps)))
            assert after.square().mean() < 0.2 * before.square().mean()


@pytest.mark.parametrize("kind", ["x0", "eps"])
def test_networks_of_another_prediction_are_fitted_to_the_teacher_first(kind: str) -> None:
    method, context = made(prediction=kind, fit_share=0.5, lr=5e-3)
    fit, *others = method.stages()
    assert (fit.name, fit.share, sum(stage.share for stage in others)) == ("fit", 0.5, pytest.approx(0.5))
    assert method.student.prediction == method.distilled().denoiser_for(1).prediction == kind
    before = fit.turns[0].loss(batch(size=512))["fit"].item()
    trained(method, context, 120)
    assert fit.turns[0].loss(batch(size=512))["fit"].item() < 0.5 * before


@pytest.mark.parametrize("knobs", [{"half_life": 20.0, "path": "trig"}, {"direct": True, "clip": None}, {"prediction": "x0"}], ids=str)
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(knobs: dict[str, Any], tmp_path: Path) -> None:
    whole, context = made(**knobs)
    expected = trained(whole, context, 12)
    for stop in (5, 9):  # in two of the stages

        def halt(progress: Any, stop: int = stop) -> None:
            if progress.spent.cycles == stop:
                raise Stop

        method, context = made(**knobs)
        with pytest.raises(Stop):
            trained(method, context, 12, folder=tmp_path, checkpoint_seconds=0, report=halt)
    method, context = made(**knobs)
    resumed = trained(method, context, 12, folder=tmp_path)
    assert resumed.spent.updates == expected.spent.updates == 12
    assert torch.equal(weights(method.kept), weights(whole.kept))


# ---------------------------------------------------------------- the students


def test_the_students_sample_by_ddim_and_survive_their_folder(tmp_path: Path) -> None:
    method, context = made(path="trig")
    trained(method, context, 8)
    student = method.distilled()
    student.save(tmp_path)
    loaded = StudentBySteps.load(tmp_path)
    conditions = SOURCE.conditions(6, generator_for(0, "x", 0))
    assert loaded.steps == student.steps == (1, 2, 4)
    for steps in student.steps:
        one, other = (each.generate(conditions, steps=steps, seeds=range(6)) for each in (student, loaded))
        assert torch.equal(one.x, other.x)
        assert one.evaluations == steps


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"start_steps": 24}, "power of 2, not 24"),
        ({"halving_factor": 3}, "2 or 4"),
        ({"betas": "0.9"}, "betas are two numbers"),
        ({"start_steps": 4}, "no student of 4 steps.*below 4"),
        ({"end_steps": 2}, "no student of 1 steps"),
        ({"end_steps": 3}, "no student of 3 steps"),
        ({"steps": (1, 6)}, "no student of 6 steps"),
        ({"path": "vp"}, "unknown value of knob path"),
        ({"loss_weight": "lpips"}, "unknown value of knob loss_weight"),
        ({"prediction": "both"}, "unknown value of knob prediction"),
    ],
    ids=str,
)
def test_wrong_knobs_are_refused_in_one_line(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)


def test_a_smaller_end_than_asked_for_is_trained_and_not_kept() -> None:
    method, context = made(steps=(4,), end_steps=1)
    assert [stage.name for stage in method.stages()] == ["to 4 steps", "to 2 steps", "to 1 step"]
    trained(method, context, 8)
    assert method.distilled().steps == (4,)
    assert not torch.equal(weights(method.kept["4"]), weights(method.student))
