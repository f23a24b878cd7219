"""DisBack where everything is known, in float64: the recorded path in closed form, the step towards its nodes, the exchange of exact nodes.

Where everything is affine in (z, eps), the four points (+-1, +-1) have exactly the moments that matter: their mean is exact.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distillbench.api import Batch, Conditions, Context, external
from distillbench.diffusion import Denoiser, broadcast
from distillbench.diffusion.base import Schedule
from distillbench.diffusion.schedules import EDM, Flow
from distillbench.networks.backbone import Output
from distillbench_methods.disback import DisBack, mismatch

Z = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
EPS = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
SIGMA = 1.0  # the only noise level
DATA, START, WIDTH = 0.7, -0.9, 0.5  # mean of the data and of the untrained student, deviation of both


class Gaussian(nn.Module):
    """E[x0 | x] of N(u, WIDTH^2), of which u alone is trained."""

    def __init__(self, u: float, width: float, schedule: Schedule):
        super().__init__()
        self.u = nn.Parameter(torch.tensor(u, dtype=torch.float64))
        self.width, self.schedule = width, schedule

    def copy(self) -> Gaussian:
        return copy.deepcopy(self)

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Output:
        alpha, sigma = (broadcast(f(t.double()), x) for f in (self.schedule.alpha, self.schedule.sigma))
        return Output(self.u + alpha * self.width**2 / (alpha**2 * self.width**2 + sigma**2) * (x - alpha * self.u))


class Moments(Batch):
    """The four points for z and for eps, and 0 for the level: all losses are at exp(level_mean) and exact."""

    def __init__(self, count: int = 0):
        super().__init__(size=4, count=count, progress=0.0, source=None, generator=torch.Generator())  # type: ignore[arg-type]
        self.points = iter((Z, EPS))

    def conditions(self, within: Any = None) -> Conditions:
        return Conditions.none(4)

    def randn(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64) if len(shape) == 1 else next(self.points)


class Displaced(DisBack):
    """The untrained student gives N(START, WIDTH^2), whatever its network says."""

    at = START

    def generate(self, batch: Batch) -> tuple[Tensor, Conditions]:
        return self.at + self.config.data_std * batch.randn(4, 1), Conditions.none(4)


def made(path: Schedule | None = None, width: float = WIDTH, **knobs: Any) -> Displaced:
    """On x + sigma eps with every loss at SIGMA; data_std is the width, with which levels scale."""
    schedule = path or EDM()
    level = math.log(SIGMA / (width / 0.5))
    method = Displaced(DisBack.Config(**{"nodes": 4, "level_mean": level, "data_std": width, **knobs}))
    method.build(Context(external(Denoiser(Gaussian(DATA, width, schedule), schedule, "x0")), (1,), (1,)))
    return method


def means(method: DisBack) -> list[float]:
    return [method.node(i).network.u.item() for i in range(method.recorded + 1)]


def recorded(method: DisBack, updates: int, rate: float) -> DisBack:
    """Stage 1 by plain gradient descent."""
    (u,) = method.fake.parameters()
    for n in range(method.config.nodes):
        for _ in range(updates):
            (gradient,) = torch.autograd.grad(method.degrade_turn(Moments())["degradation"], u)
            with torch.no_grad():
                u -= rate * gradient
        method.record_turn(Moments(n))
    return method


SHARE = WIDTH**2 / (WIDTH**2 + SIGMA**2)  # a of a x + (1 - a) u
WEIGHT = SIGMA**-2 + 4.0  # of an x0 network's fake-score loss


def test_the_recorded_loss_is_a_parabola_about_the_students_mean() -> None:
    method = made()
    for u in (DATA, 0.1, START):
        with torch.no_grad():
            method.fake.network.u.fill_(u)
        rest = WEIGHT * ((1 - SHARE) ** 2 * WIDTH**2 + SHARE**2 * SIGMA**2)
        found = method.degrade_turn(Moments())["degradation"].item()
        assert found == pytest.approx(WEIGHT * (1 - SHARE) ** 2 * (u - START) ** 2 + rest, rel=1e-12)


def test_nodes_are_gaussians_whose_means_go_geometrically_from_the_data_to_the_student() -> None:
    """Descent at rate h is u <- u - 2 h w (1 - a)^2 (u - m0), so each node divides the distance by the same number."""
    rate, updates = 0.005, 12
    found = means(recorded(made(), updates, rate))
    factor = (1 - 2 * rate * WEIGHT * (1 - SHARE) ** 2) ** updates
    assert found == pytest.approx([START + (DATA - START) * factor**n for n in range(5)], rel=1e-10)
    assert all(later < before for before, later in pairwise(found))
    assert found[0] == DATA


def test_in_small_updates_the_path_is_the_gradient_flows() -> None:
    tau = 0.1  # of one node
    errors = []
    for updates in (50, 100):
        found = means(recorded(made(), updates, tau / updates))
        exact = [START + (DATA - START) * math.exp(-2 * WEIGHT * (1 - SHARE) ** 2 * n * tau) for n in range(5)]
        errors.append(max(abs(a - b) for a, b in zip(found, exact, strict=True)))
    assert errors[0] < 0.01
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05)  # of first order in the rate


def test_walked_back_the_targets_go_monotonically_from_the_student_to_the_data() -> None:
    method = recorded(made(), 12, 0.005)
    stages = method.stages()
    assert [stage.name for stage in stages] == ["recording", "node 3", "node 2", "node 1", "teacher"]
    stages[0].end()
    assert method.fake.network.u.item() == means(method)[4]
    targets = []
    for stage in stages[1:]:
        stage.begin()
        targets.append(method.teacher.network.u.item())
    assert targets == means(method)[3::-1]
    assert all(before < after for before, after in pairwise([START, *targets]))
    assert targets[-1] == DATA


def gradient(method: Displaced, m: float) -> float:
    """Of a student at N(m, width^2) whose fake score is exact, at each sample; it is the same number for all."""
    with torch.no_grad():
        method.fake.network.u.fill_(m)
    x = (m + method.config.data_std * Z).requires_grad_()
    method.student_loss(
        x, torch.full((4,), float(method.teacher.path.time_of(-2 * math.log(SIGMA)))).double(), EPS, Conditions.none(4)
    ).backward()
    found = 4 * x.grad
    torch.testing.assert_close(found.mean().expand_as(found), found, rtol=1e-2 if method.config.weighting == "inv_l1" else 1e-10, atol=0)
    return found.mean().item()


def test_in_plain_descent_the_step_to_a_node_is_smaller_than_to_the_teacher_by_the_distance() -> None:
    """(1 - a) (m - u): the way back cannot be faster where every score is exact."""
    method = recorded(made(weighting="none"), 12, 0.005)
    steps = []
    for i in (3, 2, 1, 0):
        method.backtrack(i)
        steps.append(gradient(method, START))
        assert steps[-1] == pytest.approx((1 - SHARE) * (START - means(method)[i]), rel=1e-7)
    assert all(later < before < 0 for before, later in pairwise(steps))


def test_with_dmds_normaliser_the_step_does_not_know_the_distance() -> None:
    """Of a narrow student: |gap| / |x - D| goes to 1 as width / distance goes to 0."""
    width = 1e-3
    method = recorded(made(width=width), 12, 0.005)
    for i in (3, 2, 1, 0):
        method.backtrack(i)
        assert gradient(method, START) == pytest.approx(-1, rel=10 * width / abs(START - means(method)[i]))


def test_the_mismatch_with_a_near_node_is_smaller_than_with_the_teacher() -> None:
    """(1 - a) |m - u| / E |x - a x_t - (1 - a) u|, which grows with the distance up to 1."""
    method = recorded(made(), 12, 0.005)
    x, t = START + WIDTH * Z, method.times("lognormal", Moments())
    with torch.no_grad():
        method.fake.network.u.fill_(START)
    found = [mismatch(x, t, EPS, Conditions.none(4), method.node(i), method.fake).item() for i in (4, 3, 2, 1, 0)]
    for i, value in zip((4, 3, 2, 1, 0), found, strict=True):
        u = means(method)[i]
        rest = ((1 - SHARE) * (x - u) - SHARE * SIGMA * EPS).abs().mean().item()
        assert value == pytest.approx((1 - SHARE) * (u - START) / rest, rel=1e-7)
    assert found[0] < found[1] < found[2] < 0.999
    assert found[3:] == pytest.approx([1, 1])  # of four points all lie on one side of a far target, and the mean of |.| is the distance


# ---------------------------------------------------------------- nodes that are exact mixtures


class TwoModes(nn.Module):
    """E[x0 | x] of two Gaussians of one width in the plane; their means are its weights."""

    def __init__(self, means: Tensor, width: float, schedule: Schedule):
        super().__init__()
        self.means, self.width, self.schedule = nn.Parameter(means), width, schedule

    def copy(self) -> TwoModes:
        return copy.deepcopy(self)

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Output:
        alpha, sigma = (broadcast(f(t.double()), x) for f in (self.schedule.alpha, self.schedule.sigma))
        variance = alpha**2 * self.width**2 + sigma**2
        squares = (x[:, None] - alpha[..., None] * self.means).square().sum(-1)
        modes = (-squares / (2 * variance)).softmax(1)
        shrunk = alpha * self.width**2 / variance
        return Output(shrunk * x + (1 - shrunk * alpha) * (modes @ self.means))


def test_the_exchange_of_exact_mixtures_draws_a_student_to_the_present_nodes_means() -> None:
    """Nodes are mixtures whose means lie between the data's and the student's; no training, the fake score is the student's own."""
    data = torch.tensor([[2.0, 0.0], [-2.0, 0.5]], dtype=torch.float64)
    first = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    width, path = 0.1, Flow()
    points, noise = torch.cartesian_prod(Z[1:3, 0], Z[1:3, 0]), torch.cartesian_prod(EPS[:2, 0], EPS[:2, 0])
    everywhere, t, nobody = width * points.repeat_interleave(4, 0), torch.full((16,), 0.1).double(), Conditions.none(16)
    still = 1 - 0.9**2 * width**2 / (0.9**2 * width**2 + 0.1**2)  # of the distance of means, in the gap of denoisers
    method = DisBack(DisBack.Config(nodes=3, weighting="none"))
    method.build(Context(external(Denoiser(TwoModes(data, width, path), path, "x0")), (2,), (1,)))
    for i in (1, 2, 3):
        with torch.no_grad():
            method.node(i).network.means.copy_(data + (first - data) * i / 3)
    method.recorded = 3
    method.start_fake()
    for i in (2, 1, 0):
        method.backtrack(i)
        target = data + (first - data) * i / 3
        torch.testing.assert_close(method.teacher.network.means.detach(), target, rtol=0, atol=0)
        fake = method.fake.network.means.detach().clone()
        for mode in (0, 1):
            x = (fake[mode] + everywhere).requires_grad_()
            method.student_loss(x, t, noise.repeat(4, 1), nobody).backward()
            expected = still * (fake[mode] - target[mode])  # at this level no point could belong to the other mode
            torch.testing.assert_close(16 * x.grad, expected.expand(16, 2), rtol=1e-6, atol=1e-9)
        with torch.no_grad():  # the student has arrived, and its fake score with it: no gradient is left
            method.fake.network.means.copy_(target)
        x = (target[0] + everywhere).requires_grad_()
        method.student_loss(x, t, noise.repeat(4, 1), nobody).backward()
        assert x.grad.abs().max() == 0
