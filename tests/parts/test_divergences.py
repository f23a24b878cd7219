"""The table of f-divergences against derivatives and integrals, and the two normalisations of the weights, all in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbench.data.mixture import Mixture, exact_denoiser, standard_mixture
from distillbench.diffusion import Flow
from distillbench.errors import UsageError
from distillbench.parts.critics import discriminator_loss
from distillbench.parts.divergences import DIVERGENCES, RatioBins, density_ratio, matching_weights

NODES, SHARES = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(200))
SHARES = SHARES / SHARES.sum()


def under_q(g: Callable[[Tensor], Tensor], m: float) -> float:
    """E_q[g(r)] for p = N(0, 1), q = N(m, 1), r = p / q = exp(-m x + m^2 / 2)."""
    return (SHARES * g(torch.exp(-m * (NODES + m) + m * m / 2))).sum().item()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_derivatives_and_h_are_those_of_f(name: str) -> None:
    row = DIVERGENCES[name]
    r = torch.logspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(row.f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(row.first(r), first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(row.second(r), second, rtol=1e-9, atol=1e-9 * float(second.abs().min()))
    torch.testing.assert_close(row.h(r), second * r**2, rtol=1e-9, atol=0)
    assert row.f(torch.ones(1, dtype=torch.float64)).item() == 0
    assert (row.h(r) > 0).all()  # strictly convex
    step, where = 1e-4, torch.logspace(-1, 1, 21, dtype=torch.float64)
    twice = (row.f(where + step) - 2 * row.f(where) + row.f(where - step)) / step**2
    torch.testing.assert_close(twice, row.second(where), rtol=1e-4, atol=1e-6)


def test_softened_and_jensen_shannon_add_up_and_so_does_jeffreys() -> None:
    r = torch.logspace(-3, 3, 61, dtype=torch.float64)
    h = {name: row.h(r) for name, row in DIVERGENCES.items()}
    torch.testing.assert_close(h["js"] + h["sf"], h["rkl"], rtol=1e-12, atol=0)
    torch.testing.assert_close(h["kl"] + h["rkl"], h["jf"], rtol=1e-12, atol=0)


CLOSED: dict[str, Callable[[float], float]] = {
    "rkl": lambda m: m,
    "kl": lambda m: m,
    "jf": lambda m: 2 * m,
    "sh": lambda m: m / 4 * math.exp(-m * m / 8),
    "neyman": lambda m: 2 * m * math.exp(m * m),
    "pearson": lambda m: 2 * m * math.exp(m * m),
}
NUMBERS = {("sf", 1.0): 0.602027, ("js", 1.0): 0.397973, ("sh", 1.0): 0.220624,
           ("sf", 0.5): 0.264736, ("js", 0.5): 0.235264, ("sh", 0.5): 0.121154}  # fmt: skip
VALUES: dict[str, Callable[[float], float]] = {
    "rkl": lambda m: m * m / 2,
    "kl": lambda m: m * m / 2,
    "jf": lambda m: m * m,
    "sh": lambda m: 1 - math.exp(-m * m / 8),
    "neyman": lambda m: math.exp(m * m) - 1,
    "pearson": lambda m: math.exp(m * m) - 1,
}


@pytest.mark.parametrize("m", [0.5, 1.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_between_gaussians_is_the_mean_of_h_times_the_scores_gap(name: str, m: float) -> None:
    row = DIVERGENCES[name]
    gradient = m * under_q(row.h, m)  # the gap of the scores is m everywhere
    if name in CLOSED:
        assert gradient == pytest.approx(CLOSED[name](m), rel=1e-9)
        assert under_q(row.f, m) == pytest.approx(VALUES[name](m), rel=1e-9)
    if (name, m) in NUMBERS:
        assert gradient == pytest.approx(NUMBERS[name, m], abs=5e-7)
    step = 1e-4
    slope = (under_q(row.f, m + step) - under_q(row.f, m - step)) / (2 * step)
    assert gradient == pytest.approx(slope, rel=1e-6)


def test_the_divergences_at_distance_one() -> None:
    for name, value in {"js": 0.222843, "sf": 0.277157, "sh": 0.117503}.items():
        assert under_q(DIVERGENCES[name].f, 1.0) == pytest.approx(value, abs=5e-7)
    assert under_q(lambda r: DIVERGENCES["js"].h(r) + DIVERGENCES["sf"].h(r), 1.0) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("name", "variance", "within"), [
    ("rkl", 0.0, 1e-12), ("sf", 0.1120, 5e-5), ("js", 0.2564, 5e-5), ("sh", math.exp(0.25) - 1, 1e-9), ("jf", 0.4296, 5e-5),
    ("kl", math.e - 1, 1e-9), ("pearson", math.exp(4) - 1, 1e-6),
])  # fmt: skip
def test_how_much_the_weights_vary(name: str, variance: float, within: float) -> None:
    h = DIVERGENCES[name].h
    assert under_q(lambda r: h(r) ** 2, 1.0) / under_q(h, 1.0) ** 2 - 1 == pytest.approx(variance, abs=within)


@pytest.mark.parametrize("m", [0.3, 0.7])
def test_the_variances_of_kl_and_hellinger_at_any_distance(m: float) -> None:
    for name, variance in (("kl", math.exp(m * m) - 1), ("sh", math.exp(m * m / 4) - 1)):
        h = DIVERGENCES[name].h
        assert under_q(lambda r, h=h: h(r) ** 2, m) / under_q(h, m) ** 2 - 1 == pytest.approx(variance, rel=1e-9)


# ---------------------------------------------------------------- from logits to weights


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_critic_that_sees_no_difference_leaves_reverse_kl(name: str) -> None:
    ratio = density_ratio(torch.zeros(12, 3, dtype=torch.float64))
    assert (ratio == 1).all()
    torch.testing.assert_close(matching_weights(name, ratio), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weights_of_a_batch_have_mean_one(name: str) -> None:
    ratio = density_ratio(torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    weights = matching_weights(name, ratio)
    h = DIVERGENCES[name].h(ratio)
    assert weights.mean().item() == pytest.approx(1, abs=1.01e-6 / h.mean().item())
    torch.testing.assert_close(weights / weights[0], h / h[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_wild_logits_give_finite_weights(name: str) -> None:
    logits = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    ratio = density_ratio(logits)
    assert not ratio.requires_grad
    torch.testing.assert_close(ratio, torch.tensor([20.0, 0.1, 1.0]))
    assert torch.isfinite(matching_weights(name, ratio)).all()
    wide = density_ratio(logits, 1e-9, 1e9)
    torch.testing.assert_close(wide, torch.tensor([math.exp(10), math.exp(-10), 1.0]))


def test_the_logits_of_several_heads_are_averaged_before_the_exponential() -> None:
    logits = torch.tensor([[1.0, -1.0], [0.2, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(density_ratio(logits), torch.tensor([0.0, 0.4], dtype=torch.float64).exp())


def test_an_unknown_divergence_is_named() -> None:
    with pytest.raises(UsageError, match="renyi"):
        matching_weights("renyi", torch.ones(2))


# ---------------------------------------------------------------- bins of noise levels


def test_ratios_are_divided_by_their_bins_average() -> None:
    bins = RatioBins(2).double()
    ratio = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0], dtype=torch.float64)
    seen, _ = bins(ratio, torch.tensor([0.0, 0.49, 0.5, 0.9, 1.0]))
    torch.testing.assert_close(seen, ratio / torch.tensor([2.0, 2.0, 20.0, 20.0, 20.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_a_step_of_gradient_descent_is_the_moving_average_and_empty_bins_keep_theirs(rho: float) -> None:
    bins = RatioBins(3, rho).double()
    with torch.no_grad():
        bins.averages.copy_(torch.tensor([0.7, 1.3, 5.0]))
    before = bins.averages.detach().clone()
    optimizer = torch.optim.SGD(bins.parameters(), lr=bins.rate)
    ratio, place = torch.tensor([2.0, 4.0, 0.5], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.5])
    seen, loss = bins(ratio, place)
    assert torch.equal(bins.averages, before)  # forward changes nothing
    loss.backward()
    optimizer.step()
    expected = torch.tensor([rho * 0.7 + (1 - rho) * 3.0, rho * 1.3 + (1 - rho) * 0.5, 5.0], dtype=torch.float64)
    torch.testing.assert_close(bins.averages.detach(), expected, rtol=1e-6, atol=0)
    assert bins.averages[2] == before[2]
    torch.testing.assert_close(seen, ratio / expected[[0, 0, 1]], rtol=1e-5, atol=0)  # this batch counts already


# ---------------------------------------------------------------- on mixtures whose ratio is known


def wider(mixture: Mixture, factor: float) -> Mixture:
    """A student that blurs: the same modes, `factor` times as wide."""
    return Mixture(mixture.means, mixture.covariances * factor**2, mixture.weights)


def log_density(mixture: Mixture, x_t: Tensor, t: float, labels: Tensor) -> Tensor:
    """log of the noised density, (n,), for Flow."""
    return mixture._terms(x_t, 1 - t, t, labels)[1].squeeze(1).logsumexp(1)


def blurred(n: int, t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noised samples of a student twice as wide as the data, their exact logits ln p/q, and how much the two means differ (n,)."""
    data, generator = standard_mixture(), torch.Generator().manual_seed(1)
    student = wider(data, 2.0)
    x, conditions = student.sample(n, generator)
    labels = conditions.field("label")
    x_t = (1 - t) * x + t * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    logits = log_density(data, x_t, t, labels) - log_density(student, x_t, t, labels)
    time = torch.full((n,), t, dtype=torch.float64)
    teacher, fake = (exact_denoiser(m, Flow()).x0(x_t, time, conditions) for m in (data, student))
    return x_t, logits, (fake - teacher).norm(dim=1)


