"""TrigFlow against closed forms in float64: the wrapper, the transform of SANA-Sprint, the derivative and the angles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distillbench.diffusion import EDM, Denoiser, Flow, Trig, VPLinear, ddim, euler, jump, match_time, time_grid
from distillbench.diffusion.base import Schedule
from distillbench.errors import UsageError
from distillbench.metrics.wasserstein import sliced_w2
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts.trigflow import (
    HALF_PI,
    LATEST,
    TrigFlow,
    TrigPath,
    check_grid,
    lognormal_angles,
    sampling_angles,
    tangent,
)
from distillbench.randomness import sample_noise
from distillbench.tracks import get_track
from exact_trigflow import NONE, D, N, Says, T, column, flows, gaussian_slope, normal

# ---------------------------------------------------------------- the wrapper


@flows
@pytest.mark.parametrize("schedule", [Flow(), EDM(), VPLinear(), Trig()], ids=lambda s: s.name)
@pytest.mark.parametrize("prediction", ["x0", "eps", "velocity"])
def test_a_gaussian_teacher_of_any_kind_becomes_the_gaussians_trig_velocity(flow: TrigFlow, schedule: Schedule, prediction: str) -> None:
    m, s = 0.4, 0.7  # of the data; x0 is `unit` times them

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        (alpha, sigma), (d_alpha, d_sigma) = ((column(v) for v in pair) for pair in (schedule.levels(t), schedule.slopes(t)))
        x0 = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * m)
        eps = (x - alpha * x0) / sigma
        return {"x0": x0, "eps": eps, "velocity": d_alpha * x0 + d_sigma * eps}[prediction]

    t, x = T[2:], flow.sigma_data * normal(N - 2, D)
    wrapped = Denoiser(Says(teacher), schedule, prediction, path=flow.path)
    f, _ = flow.output(wrapped, x, t, NONE)
    expected = gaussian_slope(flow, x, t, flow.unit * m, flow.unit * s)
    torch.testing.assert_close(flow.sigma_data * f, expected, rtol=1e-8, atol=1e-8)
    clean = column(t.cos()) * x - column(t.sin()) * flow.sigma_data * f
    torch.testing.assert_close(flow.unit * flow.clean(wrapped, x, t, NONE), clean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("d", [0.5, 1.0, 2.0])
def test_the_angle_of_a_noise_level_is_edms_and_the_flows(d: float) -> None:
    path, t = TrigFlow(d).path, T / HALF_PI
    torch.testing.assert_close(EDM(1e-6, 1e6).sigma(match_time(path, t, EDM(1e-6, 1e6))), d * T.tan(), rtol=1e-9, atol=0)
    torch.testing.assert_close(match_time(path, t, Flow()), d * T.sin() / (T.cos() + d * T.sin()), rtol=1e-12, atol=0)
    torch.testing.assert_close(path.time_of(path.log_snr(t)), t, rtol=1e-12, atol=0)
    h = 1e-6
    torch.testing.assert_close(path.slopes(t)[1], (path.sigma(t + h) - path.sigma(t - h)) / (2 * h), rtol=1e-8, atol=0)
    torch.testing.assert_close(path.slopes(t)[0], (path.alpha(t + h) - path.alpha(t - h)) / (2 * h), rtol=1e-8, atol=1e-8)


def test_the_path_of_unit_noise_is_trig_itself() -> None:
    assert TrigFlow(0.5, 0.5).path == Trig()
    assert TrigFlow(0.5).path == TrigPath(0.5)
    with pytest.raises(UsageError, match="noise must be above 0"):
        TrigPath(0.0)


@flows
def test_students_are_kept_at_the_same_noise_level_on_trig(flow: TrigFlow) -> None:
    angles = (HALF_PI, 1.3, 1.1, 0.6)
    times = torch.tensor(flow.path_times(angles), dtype=torch.float64)
    assert times[0] == 1.0
    there = flow.path.log_snr(torch.tensor(angles[1:], dtype=torch.float64) / HALF_PI)
    torch.testing.assert_close(Trig().log_snr(times[1:]), there, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- the transform of a flow network


def test_the_identities_of_the_transform() -> None:
    tau = T.sin() / (T.sin() + T.cos())
    torch.testing.assert_close(match_time(Trig(), T / HALF_PI, Flow()), tau, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.atan(tau / (1 - tau)), T, rtol=1e-13, atol=0)
    rate = torch.func.jvp(lambda t: match_time(Trig(), t / HALF_PI, Flow()), (T,), (torch.ones_like(T),))[1]
    torch.testing.assert_close(rate, tau**2 + (1 - tau) ** 2, rtol=1e-11, atol=0)
    torch.testing.assert_close((tau**2 + (1 - tau) ** 2).sqrt(), 1 / (T.sin() + T.cos()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("d", [0.5, 1.0])
def test_the_transform_reads_f_and_the_flows_denoiser_from_any_velocity(d: float) -> None:
    flow, t = TrigFlow(d, d), torch.cat([torch.zeros(1, dtype=torch.float64), T[1:-1], torch.full((1,), HALF_PI, dtype=torch.float64)])
    tau = t.sin() / (t.sin() + t.cos())
    scale = (1 - 2 * tau + 2 * tau**2).sqrt()
    x, v = d * normal(N, D), normal(N, D, seed=1)
    seen: list[Tensor] = []
    wrapped = Denoiser(Says(lambda y, _: seen.append(y) or v), Flow(), "velocity", path=flow.path)
    y = column(scale) * x / d
    f, _ = flow.output(wrapped, x, t, NONE)
    torch.testing.assert_close(seen[0], y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(f, (column(1 - 2 * tau) * y + column(scale**2) * v) / column(scale), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(column(t.cos()) * x - column(t.sin()) * d * f, d * (y - column(tau) * v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.clean(wrapped, x, t, NONE), y - column(tau) * v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(f[-1], v[-1] - y[-1], rtol=1e-12, atol=1e-12)  # pi / 2
    torch.testing.assert_close(f[0], v[0] + y[0], rtol=1e-12, atol=1e-12)  # 0


@flows
def test_the_true_velocity_gives_noise_and_data_back(flow: TrigFlow) -> None:
    y, eps = normal(N, D), normal(N, D, seed=1)
    x = flow.noised(y, eps, T)
    torch.testing.assert_close(x, column(T.cos()) * flow.unit * y + column(T.sin()) * flow.sigma_data * eps, rtol=1e-12, atol=1e-12)
    f, _ = flow.output(Denoiser(Says(lambda *_: eps - y), Flow(), "velocity", path=flow.path), x, T, NONE)
    expected = column(T.cos()) * eps - column(T.sin()) * flow.unit / flow.sigma_data * y
    torch.testing.assert_close(f, expected, rtol=1e-11, atol=1e-11)


def test_fifty_steps_of_the_teacher_are_the_same_before_and_after_the_transform() -> None:
    track = get_track("mixture2d")
    teacher, source = track.teacher(), track.source()
    wrapped = teacher.on(TrigFlow(0.5, 0.5).path)
    n = 2048
    conditions = source.conditions(n, torch.Generator().manual_seed(0))
    noise = sample_noise(range(n), track.shape)
    with torch.no_grad():
        before = ddim(teacher, noise, conditions, time_grid(Flow(), 50))
        times = match_time(Flow(), time_grid(Flow(), 50), Trig())
        after = ddim(wrapped, noise, conditions, times)
        by_angle = euler(wrapped, noise, conditions, time_grid(Trig(), 50))
        few = euler(wrapped, noise, conditions, time_grid(Trig(), 2))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)  # the same steps: float precision through 50 of them
    assert (after - before).abs().mean() < 1e-5
    change, error = (sliced_w2(other.double().numpy(), before.double().numpy(), projections=32, seed=0) for other in (by_angle, few))
    assert change < 0.1 * error  # other steps of the same flow: their own discretisation only


# ---------------------------------------------------------------- the derivative


@flows
@pytest.mark.parametrize("schedule", [Flow(), VPLinear()], ids=lambda s: s.name)
def test_the_jvp_is_the_derivative_along_the_teachers_trajectory(flow: TrigFlow, schedule: Schedule) -> None:
    network = MLP(MLPConfig(width=16, depth=2, dimension=D), torch.Generator().manual_seed(3)).double()
    student = Denoiser(network, schedule, "velocity", path=flow.path)
    x, slope, t = normal(N, D), normal(N, D, seed=1), T.clamp(max=1.4)
    f, j = flow.derivative(student, x, t, NONE, slope)
    h = 1e-6
    ahead, behind = (flow.output(student, x + k * h * slope, t + k * h, NONE)[0] for k in (1, -1))
    expected = column(t.cos() * t.sin()) * (ahead - behind) / (2 * h)
    assert ((j - expected).norm() / expected.norm()).item() < 1e-5
    torch.testing.assert_close(f, flow.output(student, x, t, NONE)[0], rtol=1e-12, atol=1e-12)
    same, by_differences = flow.derivative(student, x, t, NONE, slope, method="fd")
    assert ((by_differences - j).norm() / j.norm()).item() < 1e-3
    torch.testing.assert_close(same, f, rtol=1e-12, atol=1e-12)
    with pytest.raises(UsageError, match="unknown way to J"):
        flow.derivative(student, x, t, NONE, slope, method="autograd")


def test_a_time_input_of_1000_tau_makes_the_time_derivative_a_thousand_times_larger() -> None:
    network = MLP(MLPConfig(width=16, depth=2, dimension=D), torch.Generator().manual_seed(3)).double()
    dense = Denoiser(network, Flow(), "velocity", path=Trig())
    coarse = Denoiser(Says(lambda x, t: network(x, 1000 * t, NONE).prediction), Flow(), "velocity", path=Trig())
    x, tau = normal(N, D), torch.full((N,), 4e-4, dtype=torch.float64)
    still = torch.zeros_like(x)
    by_tau, by_thousand = (
        torch.func.jvp(lambda t, f=f: f(x, t, NONE).prediction, (at,), (torch.ones_like(tau),))[1]
        for f, at in ((network, 1000 * tau), (coarse.network, tau))
    )
    torch.testing.assert_close(by_thousand, 1000 * by_tau, rtol=1e-10, atol=0)
    lengths = []
    for student in (dense, coarse):  # what it does to the tangent before it is normalised
        f, j = TrigFlow().derivative(student, x, T, NONE, still)
        lengths.append(tangent(x, T, f, j, still, 1.0).norm())
    assert lengths[1] > 50 * lengths[0]


# ---------------------------------------------------------------- angles


def test_training_angles_are_lognormal_in_edms_sigma() -> None:
    draws = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    t = lognormal_angles(draws, -1.0, 1.4, 0.5)
    assert t.dtype == torch.float64
    assert t.max() <= LATEST
    torch.testing.assert_close((0.5 * t.tan()).log(), -1.0 + 1.4 * draws.double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(lognormal_angles(draws, -1.0 + math.log(2), 1.4, 1.0), t, rtol=1e-12, atol=0)  # data of twice the width
    assert lognormal_angles(torch.tensor([50.0]), 0.0, 1.4, 1.0).item() == LATEST


def test_sampling_angles() -> None:
    assert sampling_angles(1, 1.1) == (HALF_PI,)
    assert sampling_angles(2, 1.1) == (HALF_PI, 1.1)
    assert sampling_angles(4, 1.1) == (HALF_PI, 1.3, 1.1, 0.6)
    assert sampling_angles(3, 1.1) == pytest.approx((HALF_PI, math.pi / 3, math.pi / 6))
    assert sampling_angles(2, 1.1, (1.5, 0.9)) == (1.5, 0.9)
    assert sampling_angles(4, 1.1, (1.5, 0.9)) == (HALF_PI, 1.3, 1.1, 0.6)
    check_grid((HALF_PI, 1.1))
    for wrong in ((1.6,), (1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(UsageError, match="fall strictly"):
            check_grid(wrong)


def test_multistep_sampling_renoises_at_the_angles() -> None:
    """One step of few_step on Trig is cos x0 + sin d eps in the convention's own units."""
    flow = TrigFlow(0.5)
    x0, eps = normal(N, D), normal(N, D, seed=1)
    (time,) = flow.path_times((1.1,))
    on_trig = jump(Trig(), x0, eps, time)
    scale = math.hypot(math.cos(1.1), 0.5 * math.sin(1.1))
    torch.testing.assert_close(scale * on_trig, math.cos(1.1) * x0 + 0.5 * math.sin(1.1) * eps, rtol=1e-12, atol=1e-12)
