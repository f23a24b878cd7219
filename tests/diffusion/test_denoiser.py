import json

import pytest
import torch

from distillbench.api import external, is_external
from distillbench.conditions import Conditions
from distillbench.diffusion import EDM, PREDICTIONS, Denoiser, Flow, Trig, VPCosine, VPLinear, VPTable, jump
from distillbench.errors import UsageError

TABLE = VPTable(tuple(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()))
SCHEDULES = [Flow(), Flow(3.0), Trig(), VPLinear(), VPCosine(), TABLE, EDM(0.002, 20.0)]
X = torch.linspace(-3, 3, 14, dtype=torch.float64).view(7, 2)
TIMES = torch.tensor([0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97], dtype=torch.float64)
on_all = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{SCHEDULES.index(s)}")
READINGS = ("x0", "eps", "velocity", "score")


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@on_all
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_reading_of_every_prediction(schedule, prediction, gaussian, truth, nothing):
    exact = truth(schedule, X, TIMES)
    got = gaussian(schedule, prediction).predict(X, TIMES, nothing(7))
    for reading in READINGS:
        close(getattr(got, reading), getattr(exact, reading))
    close(jump(schedule, got.x0, got.eps, TIMES), X)


@on_all
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", [Flow(), Trig(), VPCosine()], ids=lambda s: s.name)
def test_reading_on_another_path(schedule, prediction, path, gaussian, truth, nothing):
    denoiser = gaussian(schedule, prediction, path=path)
    exact = truth(path, X, TIMES)
    got = denoiser.predict(X, TIMES, nothing(7))
    reached = TIMES < 0.94 if isinstance(schedule, EDM) else TIMES > 0  # EDM here ends at sigma / alpha = 20
    for reading in READINGS:
        close(getattr(got, reading)[reached], getattr(exact, reading)[reached], 1e-9)
    close(jump(path, got.x0, got.eps, TIMES), X)


@on_all
def test_a_number_and_a_batch_of_times_agree(schedule, gaussian, nothing):
    for path in (schedule, Trig()):
        denoiser = gaussian(schedule, "eps", path=path)
        batch = torch.full((7,), 0.4, dtype=torch.float64)
        for reading in READINGS:
            read = getattr(denoiser, reading)
            close(read(X, 0.4, nothing(7)), read(X, batch, nothing(7)), 1e-13)
            close(read(X, torch.tensor(0.4, dtype=torch.float64), nothing(7)), read(X, batch, nothing(7)), 1e-13)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", [Flow(), Trig(), VPCosine()], ids=lambda s: s.name)
@pytest.mark.parametrize("path", [Flow(), Trig(), VPCosine()], ids=lambda s: s.name)
def test_ends_are_finite_and_near_the_truth(schedule, prediction, path, gaussian, truth, nothing):
    denoiser = gaussian(schedule, prediction, path=path)
    at_noise = denoiser.predict(X, 1.0, nothing(7))
    for reading in READINGS:
        close(getattr(at_noise, reading), getattr(truth(path, X, 1.0), reading), 2e-2)
    close(at_noise.x0, truth(path, X, 1.0).x0, 1e-2)
    at_data = denoiser.predict(X, 0.0, nothing(7))
    close(at_data.x0, X, 1e-2)
    close(at_data.eps, torch.zeros_like(X), 5e-2)


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
def test_nothing_is_lost_at_the_ends_of_a_flow(prediction, gaussian, truth, nothing):
    denoiser = gaussian(Flow(), prediction)
    for t in (0.0, 1.0):
        got, exact = denoiser.predict(X, t, nothing(7)), truth(Flow(), X, t)
        close(got.x0, exact.x0, 1e-14)
        close(got.eps, exact.eps, 1e-14)
        close(got.velocity, exact.velocity, 1e-14)


def test_beyond_the_reach_of_the_network(gaussian, nothing):
    denoiser = gaussian(EDM(), "x0", path=Flow())
    got = denoiser.predict(X, torch.tensor([0.0, 1e-4, 0.5, 0.9, 0.99, 0.999, 1.0], dtype=torch.float64), nothing(7))
    times = denoiser.network.calls[-1].t
    assert times[0] == 0
    assert times[-2:].tolist() == [1, 1]
    close(got.x0[0], X[0], 1e-14)
    close(got.eps[-1], X[-1], 1e-14)
    close(denoiser.network.calls[-1].x[-1], X[-1] * (1 + 80.0**2) ** 0.5, 1e-12)
    assert got.x0.isfinite().all()
    assert got.eps.isfinite().all()


def test_the_native_reading_is_the_output_itself(gaussian, nothing):
    for prediction in READINGS:
        got = gaussian(Flow(), prediction).predict(X, 0.3, nothing(7))
        assert getattr(got, prediction) is got.output


