"""The facts that Diff-Instruct stands on, in float64 on exact scores: the gradient in closed form, SDS, exact mixtures, the noise levels.

Gaussians on x_t = x + sigma eps: data N(mu, s^2), student x = m + theta z. All is affine in (z, eps), so the four points (+-1, +-1),
which have exactly the moments that matter, give exact means. What the shared loss holds alone stands in tests/parts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Batch, Conditions
from distillbench.data.mixture import Mixture, MixtureSource, exact_denoiser, standard_mixture
from distillbench.diffusion import Denoiser, broadcast
from distillbench.diffusion.base import Schedule
from distillbench.diffusion.schedules import EDM, Flow, VPCosine
from distillbench.networks.backbone import Output
from distillbench.randomness import generator_for
from distillbench_methods.diff_instruct import DiffInstruct

PATH = EDM(sigma_min=0.01, sigma_max=20.0)
Z = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
EPS = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)


class Gaussian(nn.Module):
    """D(x) = (s^2 x + sigma^2 mean) / (s^2 + sigma^2)."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Output:
        sigma2 = broadcast(PATH.sigma(t.double()) ** 2, x)
        return Output((self.std**2 * x + sigma2 * self.mean) / (self.std**2 + sigma2))


def gaussian(mean: float, std: float) -> Denoiser:
    return Denoiser(Gaussian(mean, std), PATH, "x0")


def method(teacher: Denoiser, score: Denoiser | None, /, **knobs: Any) -> DiffInstruct:
    made = DiffInstruct(DiffInstruct.Config(**knobs))
    made.teacher, made.fake, made.scale, made.fake_scale = teacher, score, 1.0, 1.0
    return made


def gradients(made: DiffInstruct, m: float, theta: float, sigma: float) -> tuple[float, float]:
    """The derivatives of the loss with respect to m and theta."""
    mean, width = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, theta))
    t = PATH.time_of(-2 * torch.tensor(sigma, dtype=torch.float64).log()).expand(4)
    made.student_loss(mean + width * Z, t, EPS, Conditions.none(4)).backward()
    return mean.grad.item(), width.grad.item()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
@pytest.mark.parametrize(("m", "theta"), [(0.9, 1.7), (-1.0, 0.3), (-0.4, 2.0), (0.9, 0.8)])
def test_the_gradient_is_that_of_the_noised_kl_times_the_weight(m: float, theta: float, sigma: float) -> None:
    s, mu = 0.8, -0.4
    w, v = s**2 + sigma**2, theta**2 + sigma**2
    slopes = (m - mu) / w, theta * (1 / w - 1 / v)
    found = gradients(method(gaussian(mu, s), gaussian(m, theta), weighting="alpha^2/sigma^2"), m, theta, sigma)
    assert found == pytest.approx(slopes, rel=1e-9, abs=1e-12)
    plain = gradients(method(gaussian(mu, s), gaussian(m, theta)), m, theta, sigma)
    assert plain == pytest.approx([sigma**2 * slope for slope in slopes], rel=1e-9, abs=1e-12)

    mean, width = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (m, theta))
    variance = width**2 + sigma**2
    (0.5 * (variance / w + (mean - mu) ** 2 / w - 1 - (variance / w).log())).backward()
    assert found == pytest.approx((mean.grad.item(), width.grad.item()), rel=1e-9, abs=1e-12)
    for slope, away in zip(found, (m - mu, theta - s), strict=True):  # zero at the truth, towards it elsewhere
        assert slope == pytest.approx(0, abs=1e-12) if away == 0 else slope * away > 0


@pytest.mark.parametrize("weighting", ["none", "inv_l1", "alpha^2/sigma^2"])
def test_at_the_truth_every_sample_stands_still(weighting: str) -> None:
    made = method(gaussian(0.3, 0.6), gaussian(0.3, 0.6), weighting=weighting)
    x = (0.3 + 0.6 * Z).requires_grad_()
    made.student_loss(x, torch.linspace(0.1, 0.9, 4).double(), EPS, Conditions.none(4)).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("path", [PATH, Flow(), VPCosine()], ids=lambda path: path.name)
