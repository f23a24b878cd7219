"""The facts that SiD stands on, in float64 on exact scores: the identity, its gradients in closed form, where alpha turns them round.

Gaussians on x_t = x + sigma eps: data N(mu, s^2), student x = m + theta z. All is affine in (z, eps) and the loss quadratic, so the four
points (+-1, +-1), which have exactly the moments that matter, give exact means.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Conditions
from distillbench.data.mixture import exact_denoiser, standard_mixture
from distillbench.diffusion import Denoiser
from distillbench.diffusion.base import broadcast
from distillbench.diffusion.schedules import EDM, Flow
from distillbench.networks.backbone import Output
from distillbench_methods.diff_instruct import DiffInstruct
from distillbench_methods.sid import SiD

PATH = EDM(sigma_min=0.01, sigma_max=20.0)
Z = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
EPS = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
MIXTURE = standard_mixture()


class Gaussian(nn.Module):
    """The mean of x0 given x_t for data N(mean, std^2)."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Output:
        sigma2 = broadcast(PATH.sigma(t.double()) ** 2, x)
        return Output((self.std**2 * x + sigma2 * self.mean) / (self.std**2 + sigma2))


def gaussian(mean: float, std: float) -> Denoiser:
    return Denoiser(Gaussian(mean, std), PATH, "x0")


def method(teacher: Denoiser, fake: Denoiser, kind: type[DiffInstruct] = SiD, **knobs: Any) -> DiffInstruct:
    """A method with the scores that it would have come to; lsg = omega = 1 unless told."""
    made = kind(kind.Config(**{"weighting": "none", **({"lsg": 1.0} if kind is SiD else {}), **knobs}))
    made.teacher, made.fake, made.scale, made.fake_scale = teacher, fake, 1.0, 1.0
    return made


def times(sigma: float, n: int = 4) -> Tensor:
    return PATH.time_of(-2 * torch.tensor(sigma, dtype=torch.float64).log()).expand(n)


def gradients(made: DiffInstruct, m: float, theta: float, sigma: float, z: Tensor = Z, eps: Tensor = EPS) -> tuple[float, float, float]:
    """The loss, and its derivatives with respect to m and theta, the fake score being held."""
    mean, width = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, theta))
    loss = made.student_loss(mean + width * z, times(sigma, len(z)), eps, Conditions.none(len(z)))
    loss.backward()
    return loss.item(), mean.grad.item(), width.grad.item()


def losses(student: tuple[float, float], data: tuple[float, float], sigma: float) -> dict[str, tuple[float, float, float]]:
    """L1 and L2 and their gradients for (mean, width) of student and data."""
    teacher, fake = gaussian(*data), gaussian(*student)
    knobs = {"L1": {"estimator": "naive"}, "L2": {"alpha": 0.0}}
    return {name: gradients(method(teacher, fake, **knob), *student, sigma) for name, knob in knobs.items()}


# ---------------------------------------------------------------- the identity


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
def test_on_gaussians_both_estimators_are_the_closed_form(sigma: float) -> None:
    s, theta, mu, m = 0.8, 1.7, -0.4, 0.9
    a, b, c = s**2 / (s**2 + sigma**2), theta**2 / (theta**2 + sigma**2), sigma**2 / (s**2 + sigma**2)
    for student, data, value in (
        ((mu, theta), (mu, s), (a - b) ** 2 * (theta**2 + sigma**2)),
        ((m, s), (mu, s), c**2 * (mu - m) ** 2),
    ):
        found = losses(student, data, sigma)
        assert found["L1"][0] == pytest.approx(value, rel=1e-9)
        assert found["L2"][0] == pytest.approx(value, rel=1e-9)
    found = losses((m, theta), (mu, s), sigma)
    assert found["L1"][0] == pytest.approx(found["L2"][0], rel=1e-9)


