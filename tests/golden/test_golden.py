"""Golden trajectories: same version, same numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from distillbench.discovery import discover

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("golden_record", HERE / "record.py")
record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)


@pytest.mark.parametrize("method", sorted(discover()))
def test_trajectory_has_not_moved(method):
    """Multiply-adds and updates to the last digit; losses and weights to 1e-3, since processors round differently."""
    path = HERE / f"{method}.json"
    assert path.exists(), f"no golden trajectory of {method}: make golden"
    golden, now = json.loads(path.read_text()), record.trajectory(method)
    assert now["version"] == golden["version"], "the version changed: make golden, and say why in CHANGELOG.md"
    assert (now["macs"], now["updates"]) == (golden["macs"], golden["updates"]), "the cost changed without a version bump"
    assert len(now["losses"]) == len(golden["losses"])
    for mine, theirs in zip(now["losses"], golden["losses"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-6)), f"{name} moved"
    assert now["weights"] == pytest.approx(golden["weights"], rel=1e-3), "the weights moved without a version bump"
