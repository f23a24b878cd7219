"""Golden trajectories: a short training of each method whose losses and weights may move only with its version.

make golden        records them again into tests/golden/<method>.json
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from distillbench.budget import Budget
from distillbench.config import make_config
from distillbench.discovery import discover, find
from distillbench.tracks import get_track
from distillbench.training.short import short_run

HERE = Path(__file__).parent
CYCLES = 24


def trajectory(method: str) -> dict:
    """Losses along 24 cycles on mixture2d with the paper's defaults, and what the student's weights come to."""
    found = find(method)
    method_class = found.load()
    steps = (2,) if found.info.per_step else tuple(n for n in (1, 2, 4) if n in found.info.steps)
    torch.set_num_threads(1)
    config = make_config(method_class.Config, method)
    short = short_run(method_class, config, get_track("mixture2d"), steps, budget=Budget("golden", CYCLES, "steps"))
    weights = [p.detach().double() for p in short.method.distilled().denoiser.parameters()]
    losses = [{k: v for k, v in point.items() if k != "passes"} for point in short.loop.position.losses]
    return {
        "method": method, "version": found.info.version, "macs": short.loop.spent.macs, "updates": short.loop.spent.updates,
        "losses": losses,
        "weights": {"mean": float(sum(w.sum() for w in weights)), "square": float(sum(w.square().sum() for w in weights))},
    }  # fmt: skip


if __name__ == "__main__":
    for name in discover():
        (HERE / f"{name}.json").write_text(json.dumps(trajectory(name), indent=1) + "\n")
        print(f"recorded {name}")
