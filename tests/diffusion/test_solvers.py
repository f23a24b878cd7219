import math
from itertools import pairwise

import pytest
import torch

from distillbench.conditions import Conditions
from distillbench.diffusion import (
    EDM,
    SOLVERS,
    Flow,
    Trig,
    VPCosine,
    VPLinear,
    VPTable,
    evaluations,
    evaluations_per_step,
    few_step,
    time_grid,
)
from distillbench.errors import UsageError

TABLE = VPTable(tuple(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()))
SCHEDULES = [Flow(), Flow(3.0), Trig(), VPLinear(), VPCosine(), TABLE, EDM()]
NOISE = torch.linspace(-2, 2, 10, dtype=torch.float64).view(5, 2)
on_all = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{SCHEDULES.index(s)}")
ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "dpmpp_2m": 2}


def errors_of(solver, denoiser, exact, x, first, last, kind):
    """Largest errors at n and 2n steps, on grids uniform in t or in log-SNR."""
    path, errors = denoiser.path, []
    for steps in (64, 128) if solver == "dpmpp_2m" else (32, 64):
        part = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        times = first + part * (last - first)
        if kind == "log_snr":
            times = path.time_of(torch.lerp(path.log_snr(first), path.log_snr(last), part))
        with torch.no_grad():
            found = SOLVERS[solver](denoiser, x, Conditions.none(len(x)), times)
        errors.append((found - exact.flow(last)).abs().max().item())
    return errors


@on_all
@pytest.mark.parametrize("solver", SOLVERS)
def test_order_inside(schedule, solver, gaussian, truth):
    x = schedule.sigma(0.9) * NOISE
    kind = "log_snr" if solver == "dpmpp_2m" else "uniform"  # its error is a series in steps of log-SNR
    coarse, fine = errors_of(solver, gaussian(schedule, "x0"), truth(schedule, x, 0.9), x, 0.9, 0.1, kind)
    assert fine < 0.3
    if (schedule.name, solver) == ("vp_table", "heun"):  # the slope of a table's log-SNR jumps at each entry: no second order in t
        euler = errors_of("euler", gaussian(schedule, "x0"), truth(schedule, x, 0.9), x, 0.9, 0.1, kind)
        assert fine < euler[1] / 10
    else:
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.2)


@on_all
@pytest.mark.parametrize("solver", SOLVERS)
def test_order_from_noise_to_data(schedule, solver, gaussian, truth):
    x = schedule.sigma(1.0) * NOISE
    coarse, fine = errors_of(solver, gaussian(schedule, "x0"), truth(schedule, x, 1.0), x, 1.0, 0.0, "uniform")
    assert fine < 0.3
    if solver == "dpmpp_2m" or (schedule.name, solver) == ("vp_table", "heun"):
        # two orders meet: steps at infinite log-SNR are of first order, and the entries of a table are kinks
        first_order = errors_of("ddim", gaussian(schedule, "x0"), truth(schedule, x, 1.0), x, 1.0, 0.0, "uniform")
        assert fine < first_order[1] / 5
    else:
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.2)


def test_ddim_is_euler_on_a_flow(gaussian, nothing):
    denoiser = gaussian(Flow())
    times = time_grid(Flow(), 7)
    a, b = (SOLVERS[name](denoiser, NOISE, nothing(5), times) for name in ("ddim", "euler"))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_ddim_on_trig_is_a_rotation(gaussian, nothing):
    denoiser = gaussian(Trig())
    t, s = 0.8, 0.3
    angle = (t - s) * math.pi / 2
    f = denoiser.velocity(NOISE, t, nothing(5)) / (math.pi / 2)
    expected = math.cos(angle) * NOISE - math.sin(angle) * f
    torch.testing.assert_close(SOLVERS["ddim"](denoiser, NOISE, nothing(5), [t, s]), expected, rtol=1e-13, atol=1e-13)


