"""Adapters on every network: exact no-ops at first, trained alone, scaled by alpha, on their targets, merged."""

import json

import pytest
import torch
from torch import nn

from distillbench.errors import ContractError, UsageError
from distillbench.networks import build
from distillbench.networks.lora import linear_layers
from small_networks import CONFIGS, awake, inputs, seeded


def test_adapters_start_as_no_op_train_alone_and_merge(name, network):
    x, t, conditions = inputs(name)
    before = network(x, t, conditions).prediction
    adapted = network.lora(2)
    assert torch.equal(adapted(x, t, conditions).prediction, before)
    names = {key.rsplit(".", 1)[-1] for key, _ in adapted.named_parameters()}
    assert names == {"up", "down"}
    assert sum(p.numel() for p in adapted.parameters()) < sum(p.numel() for p in network.parameters())
    assert network.state_dict().keys() <= adapted.state_dict().keys()
    adapted(x, t, conditions).prediction.square().sum().backward()
    assert max(p.grad.abs().max() for key, p in adapted.named_parameters() if key.endswith("up")) > 0

    awake(adapted)
    trained = adapted(x, t, conditions).prediction
    assert not torch.allclose(trained, before, atol=1e-2)
    merged = adapted.merged()
    assert merged.to_config() == network.to_config()
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in network.named_parameters()}
    precise = adapted.double().merged()
    x, t, conditions = inputs(name, dtype=torch.float64)
    torch.testing.assert_close(precise(x, t, conditions).prediction, adapted(x, t, conditions).prediction, atol=1e-6, rtol=0)
    with pytest.raises(ContractError, match="merged"):
        adapted.lora(2)


def test_merged_in_single_precision_agrees_to_rounding(name):
    adapted = build(CONFIGS[name]).lora(2)
    for key, parameter in adapted.named_parameters():
        nn.init.normal_(parameter, std=0.02, generator=seeded(len(key)))
    x, t, conditions = inputs(name)
    expected = adapted(x, t, conditions).prediction
    assert expected.abs().max() > 0
    torch.testing.assert_close(adapted.merged()(x, t, conditions).prediction, expected, atol=1e-6, rtol=1e-6)


def test_alpha_scales_what_adapters_add(name, network):
    network.double()
    x, t, conditions = inputs(name, dtype=torch.float64)
    targets = ("last",)  # the output is linear in this layer alone
    adapted = {alpha: awake(network.lora(4, seeded(3), alpha=alpha, targets=targets), seed=5) for alpha in (None, 4.0, 6.0)}
    base = network(x, t, conditions).prediction
    added = {alpha: other(x, t, conditions).prediction - base for alpha, other in adapted.items()}
    assert added[None].abs().max() > 0.01
    torch.testing.assert_close(added[4.0], added[None], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(added[6.0], 1.5 * added[None], rtol=1e-9, atol=1e-12)
    for other in adapted.values():
        merged = other.merged()
        assert merged.to_config() == network.to_config()
        torch.testing.assert_close(merged(x, t, conditions).prediction, other(x, t, conditions).prediction, rtol=1e-9, atol=1e-12)


def test_adapters_sit_on_the_targets_alone_and_nothing_else_is_a_parameter(name, network):
    x, t, conditions = inputs(name)
    target = "hidden.0" if name == "mlp" else "qkv"
    adapted = network.lora(2, alpha=3.0, targets=(target, "last"))
    at = {key.rsplit(".", 1)[0] for key, _ in adapted.named_parameters()}
    assert at == {key for key, _ in network.named_modules() if key == "last" or f".{key}".endswith(f".{target}")}
    assert at > {"last"}
    assert torch.equal(adapted(x, t, conditions).prediction, network(x, t, conditions).prediction)
    awake(adapted)
    assert not torch.allclose(adapted(x, t, conditions).prediction, network(x, t, conditions).prediction, atol=1e-2)
    again = build(json.loads(json.dumps(adapted.to_config())))
    again.load_state_dict(adapted.state_dict())
    assert again.config == adapted.config
    assert torch.equal(again(x, t, conditions).prediction, adapted(x, t, conditions).prediction)
    assert {key for key, _ in adapted.copy().named_parameters()} == {key for key, _ in adapted.named_parameters()}
    assert adapted.resized(8).config.lora_targets == ()


def test_targets_are_whole_parts_of_names_and_must_exist(name, network):
    for target in ("ast", "to_q", "network.last"):
        with pytest.raises(UsageError, match=f"no linear layer is named {target}.*last"):
            network.lora(2, targets=(target,))
    with pytest.raises(UsageError, match="alpha"):
        network.lora(2, alpha=0.0)
    assert linear_layers(network, ("ast",)) == []
    assert linear_layers(network, ("last", "to_q")) == ["last"]
    assert set(linear_layers(network)) == {key for key, module in network.named_modules() if isinstance(module, nn.Linear)}
