"""Networks on disk: bit-exact, and a clear line for every broken file."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from distillbench.conditions import Conditions
from distillbench.errors import BadFileError
from distillbench.networks import build, load_network, save_network
from distillbench.networks.files import sha256_file


def make(kind: str = "mlp"):
    small = {"width": 16, "depth": 2, "classes": 3} | ({"size": 8, "heads": 2} if kind == "transformer" else {})
    network = build({"kind": kind, **small}, torch.Generator().manual_seed(5))
    return network.with_second_time().with_log_variance()


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 2])
def test_save_and_load_are_bit_exact(tmp_path, kind, dtype, rank):
    network = make(kind).lora(rank) if rank else make(kind)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    network = network.to(dtype)
    save_network(network, tmp_path / "deep", "student")
    state = torch.get_rng_state()
    loaded = load_network(tmp_path / "deep", "student")
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.to_config() == network.to_config()
    ours, theirs = network.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert {key for key, _ in loaded.named_parameters()} == {key for key, _ in network.named_parameters()}
    x = torch.randn(4, *((2,) if kind == "mlp" else (1, 8, 8)), generator=torch.Generator().manual_seed(1)).to(dtype)
    t, conditions = torch.full((4,), 0.3), Conditions({"label": torch.arange(4)}, {"label": 3})
    a, b = network(x, t, conditions, second_time=t / 2), loaded(x, t, conditions, second_time=t / 2)
    assert torch.equal(a.prediction, b.prediction)
    assert torch.equal(a.log_variance, b.log_variance)
    assert a.prediction.abs().max() > 0


def test_sha256_file_is_the_checksum_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def refused(folder, message: str) -> None:
    with pytest.raises(BadFileError, match=message) as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def edit_card(folder, **changes) -> None:
    path = folder / "network.json"
    card = json.loads(path.read_text())
    card["network"].update(changes)
    path.write_text(json.dumps(card))


def renew_checksum(folder) -> None:
    path = folder / "network.json"
    card = json.loads(path.read_text())
    card["sha256"] = sha256_file(folder / "network.safetensors")
    path.write_text(json.dumps(card))


@pytest.fixture
def saved(tmp_path):
    save_network(make(), tmp_path)
    return tmp_path


def test_missing_files(saved, tmp_path):
    (saved / "network.safetensors").unlink()
    refused(saved, "no such file")
    (saved / "network.json").unlink()
    refused(saved, "cannot be read")


@pytest.mark.parametrize("content", ["", "{", '{"format": 1', "[]", "null", "[" * 100_000, '{"format": 9, "network": {}}', "\x00\x01"])
def test_truncated_or_foreign_card(saved, content):
    (saved / "network.json").write_text(content)
    refused(saved, "network.json")


def test_card_that_is_not_text(saved):
    (saved / "network.json").write_bytes(b"\xff\xfe\x00\x80")
    refused(saved, "not a json file")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(saved, keep):
    path = saved / "network.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, "checksum")
    renew_checksum(saved)
    refused(saved, "not a safetensors file")


def test_changed_weights(saved):
    path = saved / "network.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    refused(saved, "checksum")


def test_foreign_weights(saved):
    save_file({"other": torch.zeros(3)}, saved / "network.safetensors")
    renew_checksum(saved)
    refused(saved, "do not fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "resnet"}, "unknown network kind"),
        ({"color": 1}, "unknown field"),
        ({"width": -3}, "width"),
        ({"width": 17}, "do not fit"),
        ({"width": 65_000}, "do not fit"),
        ({"classes": 0}, "do not fit"),
        ({"log_variance": False}, "do not fit"),
        ({"lora_rank": 2}, "do not fit"),
        ({"width": 10**30}, "width"),
    ],
)
def test_description_that_does_not_fit(saved, changes, message):
    edit_card(saved, **changes)
    refused(saved, message)
