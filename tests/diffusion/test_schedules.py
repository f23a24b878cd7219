import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillbench.diffusion import (
    EDM,
    SCHEDULES,
    Flow,
    Schedule,
    Trig,
    VPCosine,
    VPLinear,
    VPTable,
    from_config,
    get_schedule,
    match_scale,
    match_time,
)
from distillbench.errors import UsageError

TABLE = tuple(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist())
TABLES = [VPTable(TABLE), VPTable((0.9, 0.5, 0.1, 0.0))]
ALL = [Flow(), Flow(3.0), Trig(), VPLinear(), VPLinear(1.0, 1.0), VPCosine(), VPCosine(0.0), *TABLES, EDM()]
each = pytest.mark.parametrize("schedule", ALL, ids=lambda s: f"{s.name}-{ALL.index(s)}")
pairs = [(a, b) for a in ALL for b in ALL if a != b]
TIMES = (torch.arange(1, 999, 3, dtype=torch.float64) + 0.4) / 1000  # between the knots of the tables


@each
def test_time_of_inverts_log_snr(schedule: Schedule):
    log_snr = schedule.log_snr(TIMES)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(schedule.time_of(log_snr), TIMES, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.log_snr(schedule.time_of(log_snr)), log_snr, rtol=1e-10, atol=1e-10)


@each
@settings(max_examples=25, deadline=None)
@given(t=st.floats(1e-6, 1 - 1e-6))
def test_inverse_at_single_times(schedule: Schedule, t: float):
    assert abs(schedule.time_of(schedule.log_snr(t)).item() - t) < 1e-10


@each
def test_infinite_log_snr_is_the_end(schedule: Schedule):
    ends = schedule.time_of(torch.tensor([math.inf, -math.inf], dtype=torch.float64))
    assert ends.tolist() == [0.0, 1.0]
    assert schedule.time_of(1e4).item() == pytest.approx(0, abs=1e-12)
    assert schedule.time_of(-1e4).item() == pytest.approx(1, abs=1e-12)


def test_ends_are_exact():
    for schedule in (Flow(), Flow(3.0), Trig(), VPCosine(), VPTable((0.9, 0.5, 0.0))):
        assert schedule.alpha(1.0).item() == 0
        assert schedule.log_snr(1.0).item() == -math.inf
    for schedule in ALL[:-1]:
        assert schedule.sigma(0.0).item() == 0
        assert schedule.alpha(0.0).item() == pytest.approx(1, abs=1e-15)
        assert schedule.log_snr(0.0).item() == math.inf
    assert EDM().sigma(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.002, 80.0], rel=1e-13)


@each
def test_derivatives_are_central_differences(schedule: Schedule):
    h = 1e-6
    inner = TIMES[5:-5]
    for value, derivative in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        difference = (value(inner + h) - value(inner - h)) / (2 * h)
        torch.testing.assert_close(derivative(inner), difference, rtol=1e-6, atol=1e-7)


@each
def test_shapes_and_precision(schedule: Schedule):
    t = torch.full((2, 3), 0.25, dtype=torch.float32)
    for f in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma, schedule.log_snr):
        assert f(t).shape == (2, 3)
        assert f(t).dtype == torch.float64
        assert f(0.25).item() == pytest.approx(f(t)[0, 0].item(), rel=1e-14)


@each
def test_variance_preserving(schedule: Schedule):
    total = schedule.alpha(TIMES) ** 2 + schedule.sigma(TIMES) ** 2
    if schedule.name == "trig" or schedule.name.startswith("vp"):
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("source", "target"), pairs, ids=lambda s: f"{s.name}-{ALL.index(s)}")
def test_matching_keeps_snr_and_signal(source: Schedule, target: Schedule):
    matched = match_time(source, TIMES, target)
    inside = (matched > 0) & (matched < 1)
    assert inside.sum() > 50
    t, u = TIMES[inside], matched[inside]
    torch.testing.assert_close(target.log_snr(u), source.log_snr(t), rtol=1e-9, atol=1e-9)
    scale = match_scale(source, t, target, u)
    torch.testing.assert_close(scale * source.alpha(t), target.alpha(u), rtol=1e-9, atol=0)
    torch.testing.assert_close(scale * source.sigma(t), target.sigma(u), rtol=1e-9, atol=0)
    ends = match_time(source, torch.tensor([0.0, 1.0], dtype=torch.float64), target)
    assert not ends.isnan().any()


def test_known_values():
    assert match_time(Flow(), 0.5, Trig()).item() == pytest.approx(0.5)
    assert match_time(Flow(), 0.5, Flow(3.0)).item() == pytest.approx(0.25)  # 3 t / (1 + 2 t) = 1/2
    assert VPLinear().alpha(1.0).item() == pytest.approx(math.exp(-10.05 / 2))
    table = VPTable(TABLE)
    knots = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(table.alpha(knots) ** 2, torch.tensor(TABLE, dtype=torch.float64), rtol=1e-11, atol=0)
    assert EDM().sigma(0.5).item() == pytest.approx(((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7)


@each
def test_config_round_trip(schedule: Schedule):
    config = json.loads(json.dumps(schedule.to_config()))
    assert from_config(config) == schedule
    assert hash(from_config(config)) == hash(schedule)


def test_every_schedule_is_tested():
    assert {schedule.name for schedule in ALL} == set(SCHEDULES)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("flwo", {}, "did you mean flow"),
        ("flow", {"shfit": 2.0}, "shfit"),
        ("flow", {"shift": 0.0}, "shift must be above 0"),
        ("vp_linear", {"beta_min": 0.0}, "beta_min"),
        ("vp_table", {"alphas_cumprod": [0.5, 0.6]}, "fall strictly"),
        ("vp_table", {"alphas_cumprod": [1.0, 0.6]}, "fall strictly"),
        ("edm", {"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
    ],
)
def test_wrong_names_and_fields(name: str, fields: dict, message: str):
    with pytest.raises(UsageError, match=message):
        get_schedule(name, **fields)