@pytest.mark.parametrize("weighting", ["none", "inv_l1", "alpha^2/sigma^2"])
def test_the_gradient_at_each_sample_is_the_weighted_difference_summed_over_elements(path: Schedule, weighting: str) -> None:
    mixture = standard_mixture()
    wide = Mixture(mixture.means, mixture.covariances + 0.3 * torch.eye(2, dtype=torch.float64), mixture.weights)
    teacher, fake = exact_denoiser(mixture, path), exact_denoiser(wide, path)
    generator = torch.Generator().manual_seed(0)
    x, conditions = mixture.sample(6, generator)
    noise, t = torch.randn(6, 2, generator=generator, dtype=torch.float64), torch.linspace(0.3, 0.8, 6).double()
    held = x.clone().requires_grad_()
    method(teacher, fake, weighting=weighting).student_loss(held, t, noise, conditions).backward()
    alpha, sigma = (level[:, None] for level in path.levels(t))
    real, own = (d.x0(alpha * x + sigma * noise, t, conditions) for d in (teacher, fake))
    weight = {"none": torch.ones(6, 1), "inv_l1": 1 / (x - real).abs().mean(1, keepdim=True), "alpha^2/sigma^2": (alpha / sigma) ** 2}
    torch.testing.assert_close(held.grad, weight[weighting] * (own - real) / 6, rtol=1e-9, atol=1e-14)


# ---------------------------------------------------------------- without a fake score


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("theta", [0.1, 0.8, 2.0])
def test_sds_sees_the_mean_alike_and_narrows_every_student(sigma: float, theta: float) -> None:
    s, mu, m = 0.8, -0.4, 0.9
    w = s**2 + sigma**2
    found = gradients(method(gaussian(mu, s), None, fake="none", weighting="alpha^2/sigma^2"), m, theta, sigma)
    assert found == pytest.approx(((m - mu) / w, theta / w), rel=1e-9)
    assert found[1] > 0


def test_sds_collapses_where_a_fake_score_finds_the_width() -> None:
    """Descent of (m, theta) with the exact fake score of each moment."""
    for fake, width in (("trained", 0.8), ("none", 0.0)):
        m, theta = 0.9, 1.5
        for _ in range(150):
            own = gaussian(m, theta) if fake == "trained" else None
            slopes = gradients(method(gaussian(-0.4, 0.8), own, fake=fake, weighting="alpha^2/sigma^2"), m, theta, 0.7)
            m, theta = m - 0.2 * slopes[0], theta - 0.2 * slopes[1]
        assert m == pytest.approx(-0.4, abs=1e-3)
        assert theta == pytest.approx(width, abs=1e-3)


# ---------------------------------------------------------------- mixtures, levels


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0, 10.0])
def test_the_exact_mean_of_a_mixture_of_round_modes_is_the_softmax_formula(sigma: float) -> None:
    generator = torch.Generator().manual_seed(2)
    means, shares, s2 = (
        torch.randn(1, 5, 2, generator=generator, dtype=torch.float64),
        torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25]).double(),
        0.05,
    )
    mixture = Mixture(means, s2 * torch.eye(2, dtype=torch.float64).expand(1, 5, 2, 2), shares[None])
    x = sigma * torch.randn(7, 2, generator=generator, dtype=torch.float64)
    t = PATH.time_of(-2 * torch.tensor(sigma, dtype=torch.float64).log()).expand(7)
    found = exact_denoiser(mixture, PATH).x0(x, t, mixture.conditions(torch.zeros(7, dtype=torch.long)))
    spread = s2 + sigma**2
    r = (-(x[:, None] - means).square().sum(-1) / (2 * spread) + shares.log()).softmax(1)
    each = (means * sigma**2 + s2 * x[:, None]) / spread
    torch.testing.assert_close(found, (r[..., None] * each).sum(1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("path", [Flow(), EDM()], ids=lambda path: path.name)
def test_the_noise_levels_have_the_papers_laws_on_any_path_scaled_by_the_data(path: Schedule) -> None:
    made = method(exact_denoiser(standard_mixture(), path), None, data_std=0.25, level_cut=0.8)

    def levels(law: str) -> Tensor:
        batch = Batch(size=20_000, count=0, progress=0.0, source=MixtureSource(standard_mixture()), generator=generator_for(0, law, 0))
        alpha, sigma = path.levels(made.times(law, batch))
        return 2 * sigma / alpha  # as the paper gives them, for data of deviation 0.5

    log = levels("lognormal").log()
    if path.name == "flow":
        assert (log.mean().item(), log.std().item()) == pytest.approx((-1.2, 1.2), abs=0.04)
    karras = levels("karras")
    assert karras.max().item() == pytest.approx(24.408, rel=1e-3)
    share = (karras ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert [(share < cut).double().mean().item() for cut in (0.2, 0.4, 0.6)] == pytest.approx([0.25, 0.5, 0.75], abs=0.015)
    above = (levels("both") > 5).double().mean().item()
    expected = 0.5 * (karras > 5).double().mean().item() + 0.5 * (0.5 - 0.5 * math.erf((math.log(5) + 1.2) / (1.2 * 2**0.5)))
    assert above == pytest.approx(expected, abs=0.015)