class Points(nn.Module):
    """The exact mean of x0 of a student that is a few weighted points."""

    def __init__(self, points: Tensor, shares: Tensor):
        super().__init__()
        self.points, self.shares = points, shares

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Output:
        log = self.shares.log() - (x - self.points).square() / (2 * PATH.sigma(t.double())[:, None] ** 2)
        return Output((log.softmax(1) * self.points).sum(1, keepdim=True))


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_estimators_agree_for_any_student_as_long_as_its_score_is_exact(sigma: float) -> None:
    """A student of three points, noise by Gauss-Hermite quadrature."""
    points, shares = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(64))
    x, eps = points.repeat_interleave(64)[:, None], nodes.repeat(3)[:, None]
    weight = (shares[:, None] * weights / weights.sum()).flatten()

    def expected(fake: Denoiser, **knobs: Any) -> float:
        made = method(gaussian(0.3, 0.9), fake, **knobs)
        each = [made.student_loss(x[i : i + 1], times(sigma, 1), eps[i : i + 1], Conditions.none(1)) for i in range(len(x))]
        return float(torch.stack(each) @ weight)

    exact = Denoiser(Points(points, shares), PATH, "x0")
    naive, projected = expected(exact, estimator="naive"), expected(exact, alpha=0.0)
    assert naive == pytest.approx(projected, rel=1e-6)
    assert naive > 1e-3
    other = gaussian(0.0, 1.0)
    assert expected(other, estimator="naive") != pytest.approx(expected(other, alpha=0.0), rel=0.05)


# ---------------------------------------------------------------- the gradients


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 1.0, 1.2, 1.5])
def test_a_displaced_student_feels_half_the_true_gradient_whatever_alpha_and_nothing_of_the_naive_loss(sigma: float, alpha: float) -> None:
    s, mu, m = 0.8, -0.4, 0.9
    c = sigma**2 / (s**2 + sigma**2)
    found = losses((m, s), (mu, s), sigma)
    assert found["L1"][1] == pytest.approx(0, abs=1e-12)
    assert found["L2"][1] == pytest.approx(-(c**2) * (mu - m), rel=1e-9)
    total = gradients(method(gaussian(mu, s), gaussian(m, s), alpha=alpha), m, s, sigma)[1]
    assert total == pytest.approx(-(c**2) * (mu - m), rel=1e-9)
    assert 2 * total == pytest.approx(-2 * c**2 * (mu - m), rel=1e-9)  # of c^2 (mu - m)^2
    assert total > 0  # descent moves m down, to mu


@pytest.mark.parametrize("sigma", [0.3, 0.7, 3.0])
@pytest.mark.parametrize("theta", [0.2, 0.9, 1.0, 1.1, 4.0])
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 1.0, 1.2, 1.5])
def test_a_student_of_another_width_feels_the_closed_form(sigma: float, theta: float, alpha: float) -> None:
    s = 1.0
    a, b = s**2 / (s**2 + sigma**2), theta**2 / (theta**2 + sigma**2)
    found = losses((0.0, theta), (0.0, s), sigma)
    assert found["L1"][2] == pytest.approx(2 * theta * (a - b) ** 2, rel=1e-9, abs=1e-13)
    assert found["L2"][2] == pytest.approx(2 * theta * (a - b) * (a - 1), rel=1e-9, abs=1e-13)
    total = gradients(method(gaussian(0.0, s), gaussian(0.0, theta), alpha=alpha), 0.0, theta, sigma)[2]
    assert total == pytest.approx(2 * theta * (a - b) * ((a - 1) - alpha * (a - b)), rel=1e-9, abs=1e-13)
    if alpha == 1:
        assert np.sign(round(total, 12)) == np.sign(theta - s)
    assert found["L1"][2] >= -1e-13  # the naive loss narrows every student, one that is too narrow included


# ---------------------------------------------------------------- the bound of stability


def width_slope(alpha: float, theta: float, sigma: float, s: float = 1.0) -> float:
    return gradients(method(gaussian(0.0, s), gaussian(0.0, theta), alpha=alpha), 0.0, theta, sigma)[2]


@pytest.mark.parametrize(("alpha", "factor"), [(1.2, 6.0), (1.5, 3.0), (2.0, 2.0)])
def test_with_alpha_above_one_the_sign_is_wrong_exactly_beyond_the_bound(alpha: float, factor: float) -> None:
    s, sigma = 1.0, 0.7
    assert alpha / (alpha - 1) == pytest.approx(factor)
    bound = (factor * (s**2 + sigma**2) - sigma**2) ** 0.5
    assert width_slope(alpha, bound, sigma) == pytest.approx(0, abs=1e-12)
    for theta in (1.01, 0.5 * (1 + bound), 0.999 * bound):
        assert width_slope(alpha, theta, sigma) > 0  # too wide: descent narrows it
    for theta in (1.001 * bound, 2 * bound, 10 * bound):
        assert width_slope(alpha, theta, sigma) < 0 < width_slope(1.0, theta, sigma)
    for theta in (0.1, 0.9):
        assert width_slope(alpha, theta, sigma) < 0  # too narrow: it widens it, as it should


