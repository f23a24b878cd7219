"""Our statistics against those of clean-fid, torchmetrics and torch-fidelity, on the same features, where they are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from distillbench.metrics.frechet import frechet_distance
from distillbench.metrics.kernel import kernel_distance
from distillbench.metrics.prdc import prdc

PACKAGES = {"clean-fid": "cleanfid", "torchmetrics": "torchmetrics", "torch-fidelity": "torch_fidelity"}


def _benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "metrics_speed.py"
    spec = importlib.util.spec_from_file_location("metrics_speed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published() -> tuple[ModuleType, dict[str, Any], dict[str, str]]:
    benchmark = _benchmark()
    if not any(importlib.util.find_spec(name) for name in PACKAGES.values()):
        return benchmark, {}, {}
    return benchmark, *benchmark.load_published()


def available(published: tuple[ModuleType, dict[str, Any], dict[str, str]], package: str) -> tuple[ModuleType, dict[str, Any]]:
    benchmark, modules, missing = published
    if package not in modules:
        pytest.skip(f"{package}: {missing.get(package, 'not installed')}")
    return benchmark, modules


def features() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((32, 32)) / 6
    return np.maximum(generator.standard_normal((300, 32)) @ mixing + 0.1, 0), np.maximum(generator.standard_normal((300, 32)) @ mixing, 0)


@pytest.mark.parametrize("package", PACKAGES)
def test_frechet_agrees(published: Any, package: str) -> None:
    benchmark, modules = available(published, package)
    generated, reference = features()
    assert benchmark.frechet_routines(modules)[package](generated, reference) == pytest.approx(
        frechet_distance(generated, reference), rel=1e-6
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_kernel_distance_agrees_on_one_subset_of_all_rows(published: Any, package: str) -> None:
    benchmark, modules = available(published, package)
    generated, reference = features()
    theirs = benchmark.kernel_routines(modules, subsets=1, size=300)[package](generated, reference)
    assert theirs == pytest.approx(kernel_distance(generated, reference), rel=1e-6)


def test_precision_and_recall_agree(published: Any) -> None:
    benchmark, modules = available(published, "torch-fidelity")
    generated, reference = features()
    ours = prdc(generated, reference, neighbours=3)
    assert 0 < ours.recall < ours.precision < 1 or 0 < ours.precision < ours.recall < 1
    assert benchmark.precision_routines(modules)["torch-fidelity"](generated, reference) == pytest.approx(ours[:2], abs=1e-6)
