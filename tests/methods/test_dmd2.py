"""DMD2 on a toy: which turn moves what, how often, on which inputs, and that the student survives its folder."""

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
from distillbench.diffusion import Denoiser
from distillbench.diffusion.schedules import Flow
from distillbench.discovery import find
from distillbench.errors import UsageError
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.networks.transformer import Transformer, TransformerConfig
from distillbench.parts import critics
from distillbench.parts.student import FewStepStudent
from distillbench.randomness import generator_for
from distillbench.training.loop import Loop
from distillbench_methods.dmd2 import DMD2

MIXTURE = standard_mixture()
SIZE = 16


class NoData:
    """Conditions, but no example may be drawn."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        raise AssertionError("data was drawn")

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return MixtureSource(MIXTURE).conditions(n, generator)


def made(steps: int = 1, *, seed: int = 0, **knobs: Any) -> tuple[DMD2, Context]:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    teacher = external(Denoiser(network, Flow(), "velocity"))
    context = Context(teacher=teacher, shape=(2,), steps=(steps,), seed=seed)
    method = DMD2(DMD2.Config(**{"lr": 1e-3, "fake_lr": 1e-3, **knobs}))
    method.build(context)
    return method, context


def batch(source: Any = None, count: int = 0, size: int = SIZE) -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=source or MixtureSource(MIXTURE), generator=generator_for(0, "t", count))


def trained(method: DMD2, context: Context, cycles: int, source: Any = None) -> Loop:
    loop = Loop(method, context, source or MixtureSource(MIXTURE), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE)
    loop.train()
    return loop


def only(method: DMD2, *moving: nn.Module) -> None:
    """What the loop does before a turn."""
    for module in (method.student, method.average, method.guide):
        module.requires_grad_(False)
    for module in moving:
        module.requires_grad_(True)


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def difference(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_card_is_read_from_the_source_alone() -> None:
    info = find(Path(__import__("distillbench_methods.dmd2", fromlist=["x"]).__file__).as_posix()).info
    assert info == DMD2.info
    assert info.per_step


def test_the_claims_name_knobs_that_exist() -> None:
    for claim in DMD2.info.claims:
        for side in (claim.better, claim.worse):
            name, _, knobs = side.partition("(")
            assert name in ("dmd2", "teacher")
            make_config(DMD2.Config, "dmd2", dict(pair.split("=") for pair in knobs.rstrip(")").split(",") if pair))


@pytest.mark.parametrize(("cycles", "ratio"), [(3, 5), (4, 1), (2, 10)])
def test_a_cycle_is_one_generator_update_and_then_r_guidance_updates(cycles: int, ratio: int) -> None:
    method, context = made(fake_per_gen=ratio)
    counts = trained(method, context, cycles).position.counts
    assert (counts["generator"], counts["guidance"]) == (cycles, cycles * ratio)
    assert counts["generator"] == math.ceil(counts["guidance"] / ratio)
    assert [turn.name for turn in method.stages()[0].turns] == ["generator", "guidance"]


def test_training_moves_student_fake_score_and_head_and_not_the_teacher() -> None:
    method, context = made(2)
    teacher = {name: value.clone() for name, value in context.teacher.state_dict().items()}
    head = {name: value.clone() for name, value in method.head.state_dict().items()}
    trained(method, context, 3)
    assert difference(method.student, context.teacher) > 1e-4
    assert difference(method.fake, context.teacher) > 1e-4
    assert any(not torch.equal(value, head[name]) for name, value in method.head.state_dict().items())
    assert all(torch.equal(value, teacher[name]) for name, value in context.teacher.state_dict().items())
    assert difference(method.average, method.student) == 0  # half_life 0: what is scored is the student itself


def test_without_the_gan_no_data_is_drawn_and_with_it_some_is() -> None:
    for steps in (1, 4):
        trained(*made(steps, gan=False), 2, NoData())
    with pytest.raises(AssertionError, match="data was drawn"):
        trained(*made(1), 1, NoData())


def test_the_guidance_turn_gives_the_student_no_gradient() -> None:
    method, _ = made(2, lambda_dis=1.0)
    for moving in ((method.guide,), (method.guide, method.student)):  # even if it were left trainable
        only(method, *moving)
        sum(method.guidance_loss(True, batch()).values()).backward()
        assert not gradients(method.student)
        assert any(g.abs().max() > 0 for g in gradients(method.fake))
        assert any(g.abs().max() > 0 for g in gradients(method.head))


def test_the_discriminator_moves_the_fake_scores_first_layers_and_not_its_last() -> None:
    method, _ = made()
    only(method, method.guide)
    method.guidance_loss(True, batch())["discriminator"].backward()
    network = method.fake.network
    assert network.first.weight.grad.abs().max() > 0
    assert network.last.weight.grad is None
    assert method.tap == "hidden2"


def test_the_generator_turn_leaves_no_gradient_in_the_guidance_networks() -> None:
    method, _ = made(2)
    only(method, method.student)
    losses = method.generator_loss(True, batch())
    sum(losses.values()).backward()
    assert not gradients(method.guide)
    assert any(g.abs().max() > 0 for g in gradients(method.student))
    assert losses["gan"].item() > 0


def test_the_gans_gradient_reaches_the_student_through_the_frozen_head() -> None:
    method, _ = made()
    only(method, method.student)
    method.generator_loss(True, batch())["gan"].backward()
    assert max(g.abs().max().item() for g in gradients(method.student)) > 1e-6


def test_a_fake_score_equal_to_the_teacher_gives_no_matching_gradient() -> None:
    method, _ = made(gan=False)
    only(method, method.student)
    method.generator_loss(False, batch())["matching"].backward()
    assert all(g.abs().max() == 0 for g in gradients(method.student))


def test_a_head_of_zeros_costs_what_it_must() -> None:
    method, _ = made(lambda_gan=1.0, lambda_dis=1.0)
    for parameter in method.head.parameters():
        nn.init.zeros_(parameter)
    assert method.generator_loss(True, batch())["gan"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert method.guidance_loss(True, batch())["discriminator"].item() == pytest.approx(2 * math.log(2), rel=1e-6)


def calls(method: DMD2, count: int, source: Any = None) -> list[tuple[bool, float, Tensor]]:
    """(gradient?, time, input) of each call of the student in the `count`-th generation."""
    found: list[tuple[bool, float, Tensor]] = []

    def hook(_: nn.Module, args: tuple) -> None:
        found.append((torch.is_grad_enabled(), args[1][0].item(), args[0]))

    handle = method.student.network.register_forward_pre_hook(hook)
    try:
        method.generate(batch(source, count, size=4))
    finally:
        handle.remove()
    return found


def test_the_last_step_of_a_simulation_carries_the_gradient_and_its_number_is_uniform() -> None:
    method, _ = made(4)
    n, tally = 400, dict.fromkeys(method.grid, 0)
    for count in range(n):
        found = calls(method, count)
        times = [t for _, t, _ in found]
        assert times == list(method.grid[: len(times)])
        assert [gradient for gradient, _, _ in found] == [False] * (len(times) - 1) + [True]
        tally[times[-1]] += 1
    expected, spread = n / 4, math.sqrt(n * 0.25 * 0.75)
    assert all(abs(seen - expected) < 4 * spread for seen in tally.values())


def test_the_simulated_states_are_those_of_inference() -> None:
    method, _ = made(4)
    for count in range(30):
        found = calls(method, count)
        twin = generator_for(0, "t", count)
        k = int(torch.randint(4, (), generator=twin))
        MixtureSource(MIXTURE).conditions(4, twin)
        noises = [torch.randn(4, 2, generator=twin) for _ in range(k + 1)]
        assert len(found) == k + 1
        torch.testing.assert_close(found[0][2], noises[0])
        if k == 1:
            conditions = MixtureSource(MIXTURE).conditions(4, _after_one_choice(count))
            x0 = method.student.x0(noises[0], 1.0, conditions)
            torch.testing.assert_close(found[1][2], 0.25 * x0 + 0.75 * noises[1])


def _after_one_choice(count: int) -> torch.Generator:
    generator = generator_for(0, "t", count)
    torch.randint(4, (), generator=generator)
    return generator


def test_forward_simulation_noises_real_data_at_all_but_the_first_step() -> None:
    class Far(MixtureSource):
        def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
            return torch.full((n, 2), 1000.0), self.conditions(n, generator)

    method, _ = made(4, sim="forward")
    seen = set()
    for count in range(30):
        found = calls(method, count, Far(MIXTURE))
        ((gradient, t, x),) = found
        assert gradient
        seen.add(t)
        assert (x - (1 - t) * 1000.0).abs().max() < 6 * t
    assert seen == set(method.grid)


def test_one_step_count_a_training() -> None:
    method, context = made()
    context.steps = (1, 2, 4)
    with pytest.raises(ContractError, match="1, 2, 4"):
        method.build(context)
    with pytest.raises(ContractError, match="grid"):
        made(2, grid=(1.0,))


@pytest.mark.parametrize("knobs", [{"gan": False, "lambda_dm": 0.0}, {"t_min": 0.5, "t_max": 0.4}, {"betas": (0.9,)}, {"fake_per_gen": 0}])
def test_impossible_knobs_are_refused_in_one_line(knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_config(DMD2.Config, "dmd2", knobs)


def test_the_gan_can_set_in_late_at_a_lower_rate() -> None:
    method, context = made(gan_start=0.5, gan_rate=0.25)
    first, second = method.stages()
    assert (first.share, second.share, second.reset) == (0.5, 0.5, ("generator", "guidance"))
    assert second.turns[0].optimizer["student"].lr == pytest.approx(0.25e-3)
    head = {name: value.clone() for name, value in method.head.state_dict().items()}
    trained(method, context, 6)
    assert any(not torch.equal(value, head[name]) for name, value in method.head.state_dict().items())
    method, context = made(gan_start=0.99)
    method.stages()[0].turns[1].loss(batch(NoData()))  # the first stage draws no data


def test_fastgens_variant_reads_the_teachers_features() -> None:
    method, _ = made(gan_features="teacher")
    only(method, method.guide)
    method.guidance_loss(True, batch())["discriminator"].backward()
    assert not gradients(method.fake)
    assert any(g.abs().max() > 0 for g in gradients(method.head))


def test_the_gan_alone_asks_the_teacher_nothing() -> None:
    method, context = made(lambda_dm=0.0)
    asked: list[None] = []
    handle = context.teacher.network.register_forward_pre_hook(lambda *_: asked.append(None))
    assert set(method.generator_loss(True, batch())) == {"gan"}
    handle.remove()
    assert not asked


@pytest.mark.parametrize("steps", [1, 4])
def test_the_student_survives_its_folder(steps: int, tmp_path: Path) -> None:
    method, context = made(steps, shift=2.0)
    trained(method, context, 2)
    student = method.distilled()
    conditions, seeds = MIXTURE.conditions(torch.arange(8)), list(range(8))
    before = student.generate(conditions, steps=steps, seeds=seeds)
    student.save(tmp_path)
    after = FewStepStudent.load(tmp_path).generate(conditions, steps=steps, seeds=seeds)
    assert torch.equal(before.x, after.x)
    assert (before.evaluations, student.steps) == (steps, (steps,))


def test_a_run_is_the_same_twice_and_another_with_another_seed() -> None:
    students = []
    for seed in (0, 0, 1):
        method, context = made(2, seed=seed)
        trained(method, context, 2)
        students.append(method.student)
    assert difference(students[0], students[1]) == 0
    assert difference(students[0], students[2]) > 0


def test_on_maps_the_convolutional_head_trains() -> None:
    config = TransformerConfig(channels=1, size=8, patch=2, width=16, depth=2, heads=2, classes=8)
    network = Transformer(config, torch.Generator().manual_seed(0))

    class Images(MixtureSource):
        def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
            return torch.randn(n, 1, 8, 8, generator=generator), self.conditions(n, generator)

    context = Context(teacher=external(Denoiser(network, Flow(), "velocity")), shape=(1, 8, 8), steps=(1,))
    method = DMD2(DMD2.Config(fake_per_gen=2))
    method.build(context)
    assert isinstance(method.head, critics.MapHead)
    loop = Loop(method, context, Images(MIXTURE), Budget("toy", 2, "steps"), unit=1, batch_size=4)
    loop.train()
    assert loop.position.counts["guidance"] == 4