@pytest.mark.parametrize(("alpha", "slope"), [(1.0, 0.0711), (1.2, -0.0721), (1.5, -0.2868)])
def test_the_bound_by_monte_carlo(alpha: float, slope: float) -> None:
    theta, sigma, n = 4.0, 0.7, 100_000
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    made = method(gaussian(0.0, 1.0), gaussian(0.0, theta), alpha=alpha)
    assert width_slope(alpha, theta, sigma) == pytest.approx(slope, abs=5e-5)
    assert gradients(made, 0.0, theta, sigma, z, eps)[2] == pytest.approx(slope, abs=0.008)  # five standard errors


@pytest.mark.parametrize(("alpha", "start", "comes_back"), [(1.0, 4.0, True), (1.5, 4.0, False), (1.5, 0.3, True), (1.2, 2.0, True)])
def test_an_over_dispersed_student_runs_away_under_alpha_of_one_and_a_half(alpha: float, start: float, comes_back: bool) -> None:
    """A training of theta with the exact fake score of each moment, by gradient descent."""
    theta, sigma, s = start, 0.7, 1.0
    widths = [theta]
    for _ in range(100):
        theta -= width_slope(alpha, theta, sigma, s)
        widths.append(theta)
    if comes_back:
        assert theta == pytest.approx(s, abs=0.02)
    else:
        assert all(later > earlier for earlier, later in pairwise(widths))
        assert theta > 2 * start


@pytest.mark.parametrize(("alpha", "theta"), [(1.2, 2.5), (1.5, 1.85)])
def test_omega_tightens_the_bound_and_leaves_alpha_one_right(alpha: float, theta: float) -> None:
    """In two dimensions, at widths below the bound that holds without omega."""
    sigma, n = 0.7, 100_000
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for _ in range(2))

    def slope(alpha: float, weighting: str) -> float:
        made = method(gaussian(0.0, 1.0), gaussian(0.0, theta), alpha=alpha, weighting=weighting)
        return gradients(made, 0.0, theta, sigma, z, eps)[2]

    assert slope(alpha, "none") > 0.02
    assert slope(alpha, "inv_l1") < -0.02
    assert slope(1.0, "inv_l1") > 0.02


# ---------------------------------------------------------------- omega, the fixed point, the graph


def mixture_setting(path: Any = None) -> tuple[Denoiser, Denoiser, Tensor, Tensor, Tensor, Conditions]:
    """A 2-D mixture as the teacher and a wider one as the fake score, at five samples."""
    path = path or Flow()
    wide = type(MIXTURE)(1.1 * MIXTURE.means, MIXTURE.covariances + 0.3 * torch.eye(2, dtype=torch.float64), MIXTURE.weights)
    generator = torch.Generator().manual_seed(4)
    x, conditions = MIXTURE.sample(5, generator)
    noise = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    return exact_denoiser(MIXTURE, path), exact_denoiser(wide, path), x, torch.linspace(0.2, 0.8, 5).double(), noise, conditions


def slope_at(made: DiffInstruct, x: Tensor, *rest: Any) -> Tensor:
    held = x.clone().requires_grad_()
    made.student_loss(held, *rest).backward()
    return held.grad


def test_with_equal_scores_loss_and_gradient_are_exactly_zero() -> None:
    teacher, _, x, *rest = mixture_setting()
    for knobs in ({}, {"alpha": 1.5, "weighting": "inv_l1"}, {"estimator": "naive"}, {"alpha": 0.0}):
        made = method(teacher, teacher, **knobs)
        assert made.student_loss(x, *rest).item() == 0
        assert torch.equal(slope_at(made, x, *rest), torch.zeros_like(x))


