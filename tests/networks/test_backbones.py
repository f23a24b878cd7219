"""What every network promises: surgery without side effects, exact no-ops, taps, determinism, derivatives."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distillbench.conditions import Conditions
from distillbench.errors import ContractError, UsageError
from distillbench.networks import KINDS, build
from small_networks import CONFIGS, awake, inputs, seeded

SURGERY = {"second_time": "with_second_time", "guidance": "with_guidance_input"}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("argument", SURGERY)
def test_new_input_is_an_exact_no_op_and_has_an_effect_once_trained(name, network, argument):
    x, t, conditions = inputs(name)
    before = network(x, t, conditions).prediction
    extended = getattr(network, SURGERY[argument])()
    value = torch.linspace(0.1, 0.9, len(x))
    after = extended(x, t, conditions, **{argument: value}).prediction
    assert torch.equal(before, after)

    layer = getattr(extended, argument)
    after.square().sum().backward()
    assert layer.weight.grad.abs().max() > 0
    nn.init.normal_(layer.weight, std=0.1, generator=seeded(3))
    first = extended(x, t, conditions, **{argument: value}).prediction
    second = extended(x, t, conditions, **{argument: value + 0.05}).prediction
    assert not torch.allclose(first, before, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-4)
    assert torch.equal(extended(x, t, conditions).prediction, before)


def test_second_time_equal_to_time_changes_nothing_even_when_trained(name, network):
    x, t, conditions = inputs(name)
    extended = network.with_second_time()
    nn.init.normal_(extended.second_time.weight, generator=seeded(3))
    assert torch.equal(extended(x, t, conditions, second_time=t).prediction, network(x, t, conditions).prediction)


def test_log_variance_head_starts_at_zero_and_learns_alone(name, network):
    x, t, conditions = inputs(name)
    before = network(x, t, conditions)
    assert before.log_variance is None
    extended = network.with_log_variance()
    out = extended(x, t, conditions)
    assert torch.equal(out.prediction, before.prediction)
    assert torch.equal(out.log_variance, torch.zeros(len(x)))
    nn.init.normal_(extended.log_variance.weight, generator=seeded(3))
    seen = extended(x, t, conditions).log_variance
    assert seen.std() > 0
    seen.sum().backward()  # the weight of a loss must not move what the loss is about
    assert {key for key, p in extended.named_parameters() if p.grad is not None} == {"log_variance.weight", "log_variance.bias"}


def test_log_variance_depends_on_the_time_alone(name, network):
    x, t, conditions = inputs(name)
    extended = network.with_log_variance()
    nn.init.normal_(extended.log_variance.weight, generator=seeded(3))
    assert torch.equal(extended(x.flip(0), t, conditions).log_variance, extended(x, t, conditions).log_variance)


def test_surgery_leaves_the_original_alone_and_shares_nothing(name, network):
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    config = network.config
    made = [network.copy(), network.with_second_time(), network.with_guidance_input(), network.with_log_variance(), network.lora(2)]
    with torch.no_grad():
        for other in made:
            assert type(other) is type(network)
            for value in other.state_dict().values():
                value.add_(1)
    assert network.config is config
    assert all(torch.equal(value, kept[key]) for key, value in network.state_dict().items())


def test_a_copy_of_a_frozen_network_computes_the_same_and_is_trainable(name, network):
    x, t, conditions = inputs(name)
    network.requires_grad_(False)
    network._distillbench_external = True
    copy = network.copy()
    assert torch.equal(copy(x, t, conditions).prediction, network(x, t, conditions).prediction)
    assert all(parameter.requires_grad for parameter in copy.parameters())
    assert not hasattr(copy, "_distillbench_external")


def test_surgery_keeps_precision(name, network):
    copy = network.double().with_second_time()
    assert {value.dtype for value in copy.state_dict().values()} == {torch.float64}
    assert torch.equal(copy.last.weight, network.last.weight)


def test_all_surgery_together_is_recorded_and_rebuilt(name, network):
    extended = awake(network.with_second_time().with_guidance_input().with_log_variance().lora(3))
    again = build(extended.to_config())
    again.load_state_dict(extended.state_dict())
    x, t, conditions = inputs(name)
    extra = {"second_time": t / 2, "guidance": 3.0}
    first, second = extended(x, t, conditions, **extra), again(x, t, conditions, **extra)
    assert torch.equal(first.prediction, second.prediction)
    assert torch.equal(first.log_variance, second.log_variance)


def test_taps_have_their_shape_and_stop_runs_fewer_layers(name, network):
    x, t, conditions = inputs(name)
    full = network(x, t, conditions, taps=network.tap_names)
    assert torch.equal(full.prediction, network(x, t, conditions).prediction)
    assert tuple(full.features) == network.tap_names
    for tap, value in full.features.items():
        assert value.shape == (len(x), *network.tap_shape(tap))

    calls: list[nn.Module] = []
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, _in, _out: calls.append(module))
    network(x, t, conditions)
    everything = len(calls)
    counts = []
    for tap in network.tap_names:
        calls.clear()
        stopped = network(x, t, conditions, taps=(tap,), stop=True)
        assert stopped.prediction is None
        assert torch.equal(stopped.features[tap], full.features[tap])
        counts.append(len(calls))
    assert counts == sorted(set(counts))
    assert counts[-1] < everything
    both = network(x, t, conditions, taps=(network.tap_names[1], network.tap_names[0]), stop=True)
    assert set(both.features) == set(network.tap_names[:2])


def test_a_sample_does_not_depend_on_its_batch(name, network):
    x, t, conditions = inputs(name)
    whole = network(x, t, conditions).prediction
    for i in range(len(x)):
        alone = network(x[i : i + 1], t[i : i + 1], conditions[i : i + 1]).prediction
        torch.testing.assert_close(alone, whole[i : i + 1], atol=1e-5, rtol=1e-5)


def test_weights_come_from_the_generator_alone(name):
    state = torch.get_rng_state()
    first, second = build(CONFIGS[name], seeded(7)), build(CONFIGS[name], seeded(7))
    assert same_weights(first, second)
    assert not same_weights(first, build(CONFIGS[name], seeded(8)))
    assert same_weights(build(CONFIGS[name]), build(CONFIGS[name], seeded(0)))
    assert same_weights(first.resized(8, seeded(1)), second.resized(8, seeded(1)))
    assert not same_weights(first.resized(8, seeded(1)), first.resized(8, seeded(2)))
    assert same_weights(first.lora(2, seeded(1)), second.lora(2, seeded(1)))
    assert not same_weights(first.lora(2, seeded(1)), first.lora(2, seeded(2)))
    first.copy().with_second_time().lora(2).merged()
    assert torch.equal(torch.get_rng_state(), state)


def test_all_initial_weights_are_finite_and_hidden_features_are_of_order_one(name):
    network = build(CONFIGS[name])
    assert all(value.isfinite().all() for value in network.state_dict().values())
    x, t, conditions = inputs(name, n=64)
    for value in network(x, t, conditions, taps=network.tap_names).features.values():
        assert 0.1 < value.std() < 4


def test_resized_is_a_narrower_network_of_the_same_family(name, network):
    narrow = network.resized(8)
    x, t, conditions = inputs(name)
    assert type(narrow) is type(network)
    assert narrow.config.width == 8
    assert narrow(x, t, conditions).prediction.shape == x.shape
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in network.parameters())


def test_conditions_matter_and_null_is_a_condition_of_its_own(name, network):
    x, t, conditions = inputs(name)
    x, t = x[:1].expand_as(x), t[:1].expand_as(t)
    given, null = network(x, t, conditions).prediction, network(x, t, conditions.null()).prediction
    assert not torch.allclose(given[0], given[1], atol=1e-4)
    assert not torch.allclose(given[0], null[0], atol=1e-4)
    torch.testing.assert_close(null[0], null[1], atol=1e-5, rtol=1e-5)
    if name != "tokens":
        assert torch.equal(network(x, t, Conditions.none(len(x))).prediction, null)


def test_vectors_without_sinusoids_of_x():
    x, t, conditions = inputs("mlp")
    plain = build({**CONFIGS["mlp"], "x_frequencies": 0})
    assert plain.first.in_features == 3 + 2 * plain.config.frequencies
    assert plain(x, t, conditions).prediction.shape == x.shape


def test_a_network_without_classes_ignores_conditions():
    network = awake(build({"kind": "mlp", "classes": 0}))
    x, t = torch.randn(4, 2, generator=seeded(0)), torch.full((4,), 0.5)
    labelled = network(x, t, Conditions({"label": torch.arange(4)})).prediction
    assert torch.equal(labelled, network(x, t, Conditions.none(4)).prediction)


def test_forward_mode_derivative_matches_finite_differences(name):
    # Gentle weights: with wild ones the differences' own second-order error would hide the derivative's.
    network = awake(build(CONFIGS[name]).with_second_time().with_guidance_input(), std=0.05).double()
    x, t, conditions = inputs(name, n=3, dtype=torch.float64)
    direction = torch.randn(x.shape, generator=seeded(4), dtype=torch.float64)

    def f(x, t, s):
        return network(x, t, conditions, second_time=s, guidance=2.0).prediction

    primals, tangents = (x, t, t / 2), (direction, torch.ones_like(t), torch.full_like(t, -0.5))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, derivative = torch.func.jvp(f, primals, tangents)
        h = 1e-6
        ahead, behind = (f(*(p + sign * h * d for p, d in zip(primals, tangents, strict=True))) for sign in (1, -1))
    assert derivative.abs().max() > 0.1
    torch.testing.assert_close(derivative, (ahead - behind) / (2 * h), atol=1e-5, rtol=1e-5)


def test_autocast_gives_back_the_dtype_of_x_and_nearly_the_same(name, network):
    x, t, conditions = inputs(name)
    exact = network(x, t, conditions).prediction
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(x, t, conditions).prediction
    assert rough.dtype == x.dtype
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("sizes", [{"patch": 4, "width": 80}, {"patch": 7, "width": 88}])
def test_image_networks_stay_below_half_a_million_parameters(sizes):
    network = build({"kind": "transformer", "size": 28, "channels": 1, "depth": 4, "heads": 4, **sizes})
    assert 200_000 < sum(p.numel() for p in network.parameters()) < 500_000


def test_cutting_into_patches_and_joining_is_the_identity():
    network = build(CONFIGS["transformer"])
    x = inputs("transformer")[0]
    cut = network._cut(x)
    assert torch.equal(network._joined(cut), x)
    assert torch.equal(cut[0, 1], x[0, :, :4, 4:].reshape(-1))


def test_inputs_that_the_network_lacks_are_refused(name, network):
    x, t, conditions = inputs(name)
    with pytest.raises(ContractError, match="second time"):
        network(x, t, conditions, second_time=t)
    with pytest.raises(ContractError, match="guidance"):
        network(x, t, conditions, guidance=2.0)
    with pytest.raises(ContractError, match=network.tap_names[0]):
        network(x, t, conditions, taps=("middle",))
    with pytest.raises(ContractError, match="stop"):
        network(x, t, conditions, stop=True)
    with pytest.raises(UsageError, match="rank"):
        network.lora(0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "mpl"}, "did you mean mlp"),
        ({}, "unknown network kind"),
        ({"kind": "mlp", "widht": 8}, "did you mean width"),
        ({"kind": "mlp", "width": 0}, "width"),
        ({"kind": "mlp", "width": "8"}, "width"),
        ({"kind": "mlp", "second_time": 1}, "second_time"),
        ({"kind": "mlp", "lora_alpha": -1.0}, "lora_alpha is a number from 0"),
        ({"kind": "mlp", "lora_targets": "last"}, "lora_targets is a list"),
        ({"kind": "mlp", "lora_targets": [3]}, "lora_targets is a list"),
        ({"kind": "mlp", "lora_rank": 2, "lora_targets": ["lats"]}, "no linear layer is named lats"),
        ({"kind": "mlp", "highest_frequency": float("nan")}, "highest_frequency"),
        ({"kind": "transformer", "patch": 5}, "patches of side 5"),
        ({"kind": "transformer", "width": 30}, "multiple of 4"),
    ],
)
def test_a_wrong_config_is_one_clear_line(config, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_our_own_kinds_build_from_their_name_alone(kind):
    network = build({"kind": kind})
    assert type(network) is KINDS[kind]
    assert network.to_config()["kind"] == kind


@pytest.mark.parametrize("kind", ["unet2d", "unet2d_condition", "sana"])
def test_kinds_of_diffusers_need_the_configuration_of_their_model(kind):
    pytest.importorskip("diffusers")
    with pytest.raises(UsageError, match=f"the {kind} config needs width"):
        build({"kind": kind})
