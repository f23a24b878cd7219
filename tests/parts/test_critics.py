"""GAN losses against their closed forms, and heads on every shape of features."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distillbench.errors import ContractError
from distillbench.parts.critics import MapHead, VectorHead, discriminator_loss, generator_loss, make_head


def test_a_head_that_knows_nothing_costs_two_and_one_bits() -> None:
    n = 7
    zero = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2), abs=1e-15)
    loss = generator_loss(zero)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    loss.backward()
    torch.testing.assert_close(zero.grad, torch.full_like(zero, -1 / (2 * n)))


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_best_logit_is_the_log_ratio_and_pushes_towards_the_real_mean(t: float) -> None:
    m_r, m_f, v, n = 0.5, -0.4, 0.2, 9
    alpha, sigma = 1 - t, t
    spread = alpha**2 * v + sigma**2
    y = torch.linspace(-2, 2, n, dtype=torch.float64)
    p_r, p_f = (torch.exp(-((y - alpha * m) ** 2) / (2 * spread)) for m in (m_r, m_f))
    best = alpha * (m_r - m_f) / spread * (y - alpha * (m_r + m_f) / 2)
    torch.testing.assert_close(best, p_r.log() - p_f.log(), rtol=1e-10, atol=1e-10)

    # Stationary: where real and fake points meet, the two halves of the loss weighted by their densities cancel.
    real, fake = best.clone().requires_grad_(), best.clone().requires_grad_()
    discriminator_loss(real, fake).backward()
    torch.testing.assert_close(p_r * real.grad + p_f * fake.grad, torch.zeros_like(y), rtol=0, atol=1e-12)
    assert (p_r * real.grad).abs().max() > 1e-3

    x = torch.linspace(-1, 1, n, dtype=torch.float64, requires_grad=True)
    noised = alpha * x + sigma * 0.3
    generator_loss(alpha * (m_r - m_f) / spread * (noised - alpha * (m_r + m_f) / 2)).backward()
    assert (x.grad.sign() == math.copysign(1, m_f - m_r)).all()  # descending moves x towards m_r


def test_the_losses_are_those_of_binary_classification() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = -F.logsigmoid(real).mean() - (1 - torch.sigmoid(fake)).log().mean()
    torch.testing.assert_close(discriminator_loss(real, fake), expected)


@pytest.mark.parametrize(
    "shape", [(16,), (8, 7, 7), (12, 4, 4), (6, 2, 2), (3, 9, 5), (80, 7, 7), (1, 8, 8), (4, 1, 1), (8, 1, 9), (16, 16, 16)], ids=str
)
def test_a_head_turns_features_of_any_shape_into_one_number_each(shape: tuple[int, ...]) -> None:
    head = make_head(shape, torch.Generator().manual_seed(2))
    features = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out = head(features)
    assert out.shape == (3,)
    assert out.std() > 0
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
    if len(shape) == 1 or shape[1:] != (1, 1):
        assert features.grad.abs().sum() > 0


def test_a_large_map_is_halved_until_four_by_four() -> None:
    kernels = [layer.kernel_size for layer in MapHead(8, 16, 16, torch.Generator()).layers if isinstance(layer, torch.nn.Conv2d)]
    assert kernels == [(4, 4), (4, 4), (4, 4), (1, 1)]


def test_initial_weights_come_from_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (make_head((8, 7, 7), torch.Generator().manual_seed(s)).state_dict() for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert isinstance(make_head((8,), torch.Generator()), VectorHead)


def test_features_of_another_rank_are_refused() -> None:
    with pytest.raises(ContractError, match="channels"):
        make_head((3, 4), torch.Generator())
