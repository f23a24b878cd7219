"""SANA-Sprint on a toy: both losses from the batch's own draws, where gradients go, misaligned pairs, guidance, resume, the student."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Batch, Conditions, Context, external
from distillbench.budget import Budget
from distillbench.config import make_config
from distillbench.data.mixture import MixtureSource, standard_mixture
from distillbench.diffusion import Denoiser, Flow, Trig
from distillbench.discovery import find
from distillbench.errors import ContractError, UsageError
from distillbench.networks import Sana
from distillbench.networks.diffusers_tools import import_diffusers
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.networks.transformer import Transformer, TransformerConfig
from distillbench.parts.critics import Spectral, hinge_discriminator_loss
from distillbench.parts.student import FewStepStudent
from distillbench.parts.trigflow import HALF_PI, consistency_terms, lognormal_angles
from distillbench.randomness import generator_for, sample_noise
from distillbench.training import state
from distillbench.training.loop import Loop
from distillbench.training.meter import Meter
from distillbench_methods.sana_sprint import SanaSprint, differs
from distillbench_methods.scm import ContinuousConsistency
from toy_pipelines import CROSS, SANA

SOURCE = MixtureSource(standard_mixture())
SIZE = 32


class Stop(Exception):
    """What ends a training in the middle."""


class Pictures:
    """8x8 noise under ten labels."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        return torch.randn(n, 1, 8, 8, generator=generator), self.conditions(n, generator)

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return Conditions({"label": torch.randint(10, (n,), generator=generator)}, {"label": 10})


def toy_teacher(kind: str = "mlp") -> Denoiser:
    generator = torch.Generator().manual_seed(9)
    network = MLP(MLPConfig(width=16, depth=3), generator) if kind == "mlp" else \
        Transformer(TransformerConfig(size=8, patch=4, width=16, depth=4, heads=2), generator)  # fmt: skip
    return external(Denoiser(network, Flow(), "velocity"))


def made(*, guidance: float = 1.0, kind: str = "mlp", **knobs: Any) -> tuple[SanaSprint, Context]:
    shape = (2,) if kind == "mlp" else (1, 8, 8)
    context = Context(teacher=toy_teacher(kind), shape=shape, steps=(1, 2, 4), seed=0, guidance=guidance)
    method = SanaSprint(make_config(SanaSprint.Config, "sana_sprint", {"lr": 1e-3, **knobs}))
    method.build(context)
    return method, context


def batch(progress: float = 1.0, size: int = SIZE, source: Any = SOURCE) -> Batch:
    return Batch(size=size, count=0, progress=progress, source=source, generator=generator_for(0, "t", 0))


def trained(method: SanaSprint, context: Context, cycles: int, source: Any = SOURCE, **options: Any) -> Loop:
    loop = Loop(method, context, source, Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, **options)
    loop.train()
    return loop


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def shaken(method: SanaSprint) -> SanaSprint:
    with torch.no_grad():
        for i, p in enumerate(method.student.parameters()):
            p.add_(0.03 * math.cos(i))
    return method


def test_the_card_is_read_from_the_source_alone() -> None:
    assert find(Path(__import__("distillbench_methods.sana_sprint", fromlist=["x"]).__file__).as_posix()).info == SanaSprint.info


def test_the_claims_name_knobs_that_exist_and_few_ablations() -> None:
    changed = set()
    for claim in SanaSprint.info.claims:
        for side in (claim.better, claim.worse):
            settings = dict(item.split("=") for item in side.removeprefix("sana_sprint").strip("()").split(",") if "=" in item)
            make_config(SanaSprint.Config, "sana_sprint", settings)
            assert settings or side in ("sana_sprint", "teacher")
            changed |= {side} if settings else set()
    assert len(changed) <= 5
    for search in SanaSprint.info.tunes:
        for value in (search.low, search.high):
            make_config(SanaSprint.Config, "sana_sprint", {search.knob: value})


# ---------------------------------------------------------------- the losses


