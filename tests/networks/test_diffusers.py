"""Backbones around diffusers models: the model's own numbers, taps, surgery, adapters, derivatives and prices."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from distillbench.api import Conditions, Context, Method, MethodInfo, OptimizerConfig, Stage, Turn, external
from distillbench.budget import Budget
from distillbench.diffusion import Denoiser, Flow
from distillbench.diffusion.derivatives import finite_difference, jvp
from distillbench.errors import ContractError, UsageError
from distillbench.networks import Sana, UNet2D, UNet2DCondition, build, load_network, save_network
from distillbench.networks.diffusers_tools import import_diffusers
from distillbench.training.costs import Macs, count
from distillbench.training.loop import Loop
from distillbench.training.meter import Meter, pass_cost
from toy_pipelines import CROSS, DDPM, SANA, UNET
from toys import ToyStudent

KINDS = {"unet2d": (UNet2D, "UNet2DModel", DDPM), "unet2d_condition": (UNet2DCondition, "UNet2DConditionModel", UNET),
         "sana": (Sana, "SanaTransformer2DModel", SANA)}  # fmt: skip
GUIDED = ("unet2d_condition", "sana")


def network_of(kind, **changes):
    backbone, model_class, config = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return backbone.from_model(getattr(import_diffusers(), model_class)(**{**config, **changes}))


def inputs(network, n=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    c = network.config.model
    x = torch.randn(n, c["in_channels"], c["sample_size"], c["sample_size"], generator=g).to(dtype)
    mask = (torch.arange(5) < torch.tensor([[5], [3]])).long().repeat(n, 1)[:n]
    tokens = torch.randn(n, 5, CROSS, generator=g).to(dtype)
    null = {"tokens": torch.zeros(5, CROSS), "mask": torch.ones(5, dtype=torch.long)}
    return x, torch.rand(n, generator=g).to(dtype), Conditions({"tokens": tokens, "mask": mask}, null)


@pytest.fixture(scope="module", params=list(KINDS))
def network(request):
    return network_of(request.param)


def randomised(network, std=0.1):
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += std * torch.randn(parameter.shape, generator=g)
    return network


def test_kinds_are_known_without_importing_diffusers():
    code = "import sys, distillbench.networks as n; assert 'sana' in n.KINDS; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_says_what_the_raw_model_says(kind):
    _backbone, model_class, config = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        raw = getattr(import_diffusers(), model_class)(**config)
    ours = network_of(kind)
    x, t, conditions = inputs(ours)
    options = {} if kind == "unet2d" else {"encoder_hidden_states": conditions.field("tokens")}
    if kind == "sana":
        options["encoder_attention_mask"] = conditions.field("mask")
    timestep = 1000 * t.double() - float(kind != "sana")
    expected = raw(x, timestep=timestep.float(), **options).sample
    assert torch.equal(ours(x, t, conditions).prediction, expected)


def test_taps_have_their_shapes_and_stopping_keeps_features_and_gradients(network):
    x, t, conditions = inputs(network)
    whole = network(x, t, conditions, taps=network.tap_names)
    assert {name: tuple(value.shape[1:]) for name, value in whole.features.items()} == {n: network.tap_shape(n) for n in network.tap_names}
    first = network.tap_names[0]
    x.requires_grad_(True)
    stopped = network(x, t, conditions, taps=(first,), stop=True)
    assert stopped.prediction is None
    assert torch.equal(stopped.features[first], whole.features[first])
    assert torch.autograd.grad(stopped.features[first].square().sum(), x)[0].abs().sum() > 0
    cost = [count(lambda s=s: network(x, t, conditions, taps=(first,), stop=s)).total for s in (True, False)]
    assert cost[0] < 0.8 * cost[1]
    with pytest.raises(ContractError, match="no tap 'nowhere'"):
        network(x, t, conditions, taps=("nowhere",))


def test_config_and_files_bring_it_back(network, tmp_path):
    x, t, conditions = inputs(network)
    changed = randomised(network.with_log_variance())
    save_network(changed, tmp_path)
    back = load_network(tmp_path)
    out, expected = back(x, t, conditions), changed(x, t, conditions)
    assert back.to_config() == changed.to_config()
    assert torch.equal(out.prediction, expected.prediction)
    assert torch.equal(out.log_variance, expected.log_variance)
    assert expected.log_variance.abs().min() > 0
    assert network.with_log_variance()(x, t, conditions).log_variance.abs().max() == 0
    expected.log_variance.sum().backward()
    assert {key for key, p in changed.named_parameters() if p.grad is not None} == {"log_variance.weight", "log_variance.bias"}


def test_initial_weights_come_from_the_generator_alone(network):
    state = torch.get_rng_state()
    one, same, other = (build(network.to_config(), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    pairs = list(zip(one.parameters(), same.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("kind", GUIDED)
def test_an_added_guidance_input_is_an_exact_no_op_that_can_learn(kind):
    network = network_of(kind)
    x, t, conditions = inputs(network)
    plain = network(x, t, conditions).prediction
    guided = network.with_guidance_input()
    assert torch.equal(guided(x, t, conditions).prediction, plain)
    assert torch.equal(guided(x, t, conditions, guidance=4.0).prediction, plain)
    randomised(guided)
    two = [guided(x, t, conditions, guidance=w).prediction for w in (2.0, 8.0)]
    assert (two[0] - two[1]).abs().max() > 1e-4
    back = build(guided.to_config())
    back.load_state_dict(guided.state_dict())
    assert torch.equal(back(x, t, conditions, guidance=2.0).prediction, two[0])


def test_the_guidance_input_is_fed_as_the_pipelines_feed_it():
    diffusers = import_diffusers()
    from distillbench.networks.diffusers import lcm_features

    w = torch.tensor([1.0, 4.5, 8.0])
    embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    assert torch.allclose(lcm_features(w, 64), embed(None, w - 1, embedding_dim=64), atol=1e-6)


@pytest.mark.parametrize("targets", [(), ("to_q", "to_v")])
def test_adapters_train_alone_and_merge(network, targets):
    x, t, conditions = inputs(network)
    adapted = network.lora(2, torch.Generator().manual_seed(3), alpha=3.0, targets=targets)
    assert torch.equal(adapted(x, t, conditions).prediction, network(x, t, conditions).prediction)
    assert all(".lora_" in name for name, _ in adapted.named_parameters())
    linear = [n for n, m in network.model.named_modules() if isinstance(m, torch.nn.Linear) and (not targets or n.endswith(targets))]
    assert len(list(adapted.parameters())) == 2 * len(linear) > 0
    randomised(adapted, 0.3)
    changed = adapted(x, t, conditions).prediction
    assert (changed - network(x, t, conditions).prediction).abs().max() > 1e-3
    merged = adapted.merged()
    assert not merged.config.lora_rank
    assert torch.allclose(merged(x, t, conditions).prediction, changed, atol=2e-5)
    assert torch.equal(adapted.copy()(x, t, conditions).prediction, changed)
    with pytest.raises(UsageError, match="no linear layer is named nothing"):
        network.lora(2, targets=("nothing",))


@pytest.mark.parametrize("change", ["plain", "qk_norm"])
def test_forward_mode_agrees_with_finite_differences(network, change):
    if change == "qk_norm":
        if network.kind != "sana":
            pytest.skip("for the norms of SANA only")
        network = network_of("sana", qk_norm="rms_norm_across_heads")
    double = network.copy().double()
    x, t, conditions = inputs(double, dtype=torch.float64)
    g = torch.Generator().manual_seed(4)
    direction = (torch.randn(x.shape, generator=g, dtype=torch.float64), torch.rand(2, generator=g, dtype=torch.float64))

    def run(x, t):
        return double(x, t, conditions).prediction

    out, tangent = jvp(run, (x, t), direction)
    near = finite_difference(run, (x, t), direction, 3e-7)
    assert out.dtype == torch.float64
    assert (tangent - near).abs().max() < 1e-5 * tangent.abs().max()


def test_in_float64_it_says_what_it_says_in_float32(network):
    x, t, conditions = inputs(network)
    double = network.copy().double()(x.double(), t.double(), conditions).prediction
    assert (double.float() - network(x, t, conditions).prediction).abs().max() < 2e-4


def test_a_convolution_and_an_attention_block_cost_what_a_hand_count_says():
    diffusers = import_diffusers()
    from diffusers.models.attention_processor import Attention

    x = torch.randn(2, 3, 8, 8)
    convolution = diffusers.UNet2DModel(**DDPM).conv_in
    with torch.no_grad():
        assert count(lambda: convolution(x)) == Macs(matmul=2 * 8 * 8 * 8 * (3 * 9))
        attention = Attention(query_dim=16, heads=2, dim_head=8)
        h = torch.randn(2, 10, 16)
        matmul = 4 * 2 * 10 * 16 * 16 + 2 * 2 * 2 * 10 * 10 * 8  # four projections; scores and their mixture of values
        assert count(lambda: attention(h)).matmul == matmul


class Regress(Method):
    """A student regressed on its teacher and on a derivative of it, so that forward, backward and forward mode are all priced."""

    info = MethodInfo(id="toy", version=1, title="A toy", paper="none", year=2024, family="toy", domain=("diffusion",),
                      needs=("real data",), data_access="real", steps=(1,))  # fmt: skip
    student_type = ToyStudent

    def build(self, context: Context) -> None:
        self.teacher, self.student = context.teacher, context.teacher.copy()

    def stages(self) -> list[Stage]:
        rate = OptimizerConfig(lr=1e-3)
        return [Stage("one", 1.0, [Turn("regress", self.regress, {"student": self.student}, optimizer={"student": rate})])]

    def regress(self, batch):
        x, conditions = batch.data()
        t = batch.rand(batch.size)
        with torch.no_grad():
            read = self.teacher.velocity
            target, tangent = jvp(lambda x, t: read(x, t, conditions), (x, t), (torch.ones_like(x), torch.ones_like(t)))
        guided = self.student.velocity(x, t, conditions, guidance_scale=2.0)
        return (guided - target - 1e-3 * tangent).square().mean()

    def distilled(self):
        return ToyStudent()


class Latents:
    def __init__(self, network):
        self.network = network

    def draw(self, n, generator):
        return torch.randn(n, *inputs(self.network)[0].shape[1:], generator=generator), self.conditions(n, generator)

    def conditions(self, n, generator):
        return inputs(self.network)[2][torch.randint(2, (n,), generator=generator)]


def test_the_meters_prices_are_the_exact_ones(network):
    totals = []
    for exact in (False, True):
        teacher = external(Denoiser(network.copy(), Flow(), "velocity"))
        shape = tuple(inputs(network)[0].shape[1:])
        context = Context(teacher, shape, (1,), seed=0)
        method = Regress()
        method.build(context)
        unit = pass_cost(teacher, shape, inputs(network)[2])
        loop = Loop(method, context, Latents(network), Budget("test", 3, "steps"), unit=unit, batch_size=2, meter=Meter(exact=exact))
        loop.train()
        totals.append(loop.spent.macs)
    assert totals[0] == totals[1]
    assert totals[0] > 0


def test_what_does_not_fit_is_refused_in_one_line(network):
    with pytest.raises(UsageError, match="is a UNet2DModel, not a Linear"):
        UNet2D.from_model(torch.nn.Linear(2, 2))
    config = network.to_config()
    with pytest.raises(UsageError, match=r"unknown field of a .* config 'wrong'"):
        build({**config, "model": {**config["model"], "wrong": 1}})
    with pytest.raises(UsageError, match="offers no second time"):
        network.with_second_time()
    with pytest.raises(UsageError, match="wide, not 1"):
        build({**config, "width": 1})
    if network.kind != "sana":
        with pytest.raises(UsageError, match="takes 3 channels and gives 6"):
            build({**config, "model": {**config["model"], "in_channels": 3, "out_channels": 6}})
