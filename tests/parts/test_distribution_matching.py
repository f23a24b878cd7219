"""The gradient of DMD and the fake-score loss, held against closed forms for Gaussians in float64.

Where everything is affine in (z, eps), the four points (+-1, +-1) have exactly the moments that matter: their mean is exact.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distillbench.conditions import Conditions
from distillbench.data.mixture import ExactMixture, standard_mixture
from distillbench.diffusion import Denoiser, broadcast
from distillbench.diffusion.base import Schedule
from distillbench.diffusion.schedules import EDM, Flow, Trig, VPCosine
from distillbench.errors import UsageError
from distillbench.networks.backbone import Output
from distillbench.parts.distribution_matching import (
    fake_score_loss,
    matching_gradient,
    matching_loss,
    noise_gradient,
    surrogate,
    weighted_noise_loss,
)

TIMES = (0.1, 0.5, 0.9)
Z = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
EPS = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
NOBODY = Conditions.none(4)


class Gaussian(nn.Module):
    """The posterior mean of N(mean, variance), and trainable."""

    def __init__(self, mean: float, variance: float, schedule: Schedule):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.variance, self.schedule = variance, schedule

    def forward(self, x, t, conditions, *, second_time=None, guidance=None, taps=(), stop=False):
        alpha, sigma = (broadcast(f(t.double()), x) for f in (self.schedule.alpha, self.schedule.sigma))
        mean = self.mean
        if "label" in conditions:
            mean = mean + conditions.field("label").to(x.dtype)[:, None]
        return Output(mean + alpha * self.variance / (alpha**2 * self.variance + sigma**2) * (x - alpha * mean))


def denoiser(mean: float, variance: float, schedule: Schedule) -> Denoiser:
    return Denoiser(Gaussian(mean, variance, schedule), schedule, "x0")


def at(t: float) -> Tensor:
    return torch.full((4,), t, dtype=torch.float64)


def gap(x: Tensor, t: float, real: Denoiser, fake: Denoiser) -> Tensor:
    path = real.path
    x_t = float(path.alpha(t)) * x + float(path.sigma(t)) * EPS
    predictions = real.x0(x_t, at(t), NOBODY), fake.x0(x_t, at(t), NOBODY)
    return matching_gradient(x, *predictions, path, at(t), weighting="none").detach()


def kl(mean_f: Tensor, variance_f: Tensor, mean_r: float, variance_r: float) -> Tensor:
    return 0.5 * ((variance_f + (mean_f - mean_r) ** 2) / variance_r - 1 - (variance_f / variance_r).log())


@pytest.mark.parametrize("schedule", [Flow(), Trig(), EDM(sigma_max=5.0)], ids=lambda s: s.name)
@pytest.mark.parametrize("t", TIMES)
def test_the_gradient_is_that_of_the_noised_kl_divergence(schedule: Schedule, t: float) -> None:
    m_f, s, m_r, v_r = 0.8, 0.6, -0.3, 0.25
    found = gap(m_f + s * Z, t, denoiser(m_r, v_r, schedule), denoiser(m_f, s * s, schedule))
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    v_ft, v_rt = alpha**2 * s * s + sigma**2, alpha**2 * v_r + sigma**2
    torch.testing.assert_close(found.mean().item(), sigma**2 * (m_f - m_r) / v_rt, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((found * Z).mean().item(), sigma**2 * s * (1 / v_rt - 1 / v_ft), rtol=1e-10, atol=1e-12)

    mean, spread = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m_f, s))
    kl(alpha * mean, (alpha * spread) ** 2 + sigma**2, alpha * m_r, v_rt).backward()
    for moment, parameter in ((found.mean(), mean), ((found * Z).mean(), spread)):
        torch.testing.assert_close(moment.item(), sigma**2 / alpha**2 * parameter.grad.item(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_with_equal_variances_the_gradient_is_the_same_at_every_point(t: float) -> None:
    path, m_f, m_r, v = Flow(), 0.4, 1.0, 0.09
    found = gap(m_f + 0.3 * Z, t, denoiser(m_r, v, path), denoiser(m_f, v, path))
    expected = t**2 * (m_f - m_r) / ((1 - t) ** 2 * v + t**2)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-10, atol=1e-12)
    assert (found < 0).all()  # descending moves x up, towards the real mean


@pytest.mark.parametrize("weighting", ["inv_l1", "sigma/alpha", "sigma^3/alpha", "none"])
def test_equal_distributions_are_a_fixed_point(weighting: str) -> None:
    real = denoiser(0.2, 0.3, Flow())
    for t in TIMES:
        x = (0.2 + 0.3**0.5 * Z).requires_grad_()
        matching_loss(x, at(t), EPS, NOBODY, real, denoiser(0.2, 0.3, Flow()), weighting=weighting).backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_the_surrogate_has_exactly_the_gradient_and_neither_score_gets_one() -> None:
    real, fake = denoiser(-0.5, 0.2, Flow()), denoiser(0.9, 0.4, Flow())
    x, t = (0.9 + 0.4**0.5 * Z).requires_grad_(), torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    loss = matching_loss(x, t, EPS, NOBODY, real, fake)
    loss.backward()
    assert all(p.grad is None for d in (real, fake) for p in d.parameters())
    x_t = (1 - t)[:, None] * x + t[:, None] * EPS
    gradient = matching_gradient(x, real.x0(x_t, t, NOBODY), fake.x0(x_t, t, NOBODY), Flow(), t).detach()
    torch.testing.assert_close(x.grad, gradient / x.numel(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.detach(), 0.5 * gradient.square().mean(), rtol=1e-12, atol=0)


def test_the_normaliser_is_per_sample_and_free_of_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    x, real, fake = (torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.full((5,), 0.5, dtype=torch.float64)
    found = matching_gradient(x, real, fake, Flow(), t)
    for i in range(5):
        torch.testing.assert_close(found[i], (fake[i] - real[i]) / (x[i] - real[i]).abs().mean())
    scale = torch.tensor([0.1, 1.0, 3.0, 7.0, 50.0], dtype=torch.float64).view(5, 1, 1, 1)
    torch.testing.assert_close(matching_gradient(real + scale * (x - real), real, real + scale * (fake - real), Flow(), t), found)


def test_the_floor_keeps_a_sample_on_its_target_finite() -> None:
    x = torch.zeros(2, 2, dtype=torch.float64)
    found = matching_gradient(x, x, x + 0.5, Flow(), torch.full((2,), 0.5), floor=1e-2)
    torch.testing.assert_close(found, torch.full_like(x, 50.0))


@pytest.mark.parametrize("t", TIMES)
def test_on_a_path_of_alpha_one_the_papers_equation_is_the_implemented_gradient(t: float) -> None:
    path = EDM(sigma_max=5.0)
    real, fake, x = denoiser(0.0, 0.25, path), denoiser(0.5, 0.36, path), torch.cat([0.5 + 0.6 * Z, Z], 1)
    sigma = float(path.sigma(t))
    x_t = x + sigma * torch.cat([EPS, -EPS], 1)
    mu_r, mu_f = real.x0(x_t, at(t), NOBODY), fake.x0(x_t, at(t), NOBODY)
    w = sigma**2 * x.shape[1] / (mu_r - x).abs().sum(1, keepdim=True)
    papers = w * (fake.score(x_t, at(t), NOBODY) - real.score(x_t, at(t), NOBODY))
    torch.testing.assert_close(matching_gradient(x, mu_r, mu_f, path, at(t)), papers, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("weighting", "power"), [("sigma/alpha", 1), ("sigma^3/alpha", 3)])
def test_the_fixed_weights_are_the_papers_on_scores(weighting: str, power: int) -> None:
    path, t = VPCosine(), 0.4
    real, fake = denoiser(0.0, 0.25, path), denoiser(0.5, 0.36, path)
    alpha, sigma = path.alpha(t), path.sigma(t)
    x_t = alpha * Z + sigma * EPS
    papers = sigma**power / alpha * alpha * (fake.score(x_t, at(t), NOBODY) - real.score(x_t, at(t), NOBODY))
    found = matching_gradient(Z, real.x0(x_t, at(t), NOBODY), fake.x0(x_t, at(t), NOBODY), path, at(t), weighting=weighting)
    torch.testing.assert_close(found, papers, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("weighting", "on_x0"), [("sigma^2", "sigma^3/alpha"), ("1", "sigma/alpha")])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (4.5, 4.5), (4.5, 1.0)])
def test_weights_on_noise_are_weights_on_scores_and_both_scores_may_be_guided(weighting: str, on_x0: str, scales: tuple) -> None:
    labels = Conditions({"label": torch.tensor([1, 2, 3, 4])}, {"label": 0})
    real, fake, t = denoiser(0.0, 0.25, VPCosine()), denoiser(0.5, 0.36, VPCosine()), torch.tensor(TIMES + (0.7,), dtype=torch.float64)
    gradients = []
    for kind in (weighting, on_x0):
        x = Z.clone().requires_grad_()
        options = {"guidance_scale": scales[0], "fake_guidance_scale": scales[1]}
        matching_loss(x, t, EPS, labels, real, fake, weighting=kind, **options).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    x_t = VPCosine().alpha(t)[:, None] * Z + VPCosine().sigma(t)[:, None] * EPS
    eps = [d.eps(x_t, t, labels, guidance_scale=scale).detach() for d, scale in zip((real, fake), scales, strict=True)]
    torch.testing.assert_close(gradients[0], noise_gradient(*eps, VPCosine(), t, weighting=weighting) / 4, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighting", ["sigma^2", "1", "none", "sigma^3/alpha"])
def test_without_a_fake_score_the_drawn_noise_takes_its_place(weighting: str) -> None:
    real, t, path = denoiser(0.2, 0.3, VPCosine()), at(0.4), VPCosine()
    x = Z.clone().requires_grad_()
    matching_loss(x, t, EPS, NOBODY, real, None, weighting=weighting).backward()
    alpha, sigma = path.alpha(0.4), path.sigma(0.4)
    gap = real.eps(alpha * Z + sigma * EPS, t, NOBODY).detach() - EPS
    weight = {"sigma^2": sigma**2, "1": 1.0, "none": sigma / alpha, "sigma^3/alpha": sigma**2}[weighting]
    torch.testing.assert_close(x.grad, weight * gap / 4, rtol=1e-9, atol=1e-12)


def test_what_is_not_a_number_does_not_move_a_sample() -> None:
    real, fake = torch.tensor([[1.0], [math.nan]]), torch.tensor([[0.5], [0.5]])
    assert torch.equal(noise_gradient(real, fake, Flow(), torch.tensor([0.5, 0.5])), torch.tensor([[0.125], [0.0]]))
    with pytest.raises(UsageError, match="sigma\\^2"):
        noise_gradient(real, fake, Flow(), torch.tensor([0.5, 0.5]), weighting="sigma")


def test_the_noise_loss_is_weighted_by_alpha_squared_of_the_path() -> None:
    t, x = torch.tensor((*TIMES, 0.7), dtype=torch.float64), Z.clone().requires_grad_()
    for own, path in ((VPCosine(), VPCosine()), (Flow(), VPCosine())):
        fake = Denoiser(Gaussian(0.1, 0.5, own), own, "x0", path=path)
        loss = weighted_noise_loss(fake, x, t, EPS, NOBODY)
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        expected = (alpha**2 * (fake.eps(alpha * Z + sigma * EPS, t, NOBODY) - EPS) ** 2).mean()
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert fake.network.mean.grad.abs() > 0
    assert x.grad is None


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(UsageError, match="inv_l1"):
        matching_gradient(Z, Z, Z, Flow(), at(0.5), weighting="inv_l2")


def test_the_teacher_is_guided_and_the_fake_score_is_not() -> None:
    labels = Conditions({"label": torch.tensor([1, 2, 3, 4])}, {"label": 0})
    real, fake, x, t, w = denoiser(0.0, 0.3, Flow()), denoiser(0.0, 0.3, Flow()), Z.clone().requires_grad_(), at(0.5), 3.0
    matching_loss(x, t, EPS, labels, real, fake, guidance_scale=w).backward()
    x_t = 0.5 * Z + 0.5 * EPS
    with_label, without = real.x0(x_t, t, labels), real.x0(x_t, t, labels.null())
    guided = without + w * (with_label - without)
    expected = matching_gradient(Z, guided, fake.x0(x_t, t, labels), Flow(), t) / 4
    torch.testing.assert_close(x.grad, expected.detach())


def test_the_exact_mixture_satisfies_tweedie() -> None:
    mixture, path = standard_mixture(), Flow()
    teacher = Denoiser(ExactMixture(mixture, path), path, "x0")
    generator = torch.Generator().manual_seed(3)
    x, labels = torch.randn(16, 2, generator=generator, dtype=torch.float64), torch.randint(8, (16,), generator=generator)
    for t in TIMES:
        alpha, sigma = 1 - t, t
        y = x.clone().requires_grad_()
        covariances = alpha**2 * mixture.covariances[labels] + sigma**2 * torch.eye(2, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(alpha * mixture.means[labels], covariances)
        log_p = (mixture.weights[labels].log() + normal.log_prob(y[:, None])).logsumexp(1)
        (score,) = torch.autograd.grad(log_p.sum(), y)
        x0 = teacher.x0(x, torch.full((16,), t, dtype=torch.float64), mixture.conditions(labels))
        torch.testing.assert_close((alpha * x0 - x) / sigma**2, score, rtol=1e-8, atol=1e-8)


class Affine(nn.Module):
    """F(x) = a x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x, t, conditions, *, second_time=None, guidance=None, taps=(), stop=False):
        return Output(self.weights[0] * x + self.weights[1])


