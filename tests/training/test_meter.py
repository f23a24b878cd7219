"""The meter: exact, cheap, and blind to nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from distillbench.api import Conditions, Method, OptimizerConfig, Stage, Turn
from distillbench.budget import Budget
from distillbench.diffusion import denoiser
from distillbench.diffusion.schedules import Trig, VPLinear, VPTable
from distillbench.errors import MeterError
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.networks.transformer import Transformer, TransformerConfig
from distillbench.training.costs import count
from distillbench.training.meter import Meter
from toys import Toy, toy_loop, toy_teacher


def labels(n: int) -> Conditions:
    return Conditions({"label": torch.arange(n) % 4}, {"label": 4})


def test_a_linear_layer_costs_its_products():
    layer = nn.Linear(8, 16)
    x = torch.randn(5, 8)
    assert count(lambda: layer(x)).matmul == 5 * 8 * 16
    forward_and_backward = count(lambda: layer(x).sum().backward())
    assert forward_and_backward.matmul == 2 * 5 * 8 * 16  # no gradient to the input is asked for
    x.requires_grad_(True)
    assert count(lambda: layer(x).sum().backward()).matmul == 3 * 5 * 8 * 16


def test_a_jacobian_vector_product_is_three_forwards_of_a_linear_layer():
    layer = nn.Linear(8, 16)
    x = torch.randn(5, 8)
    assert count(lambda: torch.func.jvp(layer, (x,), (x,))).matmul == 3 * 5 * 8 * 16


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_agree_with_pytorchs_counter(stride, transposed):
    """Without groups: PyTorch's counter charges the backward pass of a grouped convolution as if it had none."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 6, 3, stride=stride, padding=1)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    with FlopCounterMode(display=False) as theirs:
        layer(x).sum().backward()
    assert 2 * count(lambda: layer(x).sum().backward()).matmul == theirs.get_total_flops()


def test_a_grouped_convolution_costs_its_share_forward_and_backward():
    whole, grouped = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, groups=2)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    costs = [count(lambda layer=layer: layer(x).sum().backward()).matmul for layer in (whole, grouped)]
    assert costs[0] == 2 * costs[1] == 3 * 2 * 6 * 81 * 4 * 9


@pytest.mark.parametrize("causal", [False, True])
def test_fused_and_unfused_attention_cost_the_same(causal):
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))

    def run():
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum(), (q, k, v))

    fused = count(run)
    with sdpa_kernel(SDPBackend.MATH):
        unfused = count(run)
    assert fused.matmul == unfused.matmul
    assert abs(fused.elementwise - unfused.elementwise) <= (7 * 7 * 4 if causal else 0)  # the math kernel builds the mask


@pytest.mark.parametrize(
    "network",
    [
        MLP(MLPConfig(width=32, depth=3, classes=4)),
        Transformer(TransformerConfig(channels=1, size=8, patch=2, width=16, depth=2, heads=2, classes=4)),
    ],
    ids=["mlp", "transformer"],
)
def test_networks_agree_with_pytorchs_counter_where_it_sees(network):
    shape = (2,) if network.kind == "mlp" else (1, 8, 8)
    x, t = torch.randn(3, *shape, requires_grad=True), torch.rand(3)

    def run():
        network(x, t, labels(3)).prediction.square().sum().backward()

    with sdpa_kernel(SDPBackend.MATH):
        mine = count(run)
        with FlopCounterMode(display=False) as theirs:
            run()
    assert mine.matmul == pytest.approx(theirs.get_total_flops() / 2, rel=0.01)
    assert mine.elementwise > 0


@pytest.mark.parametrize("accumulate", [1, 4])
def test_priced_traces_equal_an_always_on_count(accumulate, tmp_path):
    """Random rollout lengths, R1, gradients through frozen networks, work turns, averages: to the last multiply-add."""
    config = Toy.Config(accumulate=accumulate)
    cheap = toy_loop(config=config, folder=tmp_path / "a", checkpoint_seconds=1e9)
    exact = toy_loop(config=config, folder=tmp_path / "b", exact=True, checkpoint_seconds=1e9)
    assert cheap.train().macs == exact.train().macs
    assert cheap.meter.replays < 20
    for a, b in zip(cheap.method.student.parameters(), exact.method.student.parameters(), strict=True):
        assert torch.equal(a, b)  # a replay leaves no trace in the training