def test_the_students_loss_is_the_sum_of_both_on_the_batchs_own_draws() -> None:
    method = shaken(made(adv_lambda=0.3)[0])
    losses = method.student_loss(batch(0.1))
    again, d = batch(0.1), 0.5
    x, conditions = again.data()
    t = lognormal_angles(again.randn(SIZE), 0.0, 1.6, d)
    x_t = (d * (t.cos()[:, None] * x + t.sin()[:, None] * again.randn(SIZE, 2))).float()
    w = torch.tensor([8 / 9, 1, 10 / 9], dtype=torch.float64)[again.choice(3, SIZE)]
    expected = consistency_terms(method.flow, method.student, method.teacher, x_t, t, conditions, r=0.5, prior=True, guidance_scale=w,
                                 guidance=w)  # fmt: skip
    pure = again.rand(SIZE) < 0.5
    late = torch.where(pure, HALF_PI, lognormal_angles(again.randn(SIZE), 0.0, 1.6, d))
    noise = again.randn(SIZE, 2)
    assert 5 < int(pure.sum()) < SIZE - 5
    told = torch.tensor([8 / 9, 1, 10 / 9], dtype=torch.float64)[again.choice(3, SIZE)]
    made_x = method.student.x0(
        (late.cos()[:, None] * x + late.sin()[:, None] * noise).float(), late / HALF_PI, conditions, guidance=told
    )  # fmt: skip
    s = lognormal_angles(again.randn(SIZE), -0.6, 1.0, d)
    x_s = (s.cos()[:, None] * made_x + s.sin()[:, None] * again.randn(SIZE, 2)).float()
    features = method.teacher.features(x_s, s / HALF_PI, conditions, ("hidden1", "hidden2", "hidden3"))
    logits = torch.cat([head(h) for head, h in zip(method.heads, features.values(), strict=True)], 1)
    assert losses["adversarial"].item() == pytest.approx(-0.3 * logits.mean().item(), rel=1e-4, abs=1e-6)
    assert losses["consistency"].item() == pytest.approx(expected["consistency"].item(), rel=1e-4)
    assert set(losses) == {"consistency", "log variance", "adversarial"}


def test_the_discriminator_sees_real_fake_and_misaligned_samples_each_at_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    method = shaken(made()[0])
    seen: list[tuple[Tensor, Conditions, Tensor]] = []

    def logits(drawn: Batch, x: Tensor, conditions: Conditions) -> Tensor:
        noise = drawn.randn(SIZE)
        seen.append((x, conditions, noise))
        return noise[:, None].expand(-1, 3)

    monkeypatch.setattr(method, "logits", logits)
    loss = method.discriminator_loss(batch())
    x, conditions = batch().data()
    (real, _, a), (fake, _, b), (wrong, labels, c) = seen
    assert torch.equal(real, x)
    assert torch.equal(wrong, x.roll(1, 0))
    assert not fake.requires_grad
    assert torch.equal(labels.field("label"), conditions.field("label"))
    other = conditions.field("label") != conditions.field("label").roll(1, 0)
    assert 0 < int((~other).sum()) < SIZE
    expected = hinge_discriminator_loss(a, torch.cat([b, c[other]]))
    torch.testing.assert_close(loss, expected)
    seen.clear()
    plain = made(misaligned=False)[0]
    monkeypatch.setattr(plain, "logits", logits)
    torch.testing.assert_close(plain.discriminator_loss(batch()), hinge_discriminator_loss(a, b))


def test_conditions_of_any_kind_are_compared_with_the_row_before() -> None:
    tokens = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [1.0, 2.0]])
    assert differs(Conditions({"tokens": tokens}), 1).tolist() == [0, 0, 1, 1]
    assert differs(Conditions({"tokens": tokens, "prompt": ["a", "b", "b", "b"]}), 1).tolist() == [1, 1, 1, 1]
    assert differs(Conditions.none(3), 1).tolist() == [0, 0, 0]


def test_without_conditions_nothing_is_misaligned() -> None:
    class Plain:
        def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
            return torch.randn(n, 2, generator=generator), Conditions.none(n)

    loss = made(cfg_embed=False)[0].discriminator_loss(batch(source=Plain()))
    assert 0.5 < loss.item() < 1.5


def test_the_gans_gradient_reaches_the_student_through_frozen_teacher_and_heads() -> None:
    method = shaken(made(losses="ladd")[0])
    for module in (method.teacher, method.heads):
        module.requires_grad_(False)
    loss = method.student_loss(batch())
    assert list(loss) == ["adversarial"]
    loss["adversarial"].backward()
    for p in method.student.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
    assert sum(p.grad.abs().sum() for p in method.student.parameters()) > 0


def test_an_untrained_discriminator_costs_about_one_and_learns() -> None:
    method, context = made(losses="ladd", lr=0.0, d_lr=1e-2, decay="constant", max_time_prob=1.0, misaligned=False, d_mean=-2.0)
    before = method.discriminator_loss(batch(size=512)).item()
    trained(method, context, 60)
    after = method.discriminator_loss(batch(size=512)).item()
    assert before == pytest.approx(1.0, abs=0.2)
    assert after < before - 0.1