@pytest.mark.parametrize("prediction", ["x0", "eps", "velocity", "score"])
@pytest.mark.parametrize(("own", "path"), [(Flow(), Flow()), (Trig(), Trig()), (Trig(), Flow())], ids=["flow", "trig", "trig-on-flow"])
@pytest.mark.parametrize("t", TIMES)
def test_the_fake_scores_optimum_is_the_affine_posterior_mean(prediction: str, own: Schedule, path: Schedule, t: float) -> None:
    m, s = 0.7, 0.4
    network = Affine()
    fake = Denoiser(network, own, prediction, path=path)

    def loss(weights: Tensor) -> Tensor:
        return torch.func.functional_call(Wrapped(fake), {"fake.network.weights": weights}, (m + s * Z, at(t), EPS))

    start = torch.zeros(2, dtype=torch.float64)
    slope, curvature = torch.func.jacrev(loss)(start), torch.func.hessian(loss)(start)
    with torch.no_grad():
        network.weights.copy_(-torch.linalg.solve(curvature, slope))  # the loss is quadratic in (a, b)
    x_t = torch.linspace(-2, 2, 4, dtype=torch.float64)[:, None]
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    expected = m + alpha * s * s / (alpha**2 * s * s + sigma**2) * (x_t - alpha * m)
    torch.testing.assert_close(fake.x0(x_t, at(t), NOBODY).detach(), expected, rtol=1e-9, atol=1e-9)


