"""The mixture is what its docstring says, and its denoiser is the posterior mean that numerical integration finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from distillbench.conditions import Conditions
from distillbench.data.mixture import ExactMixture, Mixture, MixtureSource, exact_denoiser, standard_mixture
from distillbench.diffusion import EDM, Flow, Schedule, Trig, VPCosine, VPLinear
from distillbench.errors import ContractError

SCHEDULES = [(Flow(), 0.1), (Flow(), 0.6), (Flow(shift=3.0), 0.3), (Trig(), 0.3), (VPLinear(), 0.2), (VPCosine(), 0.5), (EDM(), 0.4)]
NULL = 8


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return standard_mixture()


def log_density(mixture: Mixture, x: Tensor, label: int, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
    """log p(x_t | label) by torch.distributions, mode by mode; not by the code under test."""
    covariances = alpha**2 * mixture.covariances + sigma**2 * torch.eye(2, dtype=torch.float64)
    classes = range(8) if label == NULL else [label]
    terms = [
        MultivariateNormal(alpha * mixture.means[c, m], covariances[c, m]).log_prob(x)
        + mixture.weights[c, m].log()
        - math.log(len(classes))
        for c in classes
        for m in range(4)
    ]
    return torch.stack(terms).logsumexp(0)


def points(mixture: Mixture, schedule: Schedule, t: float, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x0, _ = mixture.sample(n, generator)
    return schedule.alpha(t) * x0 + schedule.sigma(t) * torch.randn(n, 2, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def plane(mixture: Mixture) -> tuple[Tensor, dict[int, Tensor]]:
    axis = torch.arange(-3.2, 3.2, 0.0125, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    return grid, {label: log_density(mixture, grid, label) for label in (0, 3, 6, NULL)}


@pytest.mark.parametrize(("schedule", "t"), SCHEDULES)
def test_denoiser_is_the_posterior_mean(mixture, plane, schedule, t):
    grid, densities = plane
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    labels = torch.tensor([0, 3, 6, NULL])
    x = points(mixture, schedule, t, len(labels))
    found = exact_denoiser(mixture, schedule).x0(x, t, mixture.conditions(labels))
    for row, label in enumerate(labels.tolist()):
        weight = (densities[label] - ((x[row] - alpha * grid) ** 2).sum(1) / (2 * sigma**2)).softmax(0)
        torch.testing.assert_close(found[row], (weight[:, None] * grid).sum(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("schedule", "t"), SCHEDULES)
@pytest.mark.parametrize("label", [2, NULL])
def test_score_is_the_gradient_of_the_log_density(mixture, schedule, t, label):
    x = points(mixture, schedule, t, 64).requires_grad_()
    log_density(mixture, x, label, float(schedule.alpha(t)), float(schedule.sigma(t))).sum().backward()
    found = exact_denoiser(mixture, schedule).score(x.detach(), t, mixture.conditions(torch.full((64,), label)))
    torch.testing.assert_close(found, x.grad, rtol=1e-8, atol=1e-8)


def test_unconditional_is_the_mixture_of_the_classes(mixture):
    x, t = points(mixture, Flow(), 0.3, 50), 0.3
    denoiser = exact_denoiser(mixture, Flow())
    share = torch.stack([log_density(mixture, x, c, 0.7, 0.3) for c in range(8)], 1).softmax(1)
    each = torch.stack([denoiser.x0(x, t, mixture.conditions(torch.full((50,), c))) for c in range(8)], 1)
    whole = denoiser.x0(x, t, mixture.conditions(torch.arange(50) % 8).null())
    torch.testing.assert_close(whole, (share[..., None] * each).sum(1), rtol=0, atol=1e-12)


def test_labelled_and_null_rows_do_not_mix(mixture):
    x, labels = points(mixture, Flow(), 0.5, 6), torch.tensor([1, NULL, 4, NULL, 0, 7])
    together = mixture.posterior_mean(x, 0.5, 0.5, labels)
    apart = torch.cat([mixture.posterior_mean(x[i : i + 1], 0.5, 0.5, labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-13)


def test_ends_of_time(mixture):
    x, labels = points(mixture, Flow(), 0.0, 9), torch.arange(9)
    torch.testing.assert_close(mixture.posterior_mean(x, 1.0, 0.0, labels), x)
    class_means = (mixture.weights[..., None] * mixture.means).sum(1)
    expected = torch.cat([class_means, class_means.mean(0, keepdim=True)])
    torch.testing.assert_close(mixture.posterior_mean(x, 0.0, 1.0, labels), expected)


def test_posteriors_agree_with_densities(mixture):
    x = points(mixture, Flow(), 0.0, 100)
    classes = torch.stack([log_density(mixture, x, c) for c in range(8)], 1)
    torch.testing.assert_close(mixture.class_posterior(x), classes.softmax(1), rtol=1e-9, atol=1e-12)
    labels = torch.arange(100) % 8
    modes = mixture.log_joint(x)[torch.arange(100), labels]
    torch.testing.assert_close(modes.logsumexp(1), classes[torch.arange(100), labels], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixture.responsibilities(x, labels), modes.softmax(1))


def test_standardised(mixture):
    share = (mixture.weights / 8)[..., None]
    mean = (share * mixture.means).sum((0, 1))
    variance = (share * (mixture.means**2 + mixture.covariances.diagonal(dim1=-2, dim2=-1))).sum((0, 1)) - mean**2
    torch.testing.assert_close(mean, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(variance, torch.ones(2, dtype=torch.float64))
    x, _ = mixture.sample(100_000, torch.Generator().manual_seed(0))
    assert x.mean(0).abs().max() < 0.015
    assert (x.std(0) - 1).abs().max() < 0.01


def test_uneven_weights_and_anisotropic_covariances(mixture):
    assert (mixture.weights.amax(1) / mixture.weights.amin(1)).min() > 10
    torch.testing.assert_close(mixture.weights.sum(1), torch.ones(8, dtype=torch.float64))
    values = torch.linalg.eigvalsh(mixture.covariances)
    assert (values[..., 1] / values[..., 0]).min() > 1.3**2 / 2
    assert values.min() > 0.03**2
    flat = mixture.covariances.flatten(0, 1).flatten(1)
    assert (torch.cdist(flat, flat) + torch.eye(32)).min() > 1e-4


def test_modes_of_a_class_are_apart(mixture):
    for c in range(8):
        squares = mixture.mahalanobis(mixture.means[c])[:, c] + 100 * torch.eye(4)
        assert squares.min() > 16  # no centre lies within 4 sigma of another mode of its class


@pytest.mark.parametrize(
    "turned", [[[-1, 0], [0, 1]], [[1, 0], [0, -1]], [[-1, 0], [0, -1]], [[0, 1], [1, 0]], [[0, 1], [-1, 0]], [[0, -1], [-1, 0]]]
)
def test_no_symmetry(mixture, turned):
    """Mirrored, swapped or turned, no class falls on itself or on another."""
    moved = mixture.means @ torch.tensor(turned, dtype=torch.float64)
    apart = torch.cdist(moved[:, None], mixture.means[None]).amin(-1).amax(-1)  # of every class from every class
    assert apart.min() > 0.3


def test_samples_follow_weights_and_covariances(mixture):
    n = 40_000
    labels = torch.full((n,), 5)
    x, conditions = mixture.sample(n, torch.Generator().manual_seed(1), labels)
    assert torch.equal(conditions.field("label"), labels)
    modes = mixture.responsibilities(x, labels).argmax(1)
    for m in range(4):
        members = x[modes == m]
        weight = mixture.weights[5, m]
        assert abs(len(members) / n - weight) < 5 * math.sqrt(weight / n)
        assert (members.mean(0) - mixture.means[5, m]).abs().max() < 0.02
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(mixture.covariances[5, m]), members.T - members.mean(0)[:, None], upper=False
        )
        assert (white @ white.T / len(members) - torch.eye(2)).abs().max() < 0.12


def test_source_draws_depend_on_the_generator_alone(mixture):
    source = MixtureSource(mixture)
    x, conditions = source.draw(4096, torch.Generator().manual_seed(3))
    again, _ = source.draw(4096, torch.Generator().manual_seed(3))
    assert x.dtype == torch.float32
    assert torch.equal(x, again)
    for labels in (conditions.field("label"), source.conditions(4096, torch.Generator().manual_seed(4)).field("label")):
        assert (labels.bincount(minlength=8) / 4096 - 1 / 8).abs().max() < 0.03
    assert mixture.class_posterior(x)[torch.arange(4096), conditions.field("label")].mean() > 0.9


def test_forward_derivatives_pass(mixture):
    x = points(mixture, Flow(), 0.4, 5)
    network = ExactMixture(mixture, Flow())
    conditions, t = mixture.conditions(torch.tensor([0, 1, 2, 3, NULL])), torch.full((5,), 0.4, dtype=torch.float64)

    def along(step: Tensor) -> Tensor:
        return network(x + step, t, conditions).prediction

    direction = torch.ones_like(x)
    _, tangent = torch.func.jvp(along, (torch.zeros_like(x),), (direction,))
    difference = (along(1e-6 * direction) - along(-1e-6 * direction)) / 2e-6
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)


def test_guidance_pushes_away_from_the_other_classes(mixture):
    denoiser, x = exact_denoiser(mixture, Flow()), points(mixture, Flow(), 0.5, 8)
    conditions = mixture.conditions(torch.arange(8))
    plain, none = denoiser.x0(x, 0.5, conditions), denoiser.x0(x, 0.5, conditions.null())
    torch.testing.assert_close(denoiser.x0(x, 0.5, conditions, guidance_scale=2.0), 2 * plain - none)


def test_refuses_what_it_has_not(mixture):
    network = ExactMixture(mixture, Flow())
    with pytest.raises(ContractError, match="no second time"):
        network(torch.zeros(1, 2), torch.zeros(1), Conditions({"label": torch.tensor([0])}), taps=("hidden1",))


def test_the_numbers_of_version_1(mixture):
    """Another checksum is another mixture: it needs another version of the track, and another teacher."""
    assert mixture.sha256 == "f9c442b23379c81e1acc17fbcaa124f12e9540186855e1bf6695d1cd0b4f3dee"