def test_the_share_of_pure_noise_is_the_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (0.0, 0.5, 1.0):
        method = made(max_time_prob=share)[0]
        times: list[Tensor] = []
        clean = type(method.flow).clean

        def kept(flow: Any, denoiser: Any, x_t: Any, t: Tensor, *rest: Any, times: list = times, clean: Any = clean, **o: Any) -> Tensor:
            times.append(t)
            return clean(flow, denoiser, x_t, t, *rest, **o)

        with monkeypatch.context() as patch:
            patch.setattr(type(method.flow), "clean", kept)
            method.generate(batch(size=400), *batch(size=400).data())
        assert (times[0] == HALF_PI).double().mean().item() == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_the_first_denoising_is_the_teachers_whatever_the_scale(kind: str) -> None:
    method, _ = made(kind=kind)
    source = SOURCE if kind == "mlp" else Pictures()
    x, conditions = source.draw(4, generator_for(0, "x", 0))
    same = toy_teacher(kind).on(Trig()).x0(x, 0.4, conditions)
    told = method.flow.clean(method.student, 0.5 * x, 0.4 * HALF_PI, conditions, guidance=1.5)
    torch.testing.assert_close(told, same, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- guidance


def test_the_scales_stand_around_the_tracks_and_teacher_and_student_hear_the_same() -> None:
    method = made(guidance=4.5)[0]
    told, scale = method.guide(batch(size=300))
    assert told is scale
    assert isinstance(told, Tensor)
    torch.testing.assert_close(told.unique(), torch.tensor([4.0, 4.5, 5.0], dtype=torch.float64), rtol=1e-12, atol=0)
    fixed = made(guidance=4.5, cfg_embed=False)[0]
    assert fixed.guide(batch()) == (None, 4.5)
    assert fixed.distilled().guidance_input is None
    assert made(cfg_embed=False)[0].guide(batch()) == (None, 1.0)


def test_the_student_learns_to_heed_the_scale() -> None:
    method, context = made(guidance=2.0, scales="0.5,1,2")
    trained(method, context, 30)
    student = method.distilled()
    conditions = SOURCE.conditions(SIZE, generator_for(0, "x", 0))
    default, same, other = (student.generate(conditions, steps=2, seeds=range(SIZE), guidance=s).x for s in (None, 2.0, 4.0))
    assert torch.equal(default, same)
    assert not torch.allclose(default, other)
    with pytest.raises(ContractError, match="takes no guidance scale"):
        made(cfg_embed=False)[0].distilled().generate(conditions, steps=1, seeds=range(SIZE), guidance=2.0)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_a_short_training_moves_student_average_and_heads_and_nothing_else(kind: str) -> None:
    method, context = made(kind=kind)
    start, heads, teacher = weights(method.student), weights(method.heads), weights(method.teacher)
    loop = trained(method, context, 6, SOURCE if kind == "mlp" else Pictures())
    assert loop.spent.updates == 12
    for module in (method.student, method.average):
        assert not torch.equal(weights(module), start)
    assert not torch.equal(weights(method.heads), heads)
    assert torch.equal(weights(method.teacher), teacher)
    assert not any(name.startswith("teacher") for name in state.tensors_of(method))
    for layer in method.heads.modules():
        if isinstance(layer, Spectral):
            norm = torch.linalg.matrix_norm(layer.normalised().detach().flatten(1), ord=2)
            assert norm.item() == pytest.approx(1.0, abs=0.05)


def test_heads_are_as_wide_as_asked_and_read_the_blocks_that_are_named() -> None:
    assert [head.first.weight.shape[:2] for head in made(kind="transformer")[0].heads] == [(4, 16)] * 4
    named = made(kind="transformer", taps="block2,block4", head_width=16)[0]
    assert named.taps == ("block2", "block4")
    assert [tuple(head.first.weight.shape) for head in named.heads] == [(16, 16, 1)] * 2
    assert made(heads=1)[0].taps == ("hidden3",)
    with pytest.raises(ContractError, match="no tap 'block9'"):
        made(taps="block9")


@pytest.mark.parametrize(
    "knobs",
    [
        {"losses": "scm", "decay": "constant"},
        {"losses": "ladd", "max_time_prob": 0},
        {"cfg_embed": False, "misaligned": False, "jvp": "fd", "half_life": 0},
        {"adaptive_weight": False, "warmup_r": 0.0, "clip": None, "batch_size": 17, "grid": "1.5,0.9", "scales": "1,2"},
    ],
    ids=str,
)
def test_every_variant_trains_and_samples(knobs: dict[str, Any]) -> None:
    method, context = made(guidance=2.0, **knobs)
    before = weights(method.student)
    trained(method, context, 4)
    assert not torch.equal(weights(method.student), before)
    assert len(method.heads) == (0 if knobs.get("losses") == "scm" else 3)
    conditions = SOURCE.conditions(3, generator_for(0, "x", 0))
    for steps in (1, 2, 4):
        samples = method.distilled().generate(conditions, steps=steps, seeds=[0, 1, 2])
        assert samples.evaluations == steps
        assert bool(samples.x.isfinite().all())


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole, context = made()
    expected = trained(whole, context, 10)

    def stop_at_five(progress: Any) -> None:
        if progress.spent.cycles == 5:
            raise Stop

    first, context = made()
    with pytest.raises(Stop):
        trained(first, context, 10, folder=tmp_path, checkpoint_seconds=0, report=stop_at_five)
    second, context = made()
    resumed = trained(second, context, 10, folder=tmp_path)
    assert resumed.spent.macs == expected.spent.macs
    ours, theirs = state.tensors_of(second), state.tensors_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Captions:
    """Latents under random prompt embeddings."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        return torch.randn(n, 4, 8, 8, generator=generator), self.conditions(n, generator)

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        mask = torch.ones(5, dtype=torch.int64)
        tokens = torch.randn(n, 5, CROSS, generator=generator)
        return Conditions({"tokens": tokens, "mask": mask.expand(n, 5)}, {"tokens": torch.zeros(5, CROSS), "mask": mask})


@pytest.mark.parametrize("method_class", [SanaSprint, ContinuousConsistency], ids=lambda c: c.info.id)
def test_a_sana_transformer_of_diffusers_is_distilled_and_priced_exactly(method_class: type[Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Sana.from_model(import_diffusers().SanaTransformer2DModel(**SANA))
    teacher = external(Denoiser(network, Flow(), "velocity"))
    spent = []
    for exact in (False, True):
        method = method_class(method_class.Config())
        context = Context(teacher=teacher, shape=(4, 8, 8), steps=(1, 2, 4), guidance=3.0)
        method.build(context)
        before = weights(method.student)
        loop = Loop(method, context, Captions(), Budget("toy", 2, "steps"), unit=1, batch_size=4, meter=Meter(exact=exact))
        loop.train()
        spent.append(loop.spent.macs)
    assert spent[0] == spent[1] > 0
    assert not torch.equal(weights(method.student), before)
    x = method.distilled().generate(Captions().conditions(2, torch.Generator()), steps=2, seeds=[0, 1]).x
    assert x.isfinite().all()


# ---------------------------------------------------------------- the student


def test_sampling_is_the_papers_alternation_in_its_own_units() -> None:
    method = shaken(made(half_life=0)[0])
    with torch.no_grad():
        method.average.load_state_dict(method.student.state_dict())
    conditions = SOURCE.conditions(6, generator_for(0, "x", 0))
    d, flow, f = 0.5, method.flow, method.average
    noise = [d * sample_noise(range(6), (2,), draw) for draw in range(4)]
    with torch.no_grad():
        one = d * flow.clean(f, noise[0], HALF_PI, conditions, guidance=1.0)
        two = d * flow.clean(f, math.cos(1.3) * one + math.sin(1.3) * noise[1], 1.3, conditions, guidance=1.0)
        four = one
        for angle, fresh in zip((1.3, 1.1, 0.6), noise[1:], strict=True):
            four = d * flow.clean(f, math.cos(angle) * four + math.sin(angle) * fresh, angle, conditions, guidance=1.0)
    student = method.distilled()
    assert student.denoiser.path == Trig()
    for steps, expected in ((1, one), (2, two), (4, four)):
        x = student.generate(conditions, steps=steps, seeds=range(6)).x
        torch.testing.assert_close(x, expected / d, rtol=1e-5, atol=1e-5)


def test_the_student_survives_its_folder_bit_for_bit(tmp_path: Path) -> None:
    method, context = made(guidance=1.5)
    trained(method, context, 3)
    student = method.distilled()
    student.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = FewStepStudent.load(tmp_path)
    conditions = SOURCE.conditions(6, generator_for(0, "x", 0))
    assert (loaded.steps, loaded.grids, loaded.guidance_input) == ((1, 2, 4), student.grids, 1.5)
    for steps in (1, 2, 4):
        assert torch.equal(*(each.generate(conditions, steps=steps, seeds=range(6)).x for each in (student, loaded)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"losses": "gan"}, "unknown value of knob losses"),
        ({"d_betas": "0.9"}, "betas and d_betas are two numbers"),
        ({"scales": ""}, "scales are empty"),
        ({"grid": "0.5,1.0"}, "fall strictly"),
        ({"max_time_prob": 1.5}, "it goes from 0 to 1"),
        ({"heads": 0}, "it goes from 1"),
    ],
    ids=str,
)
def test_wrong_knobs_are_refused_in_one_line(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        made(**knobs)
    assert "\n" not in str(caught.value)