def test_half_precision_stays_and_time_is_float32(gaussian, nothing):
    denoiser = gaussian(VPLinear(), "velocity", path=Trig())
    got = denoiser.predict(X.to(torch.bfloat16), TIMES, nothing(7))
    call = denoiser.network.calls[-1]
    assert call.t.dtype == torch.float32
    assert call.x.dtype == torch.bfloat16
    assert denoiser.predict(X.float(), 0.5, nothing(7)).x0.dtype == torch.float32
    assert got.x.dtype == torch.bfloat16


def labels(n: int) -> Conditions:
    return Conditions({"label": torch.arange(n) % 3 + 1}, {"label": 0})


def test_guidance_is_one_doubled_call_equal_to_two(gaussian):
    denoiser = gaussian(VPLinear(), "eps", path=Flow())
    conditions = labels(7)
    guided = denoiser.predict(X, TIMES, conditions, guidance_scale=3.0, taps=("first",))
    (call,) = denoiser.network.calls
    assert len(call.x) == len(call.t) == len(call.conditions) == 14
    assert call.conditions.field("label")[7:].tolist() == [0] * 7
    assert len(guided.features["first"]) == len(guided.log_variance) == 7
    with_condition, without = (denoiser.predict(X, TIMES, c) for c in (conditions, conditions.null()))
    for reading in READINGS:
        a, b = getattr(with_condition, reading), getattr(without, reading)
        close(getattr(guided, reading), b + 3.0 * (a - b))
        assert not torch.allclose(a, b)


def test_guidance_scale_of_each_example(gaussian):
    denoiser = gaussian(Flow())
    scales = torch.linspace(1, 4, 7, dtype=torch.float64)
    together = denoiser.x0(X, TIMES, labels(7), guidance_scale=scales)
    for i, scale in enumerate(scales.tolist()):
        close(together[i : i + 1], denoiser.x0(X[i : i + 1], TIMES[i : i + 1], labels(7)[i : i + 1], guidance_scale=scale))


def test_scale_one_is_unguided_bit_for_bit(gaussian):
    denoiser = gaussian(Flow(), "eps", path=Trig())
    plain, one = denoiser.x0(X, 0.4, labels(7)), denoiser.x0(X, 0.4, labels(7), guidance_scale=1.0)
    assert torch.equal(plain, one)
    assert [len(call.x) for call in denoiser.network.calls] == [7, 7]
    assert [denoiser.evaluations(w) for w in (None, 1, 1.0, 0.0, 2.5, torch.ones(7))] == [1, 1, 1, 2, 2, 2]


def test_second_time_and_guidance_input_reach_the_network(gaussian, nothing):
    denoiser = gaussian(Trig(), "velocity", path=Flow())
    denoiser.predict(X, 0.75, nothing(7), second_time=0.5, guidance=2.0)
    call = denoiser.network.calls[-1]
    close(call.second_time, torch.full((7,), 0.5, dtype=torch.float64), 1e-14)
    assert call.guidance.tolist() == [2.0] * 7
    denoiser.predict(X, 0.75, labels(7), second_time=TIMES, guidance=TIMES, guidance_scale=2.0)
    assert denoiser.network.calls[-1].second_time.shape == denoiser.network.calls[-1].guidance.shape == (14,)


def test_features_stop_the_network(gaussian, nothing):
    denoiser = gaussian(Flow())
    assert set(denoiser.features(X, 0.5, nothing(7), ("a", "b"))) == {"a", "b"}
    assert denoiser.network.calls[-1].stop


def test_copies_are_independent_and_trainable(gaussian):
    teacher = gaussian(Flow())
    external(teacher)
    external(teacher.network)
    copy = teacher.copy()
    assert not is_external(copy)
    assert not is_external(copy.network)
    assert copy.network.mean.requires_grad
    assert not teacher.network.mean.requires_grad
    assert is_external(teacher.network)
    with torch.no_grad():
        copy.network.mean += 1
    assert copy.network.mean != teacher.network.mean
    assert teacher.on(Trig()).network is teacher.network
    assert copy.with_network(teacher.network).network is teacher.network


def test_config_round_trip(gaussian):
    denoiser = gaussian(TABLE, "eps", path=Flow(3.0))
    config = json.loads(json.dumps(denoiser.to_config()))
    again = Denoiser.from_config(config, denoiser.network)
    assert (again.schedule, again.prediction, again.path) == (TABLE, "eps", Flow(3.0))


def test_unknown_prediction(gaussian):
    with pytest.raises(UsageError, match="velocity"):
        gaussian(Flow(), "velocty")
