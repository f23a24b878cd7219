"""The facts that SwiftBrush stands on, in float64 on exact scores: conversions, the gradient in closed form, its fixed points.

Where everything is affine in (z, eps), the four points (+-1, +-1) have exactly the moments that matter: their mean is exact.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Conditions
from distillbench.data.mixture import Mixture, exact_denoiser, standard_mixture
from distillbench.diffusion import Denoiser, broadcast, jump
from distillbench.diffusion.base import Schedule
from distillbench.diffusion.schedules import Flow, Trig, VPCosine, VPTable
from distillbench.networks.backbone import Output
from distillbench.parts.distribution_matching import matching_loss, noise_gradient

MIXTURE = standard_mixture()
Z = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
EPS = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
STABLE_DIFFUSION = VPTable(tuple((1 - BETAS).cumprod(0).tolist()))


class Says(nn.Module):
    """A network whose output was chosen beforehand."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, x, t, conditions, **options):
        return Output(self.output)


def test_the_conversions_between_eps_v_and_u_are_exact_at_all_of_the_papers_levels() -> None:
    assert STABLE_DIFFUSION.alphas_cumprod[-1] == pytest.approx(0.00466, abs=5e-6)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1000, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    nobody = Conditions.none(1000)
    alpha, sigma = (v[:, None] for v in STABLE_DIFFUSION.levels(t))
    x_t = alpha * x0 + sigma * eps
    v = alpha * eps - sigma * x0
    torch.testing.assert_close(alpha * v + sigma * x_t, eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alpha * x_t - sigma * v, x0, rtol=1e-12, atol=1e-12)
    readings = {
        "eps": Denoiser(Says(eps), STABLE_DIFFUSION, "eps"),
        "v": Denoiser(Says(v * math.pi / 2), Trig(), "velocity", path=STABLE_DIFFUSION),  # trig's velocity is pi / 2 v
        "u": Denoiser(Says(eps - x0), Flow(), "velocity", path=STABLE_DIFFUSION),
    }
    for name, denoiser in readings.items():
        read = denoiser.predict(x_t, t, nobody)
        torch.testing.assert_close(read.eps, eps, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(read.x0, x0, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


class Gaussian(nn.Module):
    """eps*(x_t) = sigma (x_t - alpha mean) / (alpha^2 variance + sigma^2)."""

    def __init__(self, mean: float, variance: float, schedule: Schedule):
        super().__init__()
        self.mean, self.variance, self.schedule = mean, variance, schedule

    def forward(self, x, t, conditions, **options):
        alpha, sigma = (broadcast(f(t), x) for f in (self.schedule.alpha, self.schedule.sigma))
        return Output(sigma * (x - alpha * self.mean) / (alpha**2 * self.variance + sigma**2))


def gaussian(mean: float, variance: float, path: Schedule) -> Denoiser:
    return Denoiser(Gaussian(mean, variance, path), path, "eps")


def vsd(x: Tensor, t: float, teacher: Denoiser, fake: Denoiser) -> Tensor:
    """d at each sample, read off the loss."""
    x = x.clone().requires_grad_()
    times = torch.full((len(x),), t, dtype=torch.float64)
    matching_loss(x, times, EPS, Conditions.none(4), teacher, fake, weighting="sigma^2").backward()
    return x.grad * x.numel()


@pytest.mark.parametrize("path", [VPCosine(), STABLE_DIFFUSION], ids=["cosine", "stable diffusion"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("m", "mu"), [(0.8, -0.3), (-0.5, 0.1)])
def test_on_gaussians_the_gradient_is_the_closed_form_and_that_of_the_noised_kl(path: Schedule, t: float, m: float, mu: float) -> None:
    s2 = 0.25
    d = vsd(m + s2**0.5 * Z, t, gaussian(mu, s2, path), gaussian(m, s2, path))
    alpha, sigma = (float(v) for v in path.levels(t))
    expected = sigma**3 * alpha * (m - mu) / (alpha**2 * s2 + sigma**2)
    torch.testing.assert_close(d, torch.full_like(d, expected), rtol=1e-8, atol=1e-12)
    assert (d.sign() == math.copysign(1, m - mu)).all()  # descent moves the student's mean towards the data's

    mean = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    noised = [torch.distributions.Normal(alpha * v, (alpha**2 * s2 + sigma**2) ** 0.5) for v in (mean, mean.new_tensor(mu))]
    torch.distributions.kl_divergence(*noised).backward()
    assert mean.grad.item() == pytest.approx(d.mean().item() / sigma**2 * alpha / sigma, rel=1e-8)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_on_gaussians_of_other_width_the_student_is_driven_to_the_datas(t: float) -> None:
    path, theta, s = VPCosine(), 0.9, 0.5
    d = vsd(0.2 + theta * Z, t, gaussian(0.2, s * s, path), gaussian(0.2, theta**2, path))
    alpha, sigma = (float(v) for v in path.levels(t))
    slope = sigma**3 * alpha * theta * (1 / (alpha**2 * s * s + sigma**2) - 1 / (alpha**2 * theta**2 + sigma**2))
    assert d.mean().item() == pytest.approx(0, abs=1e-12)
    assert (d * Z).mean().item() == pytest.approx(slope, rel=1e-9)
    assert slope > 0


class Points(nn.Module):
    """The exact eps of weighted points: what a perfect fake score says of a student whose samples these are."""

    def __init__(self, points: Tensor, shares: Tensor, labels: Tensor, schedule: Schedule, classes: int):
        super().__init__()
        self.points, self.shares, self.labels, self.schedule, self.classes = points, shares, labels, schedule, classes

    def forward(self, x, t, conditions, **options):
        alpha, sigma = (f(t)[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        label = conditions.field("label")[:, None]
        squares = (x[:, None] - alpha[..., None] * self.points).square().sum(-1)
        log = (self.shares.log() - squares / (2 * sigma**2)).masked_fill((label != self.labels) & (label != self.classes), -math.inf)
        return Output((x - alpha * (log.softmax(1) @ self.points)) / sigma)


def two_classes() -> tuple[Mixture, Tensor, Tensor, Tensor]:
    """Two Gaussian classes, and points with shares and labels that integrate over them (Gauss-Hermite)."""
    means = torch.tensor([[[-0.6, 0.1]], [[0.7, -0.2]]], dtype=torch.float64)
    covariances = torch.tensor([[[[0.20, 0.05], [0.05, 0.10]]], [[[0.10, -0.02], [-0.02, 0.15]]]], dtype=torch.float64)
    nodes, shares = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(60))
    grid = torch.cartesian_prod(nodes, nodes)
    share = (shares[:, None] * shares).flatten() / shares.sum() ** 2 / 2
    points = torch.cat([means[c, 0] + grid @ torch.linalg.cholesky(covariances[c, 0]).T for c in range(2)])
    return Mixture(means, covariances, torch.ones(2, 1).double()), points, share.repeat(2), torch.arange(2).repeat_interleave(len(grid))


@pytest.mark.parametrize("g", [2.0, 4.5])
def test_guided_alike_the_data_are_a_fixed_point_and_with_the_teacher_guided_alone_they_are_not(g: float) -> None:
    mixture, points, shares, labels = two_classes()
    path = VPCosine()
    teacher = exact_denoiser(mixture, path)
    fake = Denoiser(Points(points, shares, labels, path, 2), path, "eps")  # a student of the data's distribution
    generator = torch.Generator().manual_seed(0)
    x, conditions = mixture.sample(256, generator)
    t = 0.4 + 0.5 * torch.rand(256, generator=generator, dtype=torch.float64)
    noise = torch.randn(256, 2, generator=generator, dtype=torch.float64)

    def d(fake_scale: float) -> Tensor:
        held = x.clone().requires_grad_()
        options = {"guidance_scale": g, "fake_guidance_scale": fake_scale, "weighting": "sigma^2"}
        matching_loss(held, t, noise, conditions, teacher, fake, **options).backward()
        return held.grad * held.numel()

    assert d(g).abs().max() < 1e-8
    alone, axis = d(1.0), mixture.means[1, 0] - mixture.means[0, 0]
    for c in (0, 1):  # descent moves each class away from the other
        away = -alone[conditions.field("label") == c].mean(0) @ axis
        assert away.sign() == (1 if c else -1)
        assert away.abs() > 0.05


def test_the_losss_gradient_is_d_over_the_number_of_elements() -> None:
    path = Flow()
    teacher, fake = exact_denoiser(MIXTURE, path), gaussian(0.3, 0.7, path)
    x, conditions = MIXTURE.sample(8, torch.Generator().manual_seed(1))
    x = x.requires_grad_()
    t, noise = torch.linspace(0.05, 0.95, 8).double(), torch.randn(8, 2, generator=torch.Generator().manual_seed(2)).double()
    loss = matching_loss(x, t, noise, conditions, teacher, fake, weighting="sigma^2")
    loss.backward()
    x_t = jump(path, x.detach(), noise, t)
    d = noise_gradient(teacher.eps(x_t, t, conditions), fake.eps(x_t, t, conditions), path, t)
    torch.testing.assert_close(d, t[:, None] ** 2 * (teacher.eps(x_t, t, conditions) - fake.eps(x_t, t, conditions)))
    torch.testing.assert_close(x.grad, d / 16, rtol=1e-12, atol=1e-15)
    assert loss.item() == pytest.approx(0.5 * d.square().mean().item(), rel=1e-12)