@pytest.mark.parametrize("weighting", ["none", "alpha^2/sigma^2"])
@pytest.mark.parametrize("knobs", [{"alpha": 1.0}, {"alpha": 0.0}, {"alpha": 1.5}, {"estimator": "naive"}])
def test_the_gradient_passes_through_both_scores(knobs: dict, weighting: str) -> None:
    """Against finite differences; with the scores' outputs cut off it is another."""
    teacher, fake, x, *rest = mixture_setting()
    made = method(teacher, fake, weighting=weighting, **knobs)
    found, h = slope_at(made, x, *rest), 1e-5
    for i in range(5):
        for j in range(2):
            step = torch.zeros_like(x)
            step[i, j] = h
            difference = (made.student_loss(x + step, *rest) - made.student_loss(x - step, *rest)) / (2 * h)
            assert found[i, j].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-7)

    class Cut(Denoiser):
        def x0(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            return super().x0(x.detach(), *arguments, **options)

    for cut in ((teacher,), (fake,), (teacher, fake)):
        pair = [Cut(d.network, d.schedule, d.prediction) if d in cut else d for d in (teacher, fake)]
        blocked = method(*pair, weighting=weighting, **knobs)
        assert blocked.student_loss(x, *rest).item() == made.student_loss(x, *rest).item()
        if knobs.get("estimator") == "naive" and len(cut) == 2:
            with pytest.raises(RuntimeError, match="grad"):
                slope_at(blocked, x, *rest)
        else:
            assert (slope_at(blocked, x, *rest) - found).abs().max() > 0.01 * found.abs().max()


def test_omega_is_held_and_one_number_a_sample() -> None:
    teacher, fake, x, t, noise, conditions = mixture_setting()
    plain, scaled = (slope_at(method(teacher, fake, weighting=w), x, t, noise, conditions) for w in ("none", "inv_l1"))
    x_t = (1 - t)[:, None] * x + t[:, None] * noise
    omega = (x - teacher.x0(x_t, t, conditions)).abs().mean(1, keepdim=True)
    torch.testing.assert_close(scaled, plain / omega, rtol=1e-10, atol=0)
    levels = slope_at(method(teacher, fake, weighting="alpha^2/sigma^2"), x, t, noise, conditions)
    torch.testing.assert_close(levels, plain * ((1 - t) / t)[:, None] ** 2, rtol=1e-10, atol=0)


def test_the_floor_keeps_omega_from_zero() -> None:
    teacher, t, noise = gaussian(0.0, 1.0), times(0.7), 0.7 * Z  # x_t = 1.49 z, of which the teacher's mean is z
    losses = [method(teacher, gaussian(0.5, 1.0), weighting="inv_l1", norm_floor=floor).student_loss(Z, t, noise, Conditions.none(4))
              for floor in (1e-5, 1e-4)]  # fmt: skip
    assert losses[0].item() == pytest.approx(10 * losses[1].item(), rel=1e-6)


def test_the_loss_is_the_papers_summed_over_elements_and_averaged_over_samples() -> None:
    teacher, fake, x, t, noise, conditions = mixture_setting()
    x_t = (1 - t)[:, None] * x + t[:, None] * noise
    f_phi, f_psi = (d.x0(x_t, t, conditions) for d in (teacher, fake))
    omega = (x - f_phi).abs().mean(1)
    for alpha in (-0.5, 1.0, 1.2):
        each = ((f_phi - f_psi) * ((f_phi - x) - alpha * (f_phi - f_psi))).sum(1) / omega
        found = method(teacher, fake, alpha=alpha, weighting="inv_l1", lsg=100.0).student_loss(x, t, noise, conditions)
        assert found.item() == pytest.approx(100 * each.mean().item(), rel=1e-10)
        if alpha == 1:  # the form of SiD-LSG
            assert each.mean().item() == pytest.approx((((f_phi - f_psi) * (f_psi - x)).sum(1) / omega).mean().item(), rel=1e-10)


# ---------------------------------------------------------------- Fisher and integral KL on one fake score


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("theta", [0.3, 0.8, 2.5])
@pytest.mark.parametrize("m", [-1.0, -0.4, 0.9])
def test_fisher_is_the_kl_gradient_times_what_the_fake_score_gives_up(sigma: float, theta: float, m: float) -> None:
    """On the same x, t, noise, teacher and fake score: 1 - b for the mean and 2 (1 - b) for the width, b the slope of D_fake."""
    s, mu = 0.8, -0.4
    a, b = s**2 / (s**2 + sigma**2), theta**2 / (theta**2 + sigma**2)
    teacher, fake = gaussian(mu, s), gaussian(m, theta)
    kl = gradients(method(teacher, fake, DiffInstruct), m, theta, sigma)[1:]
    fisher = gradients(method(teacher, fake), m, theta, sigma)[1:]
    assert kl == pytest.approx(((1 - a) * (m - mu), (b - a) * theta), rel=1e-9, abs=1e-13)
    assert fisher == pytest.approx(((1 - b) * kl[0], 2 * (1 - b) * kl[1]), rel=1e-9, abs=1e-13)
    for found in (kl, fisher):  # zero at the truth, and away from it up the hill
        assert np.sign(np.round(found, 12)).tolist() == [np.sign(m - mu), np.sign(theta - s)]