@pytest.mark.parametrize("t", [0.05, 0.1])
def test_the_mean_ratio_under_the_student_is_one_at_every_level(t: float) -> None:
    n = 5_000
    ratio = blurred(n, t)[1].exp()
    assert abs(ratio.mean().item() - 1) < 4 * ratio.std().item() / math.sqrt(n)


@pytest.mark.parametrize("name", ["js", "sh", "kl"])
def test_h_is_small_where_the_scores_differ_much(name: str) -> None:
    """A paper's figure: samples sorted by |fake - teacher|."""
    _, logits, gap = blurred(8000, 0.05)
    weights = matching_weights(name, density_ratio(logits[:, None]))[gap.argsort()]
    low, middle, high = weights[:2000].mean(), weights[2000:6000].mean(), weights[6000:].mean()
    assert low > middle > high
    assert high < 0.5 * low


def test_normalised_ratios_close_the_gap_between_forward_kl_and_jensen_shannon() -> None:
    """A critic in training is off by a factor that changes with the noise level: the bins take it out."""
    levels = torch.linspace(0.05, 0.95, 10).tolist()
    logits = torch.cat([blurred(400, t)[1] + 2.5 * (t - 0.5) for t in levels])
    place = torch.tensor(levels).repeat_interleave(400)
    ratio = density_ratio(logits[:, None])
    normalised, _ = RatioBins(10).double()(ratio, place)
    spread = {name: [matching_weights(name, r).var().item() for r in (ratio, normalised)] for name in ("kl", "js")}
    (kl, kl_normalised), (js, js_normalised) = spread["kl"], spread["js"]
    assert kl > 2 * js
    assert kl_normalised < 0.5 * kl
    assert kl_normalised - js_normalised < 0.5 * (kl - js)


