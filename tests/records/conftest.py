"""Records made up for these tests; no number here is a result."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from distillbench.records import LatencyRecord, RunRecord, run_id
from distillbench.tracks.facts import FACTS, TrackFacts


def identity(name: str, n: int = 8192) -> dict[str, Any]:
    return {"metric": name, "estimator": "made up", "n_generated": n}


def score(name: str, value: float | None, *, n: int = 8192, higher: bool | None = None, note: str = "") -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - 0.01, value + 0.01)
    higher = "w2" not in name and name not in ("mode-tv", "fd", "fd-inf", "fidelity-fd") if higher is None else higher
    return {
        "name": name, "identity": identity(name, n), "value": value, "low": low, "high": high, "n": n, "higher_is_better": higher,
        "unit": "", "note": note,
    }  # fmt: skip


def make_run(method: str = "cd", *, seed: int = 0, scores: dict[int, list[dict[str, Any]]] | None = None, **changes: Any) -> RunRecord:
    """A record whose id fits whatever was changed. scores: by step count; default the in-mode rate at 1, 2 and 4."""
    if scores is None:
        scores = {1: [score("in-mode", 0.7)], 2: [score("in-mode", 0.8)], 4: [score("in-mode", 0.9)]}
    steps = changes.pop("steps", sorted(scores))
    fields: dict[str, Any] = {
        "track": "mixture2d@1", "method": method, "method_version": 1, "label": method, "config": {"lr": 1e-3, "betas": [0.9, 0.99]},
        "budget": {"name": "S", "unit": "passes", "amount": 4e6}, "seed": seed, "threads": 1, "dtype": "float32", "device_class": "cpu",
        "steps": steps, "trained_for": steps, "data_access": "conditions", "family": "consistency", "status": "ok",
        "created": f"2025-01-01T00:00:{seed % 60:02d}Z",
        "spent": {"passes": 3.99e6, "macs": 1.4e11, "seconds": 7.25 + seed / 100, "updates": 5000, "cycles": 5000, "images": 1.28e6,
                  "peak_memory_mb": 412.0},
        "parameters": 36_226, "scores": {str(step): found for step, found in scores.items()},
        "evaluations": {str(step): step for step in scores}, "environment": {"python": "3.11.9", "torch": "2.13.0", "cpus": 2},
        "checksums": {"student": "ab" * 32}, "provenance": {"distillbench_methods.cd": "cd" * 32},
    } | changes  # fmt: skip
    names = ("track", "method", "method_version", "config", "budget", "seed", "threads", "dtype", "device_class", "trained_for", "steps")
    known = {name: fields[name] for name in names} | {"source_sha256": fields.get("source_sha256"), "kind": fields.get("kind", "run")}
    return RunRecord(id=run_id(**known), **fields)


def all_scores(facts: TrackFacts, quality: float, jitter: random.Random) -> list[dict[str, Any]]:
    found = []
    for name in facts.columns:
        made = score(name, 0.0)
        value = (quality if made["higher_is_better"] else 1.05 - quality) + jitter.gauss(0, 0.004)
        found.append(score(name, max(value, 0.001)))
    return found


def make_board_records(track: str = "mixture2d", seeds: int = 8) -> tuple[list[RunRecord], list[LatencyRecord]]:
    """Two methods and a variant, a skipped and a failed one, the teacher and the truth, with latencies."""
    facts, records, latencies = FACTS[track], [], []
    levels = {"cd": (0.80, 0.91, 0.93), "dmd2": (0.90, 0.912, 0.92), "dmd2(gan=false)": (0.86, 0.89, 0.90)}
    for label, quality in levels.items():
        for seed in range(seeds):
            jitter = random.Random(f"{label} {seed}")
            scores = {steps: all_scores(facts, level, jitter) for steps, level in zip((1, 2, 4), quality, strict=True)}
            records.append(make_run(label.partition("(")[0], seed=seed, scores=scores, label=label, track=facts.id,
                                    config={"gan": "gan=false" not in label}))  # fmt: skip
    missing = {"hyper_sd": "skipped: needs taps", "disback": "failed: the loss is NaN at turn student, cycle 812 of stage main"}
    for name, status in missing.items():
        records.append(make_run(name, scores={}, steps=[1, 2, 4], status=status, spent={}, track=facts.id))
    reference = {"kind": "reference", "budget": None, "spent": {}, "trained_for": [], "data_access": "", "family": "", "track": facts.id}
    for steps, quality in {1: 0.35, 2: 0.55, 4: 0.78, 8: 0.92, 50: 0.97}.items():
        scores = {steps: all_scores(facts, quality, random.Random(steps))}
        records.append(make_run("teacher", scores=scores, config={"solver": "ddim"}, **reference))
    scores = {1: all_scores(facts, 0.99, random.Random(0))}
    records.append(make_run("truth", scores=scores, config={}, parameters=None, evaluations={"1": 0}, **reference))
    subjects = {record.id: record.steps for record in records if record.kind == "run" and record.ok and record.seed == 0}
    for subject, steps in {**subjects, "teacher": [1, 2, 4, 8, 50]}.items():
        for step in steps:
            for batch in (1, facts.latency_batch):
                ratio = None if subject == "teacher" else {"value": step / 50, "low": step / 52, "high": step / 48}
                latencies.append(LatencyRecord.measured(
                    track=facts.id, subject=subject, steps=step, batch=batch, seconds=[0.0004 * step, 0.00041 * step, 0.00042 * step],
                    threads=1, dtype="float32", device_class="cpu", ratio=ratio, reference_steps=None if ratio is None else 50,
                ))  # fmt: skip
    return records, latencies


@pytest.fixture
def run() -> Callable[..., RunRecord]:
    return make_run


@pytest.fixture
def scored() -> Callable[..., dict[str, Any]]:
    return score


@pytest.fixture
def board_records() -> Callable[..., tuple[list[RunRecord], list[LatencyRecord]]]:
    return make_board_records
