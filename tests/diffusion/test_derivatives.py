from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distillbench.conditions import Conditions
from distillbench.diffusion import EDM, Denoiser, Flow, Trig, VPLinear, VPTable, finite_difference, jvp, time_derivative
from distillbench.errors import UsageError

TABLE = VPTable(tuple(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()))
CONDITIONS = Conditions({"label": torch.tensor([1, 2, 1])}, {"label": 0})


class Attention(nn.Module):
    """A small network with attention over the entries of x, labels and time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"lift": (1, 24), "time": (1, 8), "label": (3, 8), "out": (8, 1)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / 2))

    def forward(self, x, t, conditions, *, second_time=None, guidance=None, taps=(), stop=False):
        extra = torch.sin(3 * t[:, None] @ self.time) + self.label[conditions.field("label")]
        q, k, v = ((x[..., None] @ self.lift) + extra.repeat(1, 3)[:, None]).chunk(3, dim=-1)
        hidden = nn.functional.scaled_dot_product_attention(q, k, v)
        return SimpleNamespace(prediction=(torch.tanh(hidden) @ self.out)[..., 0], features={}, log_variance=None)


def batch():
    generator = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return x, dx, torch.tensor([0.2004, 0.5004, 0.8004], dtype=torch.float64)


@pytest.mark.parametrize("of", ["x0", "eps", "velocity", "score"])
@pytest.mark.parametrize("guidance_scale", [None, 2.5])
@pytest.mark.parametrize(
    ("schedule", "path"), [(Flow(), Flow()), (Flow(), Trig()), (VPLinear(), Flow()), (EDM(), Trig()), (TABLE, Trig())], ids=lambda s: s.name
)
def test_jvp_is_the_finite_difference(of, guidance_scale, schedule, path):
    denoiser = Denoiser(Attention(), schedule, "x0" if schedule.name == "edm" else "velocity", path=path)
    x, dx, t = batch()
    options = {"of": of, "guidance_scale": guidance_scale}
    value, tangent = time_derivative(denoiser, x, t, CONDITIONS, dx, 0.7, **options)
    same, difference = time_derivative(denoiser, x, t, CONDITIONS, dx, 0.7, method="finite_difference", h=1e-6, **options)
    torch.testing.assert_close(value, getattr(denoiser, of)(x, t, CONDITIONS, guidance_scale=guidance_scale), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, same, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-5 * float(value.detach().abs().max()))


def test_acceleration_along_the_gaussian_flow(gaussian, truth, nothing):
    """Along the flow of a Gaussian on trig, x' = v, and d v / dt is the second derivative of the closed form."""
    schedule, t, h = Trig(), 0.4, 1e-4
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).view(3, 2)
    exact = truth(schedule, x, t)
    second = (exact.flow(t + h) - 2 * x + exact.flow(t - h)) / h**2
    _, tangent = time_derivative(gaussian(schedule), x, t, nothing(3), exact.velocity, 1.0)
    torch.testing.assert_close(tangent, second, rtol=1e-6, atol=1e-6)


def test_both_outputs_keep_their_graph():
    network = Attention()
    x, dx, t = batch()
    value, tangent = time_derivative(Denoiser(network, Flow(), "velocity"), x, t, CONDITIONS, dx, 1.0)
    by_value, by_tangent = (torch.autograd.grad(y.square().sum(), network.out, retain_graph=True)[0] for y in (value, tangent))
    assert by_value.abs().max() > 0
    assert by_tangent.abs().max() > 0


def test_jvp_and_finite_difference_of_a_plain_function():
    x, v = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    out, tangent = jvp(torch.exp, (x,), (v,))
    torch.testing.assert_close(out, x.exp(), rtol=0, atol=0)
    torch.testing.assert_close(tangent, v * x.exp(), rtol=1e-15, atol=0)
    coarse, fine = ((finite_difference(torch.exp, (x,), (v,), h) - tangent).abs().max() for h in (2e-2, 1e-2))
    assert coarse / fine == pytest.approx(4, rel=1e-3)


def test_wrong_names():
    x, dx, t = batch()
    denoiser = Denoiser(Attention(), Flow(), "velocity")
    with pytest.raises(UsageError, match="velocity"):
        time_derivative(denoiser, x, t, CONDITIONS, dx, 1.0, of="velocities")
    with pytest.raises(UsageError, match="finite_difference"):
        time_derivative(denoiser, x, t, CONDITIONS, dx, 1.0, method="finite")
