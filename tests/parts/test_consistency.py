"""The parts of consistency methods against closed forms, in float64: a point, a Gaussian, the papers' grids and scalings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distillbench.conditions import Conditions
from distillbench.diffusion import Denoiser, broadcast, jump, match_time
from distillbench.diffusion.base import Schedule
from distillbench.diffusion.schedules import EDM, Flow, Trig, VPTable
from distillbench.errors import UsageError
from distillbench.networks.backbone import Output
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.parts import consistency as parts
from distillbench.parts.consistency import ConsistencyFunction, consistency_grid, consistency_path, distance, ode_step, scalings

MEAN, SPREAD = 0.4, 0.6
PATHS = {name: consistency_path(name, Flow()) for name in parts.PARAMS}
ROWS = 64


class Reads(nn.Module):
    """A network that answers fn(x, t, label); labels move the mean, the null label is 0."""

    def __init__(self, fn: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, conditions, *, second_time=None, guidance=None, taps=(), stop=False):
        label = conditions.field("label").to(x.dtype)[:, None] if "label" in conditions else torch.zeros(len(x), 1, dtype=x.dtype)
        return Output(self.fn(x, t, label))


def mean_of(x: Tensor, path: Schedule, t: Tensor, label: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, the variance of x_t and the distance of x from its mean, for N(MEAN + label, SPREAD^2)."""
    alpha, sigma = broadcast(path.alpha(t), x), broadcast(path.sigma(t), x)
    return alpha, alpha**2 * SPREAD**2 + sigma**2, x - alpha * (MEAN + label)