class Odd(Toy):
    """Turns that hide their work in odd places."""

    def stages(self):
        optimizer = {"student": OptimizerConfig(lr=1e-3)}
        student = {"student": self.student}
        turns = [Turn(name, getattr(self, name), student, 1, optimizer) for name in ("jvp", "recompute", "vmap", "shared")]
        return [Stage("odd", 1.0, turns)]

    def jvp(self, batch):
        x, c = batch.data()
        t = torch.full((batch.size,), 0.5)
        network = self.student.network
        out, tangent = torch.func.jvp(lambda x: network(x, t, c).prediction, (x,), (torch.ones_like(x),))
        return (out + tangent).square().mean()

    def recompute(self, batch):
        x, c = batch.data()
        return checkpoint(lambda x: self.student.x0(x, 0.5, c), x.requires_grad_(True), use_reentrant=False).square().mean()

    def vmap(self, batch):
        x, _ = batch.data()
        copies = int(batch.choice(3, 1)) + 1
        return torch.func.vmap(self.critic)(x.expand(copies, *x.shape)).mean() + self.student.x0(x, 0.5, batch.conditions()).mean()

    def shared(self, batch):
        x, c = batch.data()
        return self.student.x0(self.student.x0(x, 0.9, c), 0.5, c).square().mean()


def test_odd_places_are_priced_exactly():
    assert toy_loop(Odd).train().macs == toy_loop(Odd, exact=True).train().macs


@pytest.mark.parametrize(
    "path", [None, Trig(), VPLinear(), VPTable(tuple(0.999**i for i in range(1, 101)))], ids=["own", "trig", "vp", "table"]
)
def test_the_price_does_not_depend_on_what_was_cached_before(path):
    teacher = toy_teacher() if path is None else toy_teacher().on(path)
    x = torch.randn(3, 2)

    def run():
        prediction = teacher.predict(x, 0.37, labels(3))
        return prediction.x0 + prediction.eps + prediction.velocity

    denoiser._at.cache_clear()
    denoiser._range.cache_clear()
    assert count(run) == count(run)


def test_every_network_costs_something(tmp_path):
    method = toy_loop(folder=tmp_path).method
    x = torch.randn(3, 2)
    assert count(lambda: method.critic(x)).total > 0
    assert count(lambda: method.teacher.x0(x, 0.5, labels(3))).total > 0


def test_two_runs_on_one_teacher_do_not_see_each_other():
    teacher = toy_teacher()
    first, second = toy_loop(teacher=teacher), toy_loop(teacher=teacher)
    alone = first.train().macs
    assert second.train().macs == alone
    assert not teacher.network._forward_pre_hooks


class Sly(Toy):
    """Costs more from its third turn on, without a call that shows it."""

    def stages(self):
        return [Stage("sly", 1.0, [Turn("sly", self.sly, {"student": self.student}, 1, {"student": OptimizerConfig(lr=1e-3)})])]

    def sly(self, batch):
        loss = self.student.x0(batch.randn(batch.size, 2), 0.5, batch.conditions()).square().mean()
        if batch.count >= 3:
            big = torch.randn(64, 64, generator=batch.generator)
            loss = loss + 0.0 * (big @ big).mean()
        return loss


def test_the_audit_catches_what_the_trace_hides():
    with pytest.raises(MeterError, match="turn 'sly' costs"):
        toy_loop(Sly, meter=Meter(audit_every=5)).train()


def test_the_budget_is_overrun_by_at_most_one_cycle():
    one = toy_loop(budget=Budget("one", 1, "steps")).train().passes
    loop = toy_loop(budget=Budget("p", 3000.0, "passes"))
    spent = loop.train()
    cycles = [loop.spent.passes / loop.spent.cycles, one]
    assert 3000.0 <= spent.passes <= 3000.0 + 3 * max(cycles)  # rollouts of up to three evaluations
    assert isinstance(loop.method, Method)
