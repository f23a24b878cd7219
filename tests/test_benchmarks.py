"""The benchmarks at toy size: what they compare is the same work, and their arithmetic is right. No timing is believed here."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch

from distillbench.metrics.extractors import efflite0_installed
from distillbench.networks.diffusers import Sana, UNet2DCondition
from distillbench.networks.diffusers_tools import import_diffusers
from distillbench.teachers.diffusers import open_pipeline
from toy_pipelines import CROSS, SANA, UNET, toy_sana, toy_sd

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """benchmark("name") -> the module of that file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_pairs_take_turns_and_divide_theirs_by_ours(benchmark, monkeypatch):
    pairs = benchmark("pairs")
    now, order = [0.0], []
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: now[0])

    def spending(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    found = pairs.paired(spending("ours", 2.0), spending("theirs", 3.0), 3)
    assert found == [(2.0, 3.0)] * 3
    assert order == ["theirs", "ours", "ours", "theirs"] * 2
    assert pairs.ratio(found) == 1.5
    assert "1.500" in pairs.line("x", found, "at least 1")


@pytest.mark.parametrize(("make", "steps"), [(toy_sd, 4), (toy_sana, 4)])
def test_the_adapter_and_the_bare_pipeline_sample_the_same(benchmark, tmp_path, make, steps):
    sampling = benchmark("sampling_speed")
    folder = make(tmp_path / "toy")
    (folder / "distillbench.json").write_text('{"max_sequence_length": 12, "complex_human_instruction": null}')
    teacher = open_pipeline(folder)
    assert len(sampling.compare(teacher, batch=2, steps=steps, rounds=1)) == 1
    wrong = open_pipeline(make(tmp_path / "other", 1))
    teacher.denoiser.network.load_state_dict({key: value + 0.05 for key, value in wrong.denoiser.network.state_dict().items()})
    teacher.pipeline.scheduler = type(teacher.pipeline.scheduler).from_config(teacher.pipeline.scheduler.config)
    real = sampling.bare_call
    sampling.bare_call = lambda *arguments: real(*arguments) + 1
    try:
        with pytest.raises(AssertionError, match="differ"):
            sampling.compare(teacher, batch=2, steps=1, rounds=1)
    finally:
        sampling.bare_call = real


@pytest.mark.skipif(not efflite0_installed(), reason="the weights of efflite0 are not installed")
def test_both_ways_of_scoring_agree(benchmark, tmp_path):
    pytest.importorskip("torch_fidelity", reason="an install with the published metrics")
    scoring = benchmark("scoring_speed")
    rows = scoring.compare(130, 64, 1, 0, tmp_path, wide=24)
    assert [row.split(",")[0] for row in rows if not row.startswith("  ")] == ["end to end", "statistics", "statistics"]
    assert "width 112" in rows[2]


def test_a_step_in_the_plain_loop_moves_what_its_turns_move(benchmark):
    harness = benchmark("harness_speed")
    instance, _, track = harness.setup("dmd2", "mixture2d")
    plain = harness.Plain(instance, track.source(), 8)
    before = {name: next(getattr(instance, name).parameters()).clone() for name in ("student", "fake")}
    plain.cycle(0.5)
    assert all(not torch.equal(next(getattr(instance, name).parameters()), value) for name, value in before.items())
    sizes = [(turn.batch_size or 8) * turn.repeat for turn in plain.stage.turns]
    assert plain.examples == sum(sizes)


def test_shapes_steps_are_timed_in_alternating_order(benchmark, monkeypatch):
    steps = benchmark("shapes_step_speed")
    order = []

    def counted(name, seconds):
        return lambda method, track, cycles: order.append(name) or seconds

    monkeypatch.setattr(steps, "bare", counted("bare", 1.0))
    monkeypatch.setattr(steps, "harness", counted("harness", 1.02))
    assert steps.compare("cd", "shapes-sd", 2, 3) == [(1.0, 1.02)] * 2
    assert order == ["harness", "bare", "bare", "harness"]


# ---------------------------------------------------------------------- full size


@pytest.mark.parametrize(("name", "least", "most"), [("UNET", 859e6, 860e6), ("SANA", 0.55e9, 0.65e9)])
def test_the_networks_have_the_size_that_is_claimed(benchmark, name, least, most):
    full, diffusers = benchmark("gpu_full_size"), import_diffusers()
    make = diffusers.UNet2DConditionModel if name == "UNET" else diffusers.SanaTransformer2DModel
    with torch.device("meta"):
        parameters = sum(p.numel() for p in make(**getattr(full, name)).parameters())
    assert least < parameters < most


@pytest.mark.parametrize("method", ["dmd2", "swiftbrush", "scm", "sana_sprint"])
def test_a_full_size_row_at_toy_size(benchmark, method):
    full = benchmark("gpu_full_size")
    unet = {**UNET, "block_out_channels": [8, 16], "down_block_types": list(UNET["down_block_types"]),
            "up_block_types": list(UNET["up_block_types"])}  # fmt: skip
    size = full.Size("toy", UNet2DCondition, unet, (4, CROSS), 2.0) if method in ("dmd2", "swiftbrush") else full.Size(
        "toy", Sana, SANA, (4, CROSS), 2.0
    )  # fmt: skip
    found = full.measure(method, size, device="cpu", dtype=torch.bfloat16, rate=1e9, rounds=1, most=2)
    assert found.batch == 2
    examples = found.images_per_second * found.seconds
    assert round(examples) == pytest.approx(examples, rel=1e-9)
    assert round(examples) >= 2
    assert found.share > 0
    assert math.isnan(found.peak_gb)  # the processor's memory is not the card's


def test_without_a_gpu_it_says_so_and_leaves(benchmark, monkeypatch, capsys):
    full = benchmark("gpu_full_size")
    monkeypatch.setattr(full.sys, "argv", ["gpu_full_size.py"])
    monkeypatch.setattr(full.torch.cuda, "is_available", lambda: False)
    assert full.main() == 0
    assert "no GPU here" in capsys.readouterr().out
