"""Distances in features: of directions, at one noise level, with a gradient to one side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distillbench.conditions import Conditions
from distillbench.diffusion import Denoiser
from distillbench.diffusion.schedules import Flow, VPCosine
from distillbench.networks import MLP, MLPConfig
from distillbench.parts.features import feature_distance, feature_loss


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 16), (7, 16, 3, 3)], ids=str)
def test_the_feature_distance_is_one_of_directions(shape: tuple[int, ...]) -> None:
    a, b = randn(*shape, seed=1), randn(*shape, seed=2)
    assert feature_distance(a, 3 * a).item() == pytest.approx(0, abs=1e-15)
    assert feature_distance(a, -2 * a).item() == pytest.approx(4)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
    assert feature_distance(a, b).item() == pytest.approx((2 - 2 * cosine).mean().item(), rel=1e-6)


def teacher(schedule: Flow | VPCosine) -> Denoiser:
    return Denoiser(MLP(MLPConfig(width=16, depth=3), torch.Generator().manual_seed(4)), schedule, "eps").requires_grad_(False)


@pytest.mark.parametrize("schedule", [Flow(), VPCosine()], ids=lambda s: s.name)
@pytest.mark.parametrize("t", [0.0, 0.3])
def test_both_batches_are_seen_under_the_same_noise_and_the_gradient_reaches_the_first(schedule: Flow | VPCosine, t: float) -> None:
    mine, other, noise = (randn(5, 2, seed=k).float() for k in range(3))
    conditions = Conditions({"label": torch.arange(5)}, {"label": 8})
    mine.requires_grad_()
    other.requires_grad_()
    denoiser = teacher(schedule)
    loss = feature_loss(denoiser, "hidden1", mine, other, noise, t, conditions)
    loss.backward()
    assert mine.grad is not None
    assert mine.grad.abs().max() > 0
    assert other.grad is None
    alpha, sigma = (float(v) for v in schedule.levels(t))
    seen = [denoiser.predict(alpha * x + sigma * noise, t, conditions, taps=("hidden1",)).features["hidden1"] for x in (mine, other)]
    assert loss.item() == pytest.approx(feature_distance(*seen).item(), rel=1e-5)
    assert feature_loss(denoiser, "hidden1", other, other, noise, t, conditions).item() == 0