def test_first_step_of_dpmpp_is_ddim_and_every_solver_accepts_one_step(gaussian, nothing):
    for schedule in SCHEDULES:
        denoiser, x = gaussian(schedule, "x0"), schedule.sigma(1.0) * NOISE
        results = {name: solve(denoiser, x, nothing(5), [1.0, 0.0]) for name, solve in SOLVERS.items()}
        torch.testing.assert_close(results["dpmpp_2m"], results["ddim"], rtol=1e-12, atol=1e-12)
        assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_what_is_spent(solver, gaussian, nothing):
    denoiser = gaussian(Flow())
    SOLVERS[solver](denoiser, NOISE, nothing(5), time_grid(Flow(), 6))
    assert len(denoiser.network.calls) == evaluations(solver, 6)
    assert evaluations_per_step(solver) == (2 if solver == "heun" else 1)


@on_all
@pytest.mark.parametrize("kind", ["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_time_grids_fall_from_one_to_zero(schedule, kind, steps):
    times = time_grid(schedule, steps, kind)
    assert times.dtype == torch.float64
    assert len(times) == steps + 1
    assert times[0] == 1
    assert times[-1] == 0
    assert all(a > b for a, b in pairwise(times.tolist()))


def test_karras_grid_is_uniform_on_edm():
    torch.testing.assert_close(time_grid(EDM(), 10, "karras"), time_grid(EDM(), 10), rtol=0, atol=1e-12)
    gaps = VPLinear().log_snr(time_grid(VPLinear(), 10, "log_snr"))[:-1].diff()
    torch.testing.assert_close(gaps, gaps[:1].expand_as(gaps), rtol=1e-9, atol=0)


def test_guidance_passes_through_solvers(gaussian):
    conditions = Conditions({"label": torch.ones(5, dtype=torch.int64)}, {"label": 0})
    for solve in SOLVERS.values():
        denoiser = gaussian(Flow())
        times = time_grid(Flow(), 50)
        unguided, guided = (solve(denoiser, NOISE, conditions, times, guidance_scale=w) for w in (1.0, 2.0))
        # labels shift the mean by 1, and guidance is linear in it: the guided flow is that of a mean shifted by 2
        torch.testing.assert_close(guided - unguided, torch.ones_like(NOISE), rtol=0, atol=0.05)


def test_few_step_deterministic_is_ddim(gaussian, nothing):
    for schedule in (Flow(), Trig(), VPCosine()):
        denoiser = gaussian(schedule)
        found = few_step(denoiser, nothing(5), [1.0, 0.6, 0.2], lambda k: NOISE, mode="deterministic")
        torch.testing.assert_close(found, SOLVERS["ddim"](denoiser, NOISE, nothing(5), [1.0, 0.6, 0.2, 0.0]), rtol=1e-12, atol=1e-12)


def test_few_step_renoise_by_hand(gaussian, nothing):
    asked = []

    def noise(k):
        asked.append(k)
        return NOISE.roll(k, 0)

    for schedule in (Flow(), EDM(), VPLinear()):
        asked.clear()
        denoiser = gaussian(schedule, "x0")
        found = few_step(denoiser, nothing(5), torch.tensor([1.0, 0.5], dtype=torch.float64), noise)
        x0 = denoiser.x0(schedule.sigma(1.0) * NOISE, 1.0, nothing(5))
        x = schedule.alpha(0.5) * x0 + schedule.sigma(0.5) * NOISE.roll(1, 0)
        torch.testing.assert_close(found, denoiser.x0(x, 0.5, nothing(5)), rtol=1e-13, atol=1e-13)
        assert asked == [0, 1]


def test_wrong_times_and_names(gaussian, nothing):
    denoiser = gaussian(Flow())
    for times in ([1.0], [0.5, 0.5], [0.2, 0.8], [1.2, 0.0], [1.0, math.nan]):
        with pytest.raises(UsageError, match="fall strictly"):
            SOLVERS["euler"](denoiser, NOISE, nothing(5), times)
    with pytest.raises(UsageError, match="above 0"):
        few_step(denoiser, nothing(5), [1.0, 0.0], lambda k: NOISE)
    with pytest.raises(UsageError, match="renoise"):
        few_step(denoiser, nothing(5), [1.0], lambda k: NOISE, mode="renoised")
    with pytest.raises(UsageError, match="karras"):
        time_grid(Flow(), 3, "karas")
    with pytest.raises(UsageError, match="at least 1"):
        time_grid(Flow(), 0)
