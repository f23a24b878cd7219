"""TrigFlow's tangent, its taming and the loss against closed forms in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distillbench.api import Conditions
from distillbench.diffusion import Denoiser, Flow
from distillbench.errors import UsageError
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts.trigflow import (
    TrigFlow,
    consistency_terms,
    moving_loss,
    tamed,
    tangent,
)
from exact_trigflow import NONE, D, N, Says, T, column, flows, gaussian_end, gaussian_slope, normal, says_clean

# ---------------------------------------------------------------- the tangent


def tangent_of(flow: TrigFlow, student: Denoiser, x: Tensor, slope: Tensor, r: float = 1.0) -> Tensor:
    f, j = flow.derivative(student, x, T, NONE, slope)
    return tangent(x, T, f, j, slope, flow.sigma_data, r)


@flows
@pytest.mark.parametrize(("m", "s"), [(0.0, 0.3), (0.8, 0.3), (-0.4, 1.7)])
def test_a_student_that_is_right_for_a_gaussian_has_no_tangent(flow: TrigFlow, m: float, s: float) -> None:
    x = flow.sigma_data * normal(N, D)
    slope = gaussian_slope(flow, x, T, m, s)
    assert tangent_of(flow, says_clean(flow, gaussian_end(flow, m, s)), x, slope).abs().max() < 1e-12
    wrong = tangent_of(flow, says_clean(flow, gaussian_end(flow, m + 0.1, s)), x, slope)
    assert wrong.abs().max() > 1e-3


@flows
def test_the_same_through_the_transform_of_a_flow_network(flow: TrigFlow) -> None:
    m, s = 0.5, 0.4  # of x0
    end = gaussian_end(flow, m, s)

    def velocity(y: Tensor, tau: Tensor) -> Tensor:  # of a flow network whose denoiser is the trajectory's end
        noise = flow.sigma_data / flow.unit
        t = torch.atan2(tau, noise * (1 - tau))
        x = flow.unit * y * column(torch.hypot(t.cos(), noise * t.sin()) / torch.hypot(1 - tau, tau))
        return (y - end(x, t) / flow.unit) / column(tau)

    student = Denoiser(Says(velocity), Flow(), "velocity", path=flow.path)
    x = flow.sigma_data * normal(N, D)
    assert tangent_of(flow, student, x, gaussian_slope(flow, x, T, m, s)).abs().max() < 1e-11


@flows
def test_data_as_wide_as_the_noise_do_not_move_and_have_closed_forms(flow: TrigFlow) -> None:
    d = flow.sigma_data
    x = d * normal(N, D)
    still = gaussian_slope(flow, x, T, 0.0, d)
    assert still.abs().max() == 0
    exact = says_clean(flow, gaussian_end(flow, 0.0, d))
    torch.testing.assert_close(flow.output(exact, x, T, NONE)[0], -column((T / 2).tan()) * x / d, rtol=1e-10, atol=1e-12)
    teacher = says_clean(flow, lambda x, t: column(t.cos()) * x)  # F = 0
    torch.testing.assert_close(tangent_of(flow, teacher, x, still), -column(T.cos() * T.sin()) * x, rtol=1e-10, atol=1e-12)


@flows
def test_on_data_in_one_point_the_teacher_has_no_tangent_and_its_steps_are_exact(flow: TrigFlow) -> None:
    a = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    teacher = says_clean(flow, lambda x, t: a + 0 * x)
    x, d = flow.sigma_data * normal(N, D), flow.sigma_data
    f, _ = flow.output(teacher, x, T, NONE)
    torch.testing.assert_close(f, (column(T.cos()) * x - a) / (d * column(T.sin())), rtol=1e-9, atol=1e-9)
    assert tangent_of(flow, teacher, x, d * f).abs().max() < 1e-12
    z = (x - column(T.cos()) * a) / column(T.sin())
    s = T / 3
    step = column((T - s).cos()) * x - column((T - s).sin()) * d * f
    torch.testing.assert_close(step, column(s.cos()) * a + column(s.sin()) * z, rtol=1e-10, atol=1e-10)


@flows
def test_at_the_start_of_the_warm_up_only_the_teachers_velocity_counts(flow: TrigFlow) -> None:
    x, slope = normal(N, D), normal(N, D, seed=1)
    student = says_clean(flow, gaussian_end(flow, 0.2, 0.6))
    f, _ = flow.output(student, x, T, NONE)
    expected = -column(T.cos() ** 2) * (flow.sigma_data * f - slope)
    torch.testing.assert_close(tangent_of(flow, student, x, slope, r=0.0), expected, rtol=1e-12, atol=1e-12)
    assert tangent_of(flow, student, x, flow.sigma_data * f, r=0.0).abs().max() < 1e-14
    half, whole = (tangent_of(flow, student, x, slope, r=r) for r in (0.5, 1.0))
    torch.testing.assert_close(half, (expected + whole) / 2, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- taming and loss


def test_a_normalised_tangent_is_shorter_than_one_and_keeps_its_direction() -> None:
    g = normal(N, D) * torch.logspace(-3, 3, N, dtype=torch.float64)[:, None]
    length = g.norm(dim=1)
    out = tamed(g, "norm", 0.1)
    torch.testing.assert_close(out.norm(dim=1), length / (length + 0.1))
    assert out.norm(dim=1).max() < 1
    torch.testing.assert_close(out / out.norm(dim=1, keepdim=True), g / length[:, None])
    images = g.view(N, 1, 1, D)
    torch.testing.assert_close(tamed(images, "norm", 0.1).view(N, D), out)
    assert torch.equal(tamed(g, "clip"), g.clamp(-1, 1))
    assert torch.equal(tamed(g, "none"), g)
    with pytest.raises(UsageError, match="treatment of the tangent"):
        tamed(g, "rms")


def test_the_loss_and_its_gradient_are_the_closed_forms() -> None:
    output, w = normal(N, D).requires_grad_(), normal(N, seed=2)
    g = tamed(normal(N, D, seed=1))
    for i in range(N):  # D (L + w) / e^w is the squared length
        losses = moving_loss(output[i : i + 1], g[i : i + 1], -w[i : i + 1])
        squared = D * (sum(losses.values()) + w[i]) / w[i].exp()
        assert squared.item() == pytest.approx(g[i].square().sum().item(), rel=1e-10)
    sum(moving_loss(output, g, -w).values()).backward()
    torch.testing.assert_close(output.grad, -2 * w.exp()[:, None] / D * g / N)
    output.grad = None
    prior = 1 / T.tan()
    moving_loss(output, g, None, prior)["consistency"].backward()
    torch.testing.assert_close(output.grad, -2 * prior[:, None] / D * g / N)


def test_the_best_log_variance_undoes_a_prior() -> None:
    g, prior = normal(N, D), 1 / T.tan()
    output = normal(N, D, seed=1)
    per_sample = prior * g.square().mean(1)
    v = per_sample.log().requires_grad_()
    sum(moving_loss(output, g, v, prior).values()).backward()
    assert v.grad is not None
    assert v.grad.abs().max() < 1e-12


@flows
def test_the_terms_are_the_equations_put_together(flow: TrigFlow) -> None:
    teacher = Denoiser(MLP(MLPConfig(width=16, depth=2, dimension=D), torch.Generator().manual_seed(3)).double(), Flow(), "velocity",
                       path=flow.path)  # fmt: skip
    student = teacher.with_network(teacher.network.with_log_variance())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02)
    conditions = Conditions({"label": torch.arange(N) % 8}, {"label": 8})
    x = flow.sigma_data * normal(N, D)
    terms = consistency_terms(flow, student, teacher, x, T, conditions, r=0.7, c=0.3, prior=True, guidance_scale=1.5)
    slope = flow.sigma_data * flow.output(teacher, x, T, conditions, guidance_scale=1.5)[0]
    f, j = flow.derivative(student, x, T, conditions, slope)
    _, v = flow.output(student, x, T, conditions)
    g = tamed(tangent(x, T, f, j, slope, flow.sigma_data, 0.7), c=0.3)
    expected = (torch.exp(-v) / (flow.sigma_data * T.tan()) * g.square().mean(1)).mean() + v.mean()
    assert sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-9)
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    alone = consistency_terms(flow, student, teacher, x, T, conditions, weighted=False)
    assert list(alone) == ["consistency"]
