"""f-distill's ratio: the law of its noise levels, the averages of its bins in training, and the gradient with an exact ratio."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distillbench.api import Batch, Context, external
from distillbench.budget import Budget
from distillbench.data.mixture import Mixture, MixtureSource, exact_denoiser, standard_mixture
from distillbench.diffusion import Denoiser
from distillbench.diffusion.schedules import EDM, Flow, VPCosine
from distillbench.diffusion.solvers import jump
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts.distribution_matching import matching_gradient
from distillbench.parts.divergences import DIVERGENCES, density_ratio, matching_weights
from distillbench.randomness import generator_for
from distillbench.training.loop import Loop
from distillbench.training.state import tensors_of
from distillbench_methods.f_distill import FDistill

MIXTURE = standard_mixture()
SIZE = 16


def made(*, schedule: Any = None, track_batch: int = 256, **knobs: Any) -> tuple[FDistill, Context]:
    network = MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(9))
    teacher = external(Denoiser(network, schedule or Flow(), "velocity" if schedule is None else "eps"))
    context = Context(teacher=teacher, shape=(2,), steps=(1,), batch_size=track_batch)
    method = FDistill(FDistill.Config(**{"lr": 1e-3, **knobs}))
    method.build(context)
    return method, context


def batch(size: int = SIZE) -> Batch:
    return Batch(size=size, count=0, progress=0.0, source=MixtureSource(MIXTURE), generator=generator_for(0, "t", 0))


def toy_loop(method: FDistill, context: Context, cycles: int, **options: Any) -> Loop:
    return Loop(method, context, MixtureSource(MIXTURE), Budget("toy", cycles, "steps"), unit=1, batch_size=SIZE, **options)


@pytest.mark.parametrize("name", ["js", "kl"])
def test_exact_scores_and_ratio_drive_a_mixture_down_its_own_divergence(name: str) -> None:
    """d D_f / d shift of a shifted student, by the weighted gradient and by differences of the exact divergence."""
    t, n = 0.3, 10_000
    data = Mixture(MIXTURE.means[:1], MIXTURE.covariances[:1] * 4, MIXTURE.weights[:1])
    generator = torch.Generator().manual_seed(0)
    x, conditions = data.sample(n, generator)
    eps = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    labels, direction = conditions.field("label"), torch.tensor([1.0, 0.0], dtype=torch.float64)

    def student(shift: float) -> Mixture:
        return Mixture(data.means + shift * direction, data.covariances, data.weights)

    def log_ratio(shift: float) -> tuple[Tensor, Tensor]:
        x_t = jump(Flow(), x + shift * direction, eps, torch.full((n,), t, dtype=torch.float64))
        density = [mixture._terms(x_t, 1 - t, t, labels)[1].squeeze(1).logsumexp(1) for mixture in (data, student(shift))]
        return x_t, density[0] - density[1]

    shift, step = 0.4, 1e-3
    x_t, logit = log_ratio(shift)
    time = torch.full((n,), t, dtype=torch.float64)
    real, fake = (exact_denoiser(m, Flow()).x0(x_t, time, conditions) for m in (data, student(shift)))
    gap = matching_gradient(x, real, fake, Flow(), time, weighting="sigma/alpha")  # s_q - s_p = alpha / sigma^2 (fake - real)
    h = DIVERGENCES[name].h(logit.exp())
    per_sample = h * (gap / t)[:, 0] * (1 - t)  # d x_t / d shift = alpha
    f = DIVERGENCES[name].f
    changes = (f(log_ratio(shift + step)[1].exp()) - f(log_ratio(shift - step)[1].exp())) / (2 * step)
    # Both are means over the student's samples; they differ sample by sample, so the difference of the means is noise of this size.
    difference = per_sample - changes
    assert abs(difference.mean().item()) < 4 * difference.std().item() / math.sqrt(n)
    assert per_sample.mean().item() > 20 * difference.std().item() / math.sqrt(n)


def test_levels_lie_in_their_law_and_bins_hold_a_tenth_each() -> None:
    n = 20_000
    for law, schedule in (("uniform", None), ("karras", None), ("karras", VPCosine())):
        method, _ = made(law=law, t_min=0.02, t_max=0.98, schedule=schedule)
        place, t = method.level(batch(size=n))
        assert 0 < t.min() < t.max() < 1
        assert t.dtype == torch.float64
        shares = torch.bincount((place * 10).long(), minlength=10) / n
        assert (shares - 0.1).abs().max() < 4 * math.sqrt(0.09 / n)
    method, _ = made(law="uniform", t_min=0.02, t_max=0.98)
    place, t = method.level(batch())
    torch.testing.assert_close(t, 0.02 + 0.96 * place)
    method, _ = made(law="karras", t_min=0.02, t_max=0.98, data_std=1.0)
    place, t = method.level(batch())
    edm = EDM().sigma(0.02 + 0.96 * place)  # for data of deviation 0.5
    torch.testing.assert_close(t / (1 - t), 2 * edm)


def test_a_history_is_kept_for_small_batches_only() -> None:
    for size, knobs, rho in (
        (256, {}, 0.0),
        (64, {}, 0.9),
        (256, {"batch_size": 128}, 0.9),
        (64, {"rho": 0.5}, 0.5),
        (64, {"rho": 0}, 0.0),
    ):
        method, _ = made(track_batch=size, **knobs)
        assert method.bins.rho == rho
        turn = method.stages()[0].turns[0]
        assert ("bins" in turn.updates) == (rho > 0)
        if rho:
            assert turn.optimizer["bins"].lr == pytest.approx(1 - rho)
    for knobs in ({"bins": 0}, {"divergence": "rkl"}):
        assert set(made(track_batch=64, **knobs)[0].stages()[0].turns[0].updates) == {"student"}


def test_the_bins_follow_the_papers_recursion_in_training() -> None:
    method, context = made(rho=0.5, bins=4, fake_per_gen=1)
    inner, kept = method.weights, [torch.ones(4)]

    def spy(logits: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        ratio, index = density_ratio(logits), (place * 4).long().clamp(0, 3)
        mine = kept[-1].clone()
        for i in range(4):
            if (index == i).any():
                mine[i] = 0.5 * mine[i] + 0.5 * ratio[index == i].mean()
        weights, loss = inner(logits, place)
        torch.testing.assert_close(weights, matching_weights("js", ratio / mine[index]), rtol=1e-4, atol=1e-5)
        spied.append(mine)
        return weights, loss

    spied: list[Tensor] = []
    method.weights = spy
    loop = toy_loop(method, context, 3)
    inner_update = loop._update

    def after(turn: Any, group: Any, progress: float) -> None:
        inner_update(turn, group, progress)
        if group.parameters[0] is method.bins.averages:
            torch.testing.assert_close(method.bins.averages.detach(), spied[-1], rtol=1e-5, atol=1e-6)
            kept.append(spied[-1])

    loop._update = after  # type: ignore[method-assign]
    loop.train()
    assert len(kept) == 4
    assert (kept[-1] - 1).abs().max() > 1e-2


def test_a_training_in_two_parts_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole, context = made(rho=0.9)
    toy_loop(whole, context, 4, folder=tmp_path / "a").train()

    class Stopped(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.spent.cycles == 2:
            raise Stopped

    first, again = made(rho=0.9)
    loop = toy_loop(first, again, 4, folder=tmp_path / "b", report=stop)
    with pytest.raises(Stopped):
        loop.train()
    loop._save()
    second, again = made(rho=0.9)
    toy_loop(second, again, 4, folder=tmp_path / "b").train()
    one, two = tensors_of(whole), tensors_of(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (one["bins.averages"] != 1).any()