class Ratio(nn.Module):
    """A critic that holds the answer: logit = a ln p/q + b."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))


def test_the_discriminators_loss_has_its_minimum_at_the_exact_log_ratio() -> None:
    t, n = 0.1, 20_000
    data, generator = standard_mixture(), torch.Generator().manual_seed(2)
    student = wider(data, 2.0)
    exact = []
    for source in (data, student):
        x, conditions = source.sample(n, generator)
        x_t = (1 - t) * x + t * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        density = partial(log_density, x_t=x_t, t=t, labels=conditions.field("label"))
        exact.append(density(data) - density(student))
    critic = Ratio()
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = discriminator_loss(*(critic.a * logit + critic.b for logit in exact))
        value.backward()
        return value

    optimizer.step(loss)
    # The error of the maximum-likelihood estimate: from the curvature at the truth, a few thousandths here.
    both = torch.cat(exact)
    chance = torch.sigmoid(both)
    design = torch.stack([both, torch.ones_like(both)], 1)
    error = torch.linalg.inv((design * (chance * (1 - chance))[:, None]).T @ design).diagonal().sqrt()
    assert abs(critic.a.item() - 1) < 4 * error[0].item()
    assert abs(critic.b.item()) < 4 * error[1].item()
    assert error.max().item() < 0.03