def gaussian(path: Schedule, prediction: str = "x0") -> Denoiser:
    """The exact denoiser of the Gaussian."""

    def answer(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, variance, gap = mean_of(x, path, t, label)
        sigma = broadcast(path.sigma(t), x)
        return MEAN + label + alpha * SPREAD**2 / variance * gap if prediction == "x0" else sigma / variance * gap

    return Denoiser(Reads(answer), path, prediction)


def exact_map(path: Schedule) -> ConsistencyFunction:
    """f*(x, t) = m + s (x - alpha m) / sqrt(V): what the papers' loss should vanish at (paths without scalings)."""

    def answer(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        _, variance, gap = mean_of(x, path, t, label)
        return MEAN + label + SPREAD * gap / variance.sqrt()

    return ConsistencyFunction(Denoiser(Reads(answer), path, "x0"))


def exact_step(x: Tensor, path: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Where the probability flow takes x from t to s."""
    _, before, gap = mean_of(x, path, t)
    alpha, after, _ = mean_of(x, path, s)
    return alpha * MEAN + (after / before).sqrt() * gap


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(value: float, n: int = ROWS) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def labelled(n: int = ROWS) -> Conditions:
    return Conditions({"label": torch.arange(n) % 3 + 1}, {"label": 0})


def mlp(prediction: str, path: Schedule, schedule: Schedule | None = None) -> Denoiser:
    network = MLP(MLPConfig(width=16, depth=2, classes=4), torch.Generator().manual_seed(3)).double()
    return Denoiser(network, schedule or path, prediction, path=path)


# ---------------------------------------------------------------- boundary


@pytest.mark.parametrize("prediction", ["velocity", "x0", "eps"])
@pytest.mark.parametrize("name", parts.PARAMS)
def test_the_function_is_exactly_the_identity_at_the_clean_end(name: str, prediction: str) -> None:
    schedule = Flow() if name in ("edm", "vp") else None
    f = ConsistencyFunction(mlp(prediction, PATHS[name], schedule), sigma_data=0.5)
    x = randn(ROWS, 2)
    t = full(f.t_min)
    t[1::2] = 0.5
    end = f(x, t, labelled())
    assert torch.equal(end[::2], x[::2])
    assert not torch.isclose(end[1::2], x[1::2]).any()
    assert torch.equal(f(x, f.t_min, labelled()), x)


@pytest.mark.parametrize("path", [Trig(), Flow()], ids=lambda p: p.name)
def test_a_velocity_network_needs_no_scalings_for_that(path: Schedule) -> None:
    x = randn(ROWS, 2)
    for schedule in (path, Flow()):
        assert torch.equal(mlp("velocity", path, schedule).x0(x, full(0.0), labelled()), x)
    skip, out = scalings(path, full(0.3))
    assert bool((skip == 0).all())
    assert bool((out == 1).all())


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_the_scalings_are_exactly_one_and_zero_at_the_clean_end(name: str) -> None:
    path = PATHS[name]
    skip, out = scalings(path, parts.clean_time(path))
    assert (skip.item(), out.item()) == (1.0, 0.0)


def test_the_vp_scalings_take_ten_times_the_integer_step() -> None:
    steps = torch.tensor([0, 1, 19, 999], dtype=torch.float64)
    skip, out = scalings(PATHS["vp"], (steps + 1) / 1000)
    s = 10 * steps
    torch.testing.assert_close(skip, 0.25 / (s**2 + 0.25), rtol=1e-9, atol=0)
    torch.testing.assert_close(out, s / (s**2 + 0.25).sqrt(), rtol=1e-9, atol=1e-15)
    assert skip[2] < 7e-6


@pytest.mark.parametrize("d", [0.5, 1.0])
def test_the_edm_scalings_are_songs_on_the_raw_output(d: float) -> None:
    path = PATHS["edm"]
    x, h, t = randn(9, 2), randn(9, 2, seed=1), torch.linspace(0, 1, 9, dtype=torch.float64) ** 5
    sigma = path.sigma(t)[:, None]
    x0 = d**2 / (sigma**2 + d**2) * x + sigma * d / (sigma**2 + d**2).sqrt() * h  # Karras et al. 2022, table 1
    song = d**2 / ((sigma - 0.002) ** 2 + d**2) * x + d * (sigma - 0.002) / (sigma**2 + d**2).sqrt() * h
    skip, out = scalings(path, t, d)
    torch.testing.assert_close(skip[:, None] * x + out[:, None] * x0, song, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- a point, a Gaussian


@pytest.mark.parametrize("name", parts.PARAMS)
def test_for_data_in_one_point_every_ddim_step_is_exact(name: str) -> None:
    path, a, eps = PATHS[name], torch.tensor([0.3, -1.2], dtype=torch.float64), randn(ROWS, 2)
    teacher = Denoiser(Reads(lambda x, t, label: a.expand_as(x)), path, "x0")
    grid = consistency_grid(path, 12)
    f = ConsistencyFunction(teacher)
    for n, t in enumerate(grid[:-1]):
        for s in grid[n + 1 :]:
            x_t, x_s = (jump(path, a.expand(ROWS, 2), eps, time) for time in (t, s))
            landed = ode_step(teacher, x_t, t.expand(ROWS), s.expand(ROWS), Conditions.none(ROWS))
            torch.testing.assert_close(landed, x_s, rtol=1e-12, atol=1e-12)
            if name in ("trig", "flow"):
                y, target = (f(x, time.expand(ROWS), Conditions.none(ROWS)) for x, time in ((x_t, t), (landed, s)))
                assert distance(y, target, "l2").max() < 1e-24


@pytest.mark.parametrize("path", [Trig(), Flow()], ids=lambda p: p.name)
def test_along_the_exact_flow_of_a_gaussian_the_exact_map_has_no_loss(path: Schedule) -> None:
    f, grid = exact_map(path), consistency_grid(path, 10, "uniform")
    for n, t in enumerate(grid[:-1]):
        for s in grid[n + 1 :]:
            x_t = float(path.alpha(t)) * (MEAN + SPREAD * randn(ROWS, 1)) + float(path.sigma(t)) * randn(ROWS, 1, seed=1)
            x_s = exact_step(x_t, path, t.expand(ROWS), s.expand(ROWS))
            y, target = (f(x, time.expand(ROWS), Conditions.none(ROWS)) for x, time in ((x_t, t), (x_s, s)))
            assert distance(y, target, "l2").max() < 1e-26


@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("heun", 3)])
@pytest.mark.parametrize("path", [Trig(), Flow()], ids=lambda p: p.name)
def test_one_teacher_step_leaves_a_residual_of_the_solvers_order(path: Schedule, solver: str, order: int) -> None:
    f, teacher, x, t = exact_map(path), gaussian(path), randn(ROWS, 1), full(0.6)
    residuals = []
    for h in (0.02, 0.01, 0.005):
        s = t - h
        x_s = ode_step(teacher, x, t, s, Conditions.none(ROWS), solver=solver)
        residuals.append((f(x, t, Conditions.none(ROWS)) - f(x_s, s, Conditions.none(ROWS))).square().mean().sqrt().item())
    slopes = [math.log2(residuals[k] / residuals[k + 1]) for k in range(2)]
    assert slopes == pytest.approx([order] * 2, abs=0.05)


def test_heun_on_edm_is_songs() -> None:
    path = PATHS["edm"]
    teacher, x, none = gaussian(path), 3 * randn(ROWS, 1), Conditions.none(ROWS)
    t, s = (path.time_of(-2 * torch.log(full(sigma))) for sigma in (2.0, 1.2))
    slope = (x - teacher.x0(x, t, none)) / 2.0
    ahead = x + (1.2 - 2.0) * slope
    song = x + (1.2 - 2.0) * (slope + (ahead - teacher.x0(ahead, s, none)) / 1.2) / 2
    torch.testing.assert_close(ode_step(teacher, x, t, s, none, solver="heun"), song, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- guidance, equivalence


@pytest.mark.parametrize("solver", parts.SOLVERS)
def test_no_guidance_is_bit_for_bit_the_unguided_step(solver: str) -> None:
    teacher, x, t, s = mlp("velocity", Trig(), Flow()), randn(ROWS, 2), full(0.7), full(0.5)
    plain = ode_step(teacher, x, t, s, labelled(), solver=solver)
    w = 0.0
    assert torch.equal(ode_step(teacher, x, t, s, labelled(), solver=solver, guidance_scale=1 + w), plain)
    each = ode_step(teacher, x, t, s, labelled(), solver=solver, guidance_scale=1 + full(w))
    torch.testing.assert_close(each, plain, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", parts.PARAMS)
def test_guidance_in_x0_and_in_eps_take_the_same_step(name: str) -> None:
    path, x, conditions = PATHS[name], randn(ROWS, 1), labelled()
    w, t, s = torch.linspace(0, 8, ROWS, dtype=torch.float64), full(0.6), full(0.4)
    x0, eps = (
        {key: getattr(gaussian(path, key), key)(x, t, c) for key, c in (("x0", chosen), ("eps", chosen))}
        for chosen in (conditions, conditions.null())
    )
    guided = {key: x0[key] + w[:, None] * (x0[key] - eps[key]) for key in ("x0", "eps")}  # cond + w (cond - uncond), each space by itself
    by_hand = jump(path, guided["x0"], guided["eps"], s)
    for prediction in ("x0", "eps"):
        landed = ode_step(gaussian(path, prediction), x, t, s, conditions, guidance_scale=1 + w)
        torch.testing.assert_close(landed, by_hand, rtol=1e-11, atol=1e-11)


def test_trig_and_vp_take_the_same_ddim_step() -> None:
    vp, trig = PATHS["vp"], Trig()
    t, s = full(0.72), full(0.7)
    angle, lower = (match_time(vp, time, trig) * math.pi / 2 for time in (t, s))
    torch.testing.assert_close(angle.cos(), vp.alpha(t), rtol=1e-12, atol=0)
    x, x0 = randn(ROWS, 2), randn(ROWS, 2, seed=1)
    eps = (x - angle.cos()[:, None] * x0) / angle.sin()[:, None]
    flow = angle.cos()[:, None] * eps - angle.sin()[:, None] * x0  # F of the paper
    rotated = (angle - lower).cos()[:, None] * x - (angle - lower).sin()[:, None] * flow
    for path, now, then in ((vp, t, s), (trig, angle * 2 / math.pi, lower * 2 / math.pi)):
        teacher = Denoiser(Reads(lambda x, t, label: x0), path, "x0")
        torch.testing.assert_close(ode_step(teacher, x, now, then, Conditions.none(ROWS)), rotated, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259]), (8, [999, 879, 759, 639, 499, 379, 259, 139])],
)
def test_the_inference_grids_of_latent_consistency_models(steps: int, expected: list[int]) -> None:
    times = parts.inference_times(consistency_grid(PATHS["vp"], 50), steps)
    assert [round(1000 * t - 1) for t in times] == expected
    assert [1000 * t - 1 for t in times] == pytest.approx(expected, abs=1e-9)


def test_the_ddim_grid_falls_by_twenty_to_the_first_integer_step() -> None:
    assert parts.ddim_steps(50) == list(range(999, 0, -20))
    grid = consistency_grid(PATHS["vp"], 50)
    assert len(grid) == 51
    assert grid[-1].item() == parts.clean_time(PATHS["vp"]) == 0.001


def test_the_edm_grid_is_that_of_karras() -> None:
    n = 18
    i = torch.arange(n, dtype=torch.float64)
    karras = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(PATHS["edm"].sigma(consistency_grid(PATHS["edm"], n, "karras")), karras, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("name", parts.PARAMS)
def test_every_grid_falls_to_the_clean_end(name: str, spacing: str) -> None:
    grid = consistency_grid(PATHS[name], 18, spacing)
    assert bool((grid[:-1] > grid[1:]).all())
    assert grid[0].item() == 1.0
    assert grid[-1].item() == parts.clean_time(PATHS[name])
    assert len(grid) == (18 if name == "edm" else 19)


def test_what_a_grid_cannot_give_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 500"):
        consistency_grid(PATHS["vp"], 501)
    with pytest.raises(UsageError, match="gives no 5 steps"):
        parts.inference_times(consistency_grid(Trig(), 4), 5)
    with pytest.raises(UsageError, match="unknown parameterisation"):
        consistency_path("sideways", Flow())


def test_a_teacher_with_a_table_keeps_it() -> None:
    own = VPTable((0.9, 0.5, 0.2, 0.1))
    assert consistency_path("vp", own) is own
    assert consistency_grid(own, 2).tolist() == [1.0, 0.5, 0.25]
    assert PATHS["vp"].alphas_cumprod[-1] == pytest.approx(4.04e-5, rel=1e-2)  # published for DDPM's betas


# ---------------------------------------------------------------- distances


def test_the_distances_are_what_their_formulas_say() -> None:
    y, target = randn(5, 3, 4), randn(5, 3, 4, seed=1)
    d = (y - target).flatten(1)
    torch.testing.assert_close(distance(y, target, "huber", 0.1), ((d**2 + 0.01).sqrt() - 0.1).mean(1))
    torch.testing.assert_close(distance(y, target, "huber"), d.abs().mean(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(distance(y, target, "huber_sample", 0.1), (d.norm(dim=1) ** 2 + 0.01).sqrt() - 0.1)
    c = 0.00054 * math.sqrt(12)
    torch.testing.assert_close(distance(y, target, "huber_sample"), (d.norm(dim=1) ** 2 + c**2).sqrt() - c)
    torch.testing.assert_close(distance(y, target, "l2"), (d**2).mean(1))
    with pytest.raises(UsageError, match="unknown metric"):
        distance(y, target, "lpips")


@pytest.mark.parametrize("metric", parts.METRICS)
def test_equal_points_have_no_distance_and_a_finite_gradient(metric: str) -> None:
    y = torch.ones(4, 2, requires_grad=True)
    value = distance(y, torch.ones(4, 2), metric, 1e-8).sum()
    value.backward()
    assert value.item() == 0
    assert y.grad is not None
    assert bool((y.grad == 0).all())


def test_a_half_life_halves() -> None:
    assert 0.95 ** parts.half_life(0.95) == pytest.approx(0.5)
    assert 0.5 ** (1 / parts.half_life(0.999)) == pytest.approx(0.999)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("path", [Trig(), Flow()], ids=lambda p: p.name)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_multistep_sampling_of_the_exact_map_gives_the_gaussian(path: Schedule, steps: int) -> None:
    """All is affine in the noises: row 0 is the mean, each other row one unit noise; the variance is the sum of squares."""
    called = []

    def noise(k: int) -> Tensor:
        called.append(k)
        unit = torch.zeros(steps + 1, 1, dtype=torch.float64)
        unit[k + 1] = 1.0
        return unit

    times = parts.inference_times(consistency_grid(path, 12, "uniform"), steps)
    x = parts.multistep(exact_map(path), Conditions.none(steps + 1), times, noise)
    assert called == list(range(steps))  # fresh for every step, and none after the last
    parts_of_variance = (x[1:, 0] - x[0, 0]) ** 2
    assert x[0].item() == pytest.approx(MEAN, abs=1e-12)
    assert parts_of_variance.sum().item() == pytest.approx(SPREAD**2, rel=1e-12)
    assert bool((parts_of_variance > 1e-6).all())


def test_on_edm_the_noise_leaves_out_what_a_clean_end_carries() -> None:
    path = PATHS["edm"]
    f = ConsistencyFunction(Denoiser(Reads(lambda x, t, label: torch.zeros_like(x)), path, "x0"))
    seen = []
    f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    times = consistency_grid(path, 18, "karras")[[0, 9]].tolist()

    def noise(k: int) -> Tensor:
        return torch.full((3, 1), float(k == 1), dtype=torch.float64)  # a start of 0, which this function keeps, then ones

    last = parts.multistep(f, Conditions.none(3), times, noise)
    assert bool((seen[0] == 0).all())
    sigma = float(path.sigma(times[1]))
    torch.testing.assert_close(seen[1], torch.full((3, 1), math.sqrt(sigma**2 - 0.002**2), dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(last, f(seen[1], times[1], Conditions.none(3)), rtol=0, atol=0)


def test_the_edm_path_has_sigma_for_its_time() -> None:
    path = PATHS["edm"]
    assert isinstance(path, EDM)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.sigma(t), torch.tensor([0.002, 40.001, 80.0], dtype=torch.float64), rtol=1e-12, atol=0)