class Wrapped(nn.Module):
    def __init__(self, fake: Denoiser):
        super().__init__()
        self.fake = fake

    def forward(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return fake_score_loss(self.fake, x, t, noise, NOBODY)


def test_the_fake_scores_loss_is_plain_in_velocity_and_eps_and_edm_weighted_in_x0() -> None:
    path, t, x = Trig(), at(0.3), 0.5 * Z
    alpha, sigma = float(path.alpha(0.3)), float(path.sigma(0.3))
    expected = {
        "velocity": (math.pi / 2) ** 2 * (alpha * EPS - sigma * x).square().mean(),
        "eps": EPS.square().mean(),
        "score": EPS.square().mean(),
        "x0": (alpha**2 / sigma**2 + 4) * x.square().mean(),
    }
    for prediction, value in expected.items():
        fake = Denoiser(Affine(), path, prediction)  # predicts 0
        torch.testing.assert_close(fake_score_loss(fake, x, t, EPS, NOBODY).detach(), value)


def test_no_gradient_of_the_fake_scores_loss_reaches_the_samples() -> None:
    x = Z.clone().requires_grad_()
    fake = denoiser(0.1, 0.5, Flow())
    fake_score_loss(fake, x, at(0.5), EPS, NOBODY).backward()
    assert x.grad is None
    assert fake.network.mean.grad.abs() > 0


def test_the_surrogates_gradient_is_divided_by_all_elements() -> None:
    x, g = torch.zeros(3, 2, 2, dtype=torch.float64, requires_grad=True), torch.arange(12.0, dtype=torch.float64).view(3, 2, 2)
    surrogate(x, g).backward()
    torch.testing.assert_close(x.grad, g / 12)
