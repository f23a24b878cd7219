"""A store of made-up records, and the report of it; no number here is a result."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from distillbench.claims import Decision
from distillbench.info import Claim
from distillbench.records import RunRecord, run_id
from distillbench.report.build import build, collect
from distillbench.statistics import Interval
from distillbench.store import Store
from distillbench.tracks.facts import FACTS
from records.conftest import all_scores, make_board_records, make_run

HOSTILE = "failed: <script>alert(1)</script> & so on"


def with_overrides(record: RunRecord, **overrides: Any) -> RunRecord:
    changed = dataclasses.replace(record, overrides=overrides, config={**record.config, **overrides})
    return dataclasses.replace(changed, id=run_id(**changed.determinants()))


def fill(folder: Path, tracks: tuple[str, ...] = ("mixture2d", "digits"), seeds: int = 3) -> Store:
    """Two methods at S and one at M, an ablation, a skipped and a failed run, references, latencies, samples, losses of seed 0."""
    store = Store(folder)
    for track in tracks:
        facts = FACTS[track]
        records, latencies = make_board_records(track, seeds)
        records = [with_overrides(one, gan=False) if one.label == "dmd2(gan=false)" else one for one in records]
        for seed in range(seeds):
            scores = {n: all_scores(facts, 0.9 + 0.01 * n, random.Random(f"M {seed}")) for n in (1, 2, 4)}
            budget = {"name": "M", "unit": "passes", "amount": facts.budgets["M"]}
            records.append(make_run("cd", seed=seed, scores=scores, track=facts.id, config={"gan": True}, budget=budget))
        records = [dataclasses.replace(one, status=HOSTILE) if one.method == "disback" else one for one in records]
        for record in [*records, *latencies]:
            store.add(record)
        for record in records:
            if record.seed == 0 and record.ok:
                keep(store.student_folder(record.id), record, points=track == "mixture2d")
    return store


def keep(folder: Path, record: RunRecord, points: bool) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(8, dtype=np.int16), 8)
    x = rng.normal(size=(64, 2) if points else (64, 1, 28, 28)).astype(np.float16)
    for steps in record.steps:
        save_file({"x": x, "label": label}, folder / f"preview-{steps}.safetensors")
    if record.kind == "run":
        lines = [{"passes": 1000.0 * (i + 1), "turn": "student", "loss": 1 / (i + 1), "gan": (-1) ** i} for i in range(50)]
        (folder / "losses.json").write_text(json.dumps(lines))


def decisions() -> list[Decision]:
    claim = Claim("The <GAN> term helps at one step.", "dmd2", "dmd2(gan=false)", "in-mode")
    other = dataclasses.replace(claim, text="Two steps beat one.", steps=2, margin=0.01)
    return [
        Decision("dmd2", 1, claim, "mixture2d@1", "reproduced", 8, Interval(0.031, 0.02, 0.042, 8), 0.00002, 0.00006),
        Decision("dmd2", 2, other, "mixture2d@1", "undecided", 8, Interval(0.003, -0.002, 0.008, 8), 0.11, 0.22),
        Decision("cd", 1, claim, "mixture2d@1", "not reproduced", 8, Interval(-0.03, -0.04, -0.02, 8), 0.0012, 0.0012),
        Decision("cd", 2, other, "mixture2d@1", "not run", 0, None, None, None, "no run of cd with seeds 3 to 7"),
        Decision("cd", 3, other, "elsewhere@1", "not run", 0, None, None, None, "on a track that is not in the report"),
    ]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fill(tmp_path_factory.mktemp("report") / "store")


@pytest.fixture(scope="session")
def report(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    build(collect(store, published=False), out, decisions())
    return out


@pytest.fixture(scope="session")
def filled() -> Callable[..., Store]:
    return fill
