"""GAN losses against their closed forms, and heads on every shape of features."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from distillbench.conditions import Conditions
from distillbench.diffusion import Denoiser, Flow
from distillbench.errors import ContractError
from distillbench.networks.transformer import Transformer, TransformerConfig
from distillbench.parts.critics import (
    MapHead,
    Spectral,
    TokenHead,
    VectorHead,
    VirtualBatchNorm,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    make_head,
    refresh_spectral,
    spread_taps,
    token_logits,
)


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


# ---------------------------------------------------------------- token heads and hinge losses


def spectral_layers(head: torch.nn.Module) -> list[Spectral]:
    return [layer for layer in head.modules() if isinstance(layer, Spectral)]


def largest_singular_value(layer: Spectral) -> float:
    return torch.linalg.matrix_norm(layer.normalised().detach().flatten(1).double(), ord=2).item()


@pytest.mark.parametrize("shape", [(16,), (8, 7, 7), (12, 2, 2), (6, 1, 1), (3, 9, 5)], ids=str)
def test_a_token_head_gives_every_token_a_logit(shape: tuple[int, ...]) -> None:
    head = TokenHead(shape, 6, torch.Generator().manual_seed(2))
    features = torch.randn(16, *shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out = head(features)
    assert out.shape == (16, math.prod(shape[1:]))
    assert out.std() > 0
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
    assert features.grad.abs().sum() > 0


def test_every_layer_of_a_head_has_spectral_norm_one_and_keeps_it_while_it_is_trained() -> None:
    head = TokenHead((8, 4, 4), 8, torch.Generator().manual_seed(2))
    assert len(spectral_layers(head)) == 3
    features = torch.randn(16, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        head(features).square().mean().backward()
        optimizer.step()
        refresh_spectral(head)
    for layer in spectral_layers(head):
        assert largest_singular_value(layer) == pytest.approx(1.0, abs=0.02)


def test_only_refresh_moves_the_singular_vectors() -> None:
    head = TokenHead((8, 4, 4), 8, torch.Generator().manual_seed(2)).train()
    with torch.no_grad():
        for layer in spectral_layers(head):
            layer.weight.add_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)))
    before = [layer.u.clone() for layer in spectral_layers(head)]
    features = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(head(features), head(features))
    assert all(torch.equal(u, layer.u) for u, layer in zip(before, spectral_layers(head), strict=True))
    refresh_spectral(head)
    assert not torch.equal(before[0], spectral_layers(head)[0].u)


def test_the_gradient_sees_the_normalisation() -> None:
    """A weight that only grows changes nothing, so the gradient has no part along the weight itself."""
    layer = Spectral(4, 3, 1, torch.Generator().manual_seed(2)).double()
    layer.refresh(50)
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer(x).pow(3).sum().backward()
    grad = layer.weight.grad
    assert grad.norm() > 0.1
    assert (grad * layer.weight).sum().abs() < 1e-9 * grad.norm() * layer.weight.norm()


def test_a_circular_layer_does_not_know_where_the_tokens_begin() -> None:
    layer = Spectral(4, 3, 5, torch.Generator().manual_seed(2))
    x = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x.roll(2, 2)), layer(x).roll(2, 2))
    assert layer(x).shape == (2, 3, 9)


@pytest.mark.parametrize(("n", "group"), [(16, 8), (12, 6), (7, 7), (11, 1), (3, 3)])
def test_groups_of_the_batch_are_normalised_apart(n: int, group: int) -> None:
    norm = VirtualBatchNorm(5)
    x = 3 + 2 * torch.randn(n, 5, 10, generator=torch.Generator().manual_seed(3))
    out = norm(x).detach().view(n // group, group, 5, 10)
    torch.testing.assert_close(out.mean((1, 3)), torch.zeros(n // group, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std((1, 3), correction=0), torch.ones(n // group, 5), rtol=0, atol=1e-4)
    if group < n:  # another group has no say
        torch.testing.assert_close(norm(torch.cat([x[:group], 0 * x[group:]]))[:group], norm(x)[:group])


def test_taps_are_spread_as_in_the_paper() -> None:
    assert spread_taps([str(i) for i in range(20)]) == ("2", "8", "14", "19")
    assert spread_taps(["a", "b", "c"]) == ("a", "b", "c")
    assert spread_taps([str(i) for i in range(12)], 2) == ("1", "11")
    assert spread_taps([str(i) for i in range(12)], 1) == ("11",)


def test_the_logits_of_all_heads_stand_side_by_side() -> None:
    generator = torch.Generator().manual_seed(0)
    network = Transformer(TransformerConfig(size=8, patch=4, width=8, depth=3, heads=2), generator)
    denoiser, taps = Denoiser(network, Flow(), "velocity"), ("block1", "block3")
    heads = torch.nn.ModuleList(TokenHead(network.tap_shape(tap), 4, generator) for tap in taps)
    x, t, conditions = torch.randn(8, 1, 8, 8, generator=generator), torch.full((8,), 0.3), Conditions({"label": torch.arange(8)})
    out = token_logits(denoiser, heads, taps, x, t, conditions)
    features = denoiser.features(x, t, conditions, taps)
    assert out.shape == (8, 8)
    assert torch.equal(out, torch.cat([heads[0](features["block1"]), heads[1](features["block3"])], 1))


def test_hinge_losses_are_their_closed_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (2 * torch.randn(11, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = sum(max(0.0, 1 - r) for r in real.flatten().tolist()) + sum(max(0.0, 1 + f) for f in fake.flatten().tolist())
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(expected / 66, rel=1e-12)
    assert hinge_generator_loss(fake).item() == pytest.approx(-fake.mean().item(), rel=1e-12)
    zero = torch.zeros(4, 2)
    assert hinge_discriminator_loss(zero, zero).item() == 1.0
    assert hinge_discriminator_loss(zero + 1, zero - 1).item() == 0.0
    counts = torch.tensor([1.0] * 7 + [0.0] * 4)
    torch.testing.assert_close(hinge_discriminator_loss(real, fake, counts), hinge_discriminator_loss(real, fake[:7]))


def test_token_heads_refuse_features_of_another_rank() -> None:
    with pytest.raises(ContractError, match="channels"):
        TokenHead((3, 4), 4, torch.Generator())
