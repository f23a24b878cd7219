"""A student with a network per number of steps: which network is asked, what is counted, and what comes back from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distillbench.api import Conditions
from distillbench.diffusion import Denoiser, Flow, euler, time_grid
from distillbench.errors import BadFileError, ContractError, UsageError
from distillbench.networks import MLP, MLPConfig
from distillbench.parts.student_by_steps import StudentBySteps
from distillbench.randomness import sample_noise
from distillbench.runner import Watch

GRIDS = {1: (1.0,), 2: (1.0, 0.5), 4: (1.0, 0.75, 0.5, 0.25)}


def network(seed: int) -> Denoiser:
    return Denoiser(MLP(MLPConfig(width=8, depth=2, classes=4), torch.Generator().manual_seed(seed)), Flow(), "velocity")


def student(**options: str) -> StudentBySteps:
    """One network for 1 step, another for 2 and 4, seen through two denoisers."""
    one, more = network(1), network(2)
    return StudentBySteps({4: more.with_network(more.network), 1: one, 2: more}, GRIDS, (2,), **options)


def labels(n: int) -> Conditions:
    return Conditions({"label": torch.arange(n) % 4}, {"label": 4})


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_each_number_of_steps_runs_its_own_network_along_euler(steps: int) -> None:
    held = student()
    samples = held.generate(labels(6), steps=steps, seeds=range(6))
    with torch.no_grad():
        expected = euler(network(1 if steps == 1 else 2), sample_noise(range(6), (2,)), labels(6), time_grid(Flow(), steps))
    torch.testing.assert_close(samples.x, expected, rtol=1e-5, atol=1e-6)
    assert samples.evaluations == steps


def test_its_networks_are_counted_once_and_every_call_is_seen() -> None:
    held = student()
    assert held.steps == (1, 2, 4)
    size = sum(p.numel() for p in network(1).parameters())
    assert sum(p.numel() for p in held.denoiser.parameters()) == 2 * size
    for steps in held.steps:
        assert [sum(p.numel() for p in module.parameters()) for module in held.networks(steps)] == [size]
    for steps in held.steps:
        with Watch(held) as watch:
            held.generate(labels(3), steps=steps, seeds=range(3))
        assert watch.rows == 3 * steps


def test_fresh_noise_between_steps_is_another_sampler() -> None:
    kept, fresh = student(), student(mode="renoise")
    first = [s.generate(labels(3), steps=1, seeds=range(3)).x for s in (kept, fresh)]
    later = [s.generate(labels(3), steps=2, seeds=range(3)).x for s in (kept, fresh)]
    assert torch.equal(*first)
    assert not torch.allclose(*later)


@pytest.mark.parametrize("mode", ["deterministic", "renoise"])
def test_it_survives_its_folder_bit_for_bit_and_a_shared_network_is_saved_once(tmp_path: Path, mode: str) -> None:
    held = student(mode=mode)
    held.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"student.json", *(f"network-{n}.{e}" for n in (1, 2) for e in ("json", "safetensors"))}
    loaded = StudentBySteps.load(tmp_path)
    assert (loaded.steps, loaded.grids, loaded.mode) == (held.steps, held.grids, mode)
    assert loaded.denoiser_for(2).network is loaded.denoiser_for(4).network
    for steps in held.steps:
        one, other = (s.generate(labels(5), steps=steps, seeds=range(5)).x for s in (held, loaded))
        assert torch.equal(one, other)


def test_a_sample_depends_on_its_condition_and_seed_alone() -> None:
    together = student().generate(labels(6), steps=4, seeds=range(6)).x
    alone = student().generate(labels(6)[2:4], steps=4, seeds=[2, 3]).x
    torch.testing.assert_close(together[2:4], alone, rtol=1e-5, atol=1e-6)


def test_what_it_cannot_do_is_said_in_one_line() -> None:
    with pytest.raises(UsageError, match="trained for 1, 2, 4 steps, not 3"):
        student().generate(labels(1), steps=3, seeds=[0])
    with pytest.raises(ContractError, match="same counts"):
        StudentBySteps({1: network(1)}, GRIDS, (2,))
    with pytest.raises(ContractError, match="deterministic or renoise"):
        student(mode="fresh")


@pytest.mark.parametrize("change", ["truncated", "outside", "missing"])
def test_a_spoiled_folder_is_refused(tmp_path: Path, change: str) -> None:
    student().save(tmp_path)
    path = tmp_path / "student.json"
    if change == "truncated":
        path.write_text(path.read_text()[:-5])
    elif change == "missing":
        (tmp_path / "network-2.safetensors").unlink()
    else:
        card = json.loads(path.read_text())
        card["parts"]["1"]["weights"] = "../network-1"
        path.write_text(json.dumps(card))
    with pytest.raises(BadFileError):
        StudentBySteps.load(tmp_path)
