"""Pictures of samples: truth, teacher and students side by side, from the previews that runs leave. No torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .leaderboard import Board, Row
from .store import Store

FEW = 6  # methods whose rows at 2 evaluations are shown beside those at 1


@dataclass(frozen=True)
class Panel:
    """A title and samples: (n, 2) points or (n, 1 or 3, h, w) images in [-1, 1], with their labels, and their prompts if they have any."""

    title: str
    x: np.ndarray
    label: np.ndarray
    prompts: tuple[str, ...] = ()


def panels(board: Board, store: Store) -> list[Panel]:
    """Truth, the teacher at 2 and at most evaluations, and each method at 1 evaluation, and at 2 if there are few methods; first seed.

    Of the budget under which most methods were trained, the larger of two.
    """
    chosen: list[tuple[str, Row]] = []
    rows = list(board.rows)
    last = max((row.steps for row in rows if row.kind == "reference" and not row.is_truth), default=0)
    for row in rows:
        if row.is_truth:
            chosen.insert(0, ("truth", row))
        elif row.kind == "reference" and row.steps in (2, last):
            chosen.append((f"teacher, {row.steps} evaluations", row))
    trained = [[row for row in rows if row.kind == "run" and row.budget == budget and row.seeds] for budget in board.budgets]
    students = max(reversed(trained), key=lambda runs: len({row.label for row in runs}), default=[])
    most = 2 if len({row.label for row in students}) <= FEW else 1
    students = [row for row in students if row.steps <= most]
    for row in sorted(students, key=lambda row: (row.steps, row.rank or 99)):
        chosen.append((f"{row.label}, {row.steps} evaluation{'s' if row.steps > 1 else ''}", row))
    found = []
    for title, row in chosen:
        panel = next((p for p in (preview(store.student_folder(i), row.steps, title) for i in row.run_ids) if p), None)
        if panel is not None:
            found.append(panel)
    return found


def preview(folder: Path, steps: int, title: str) -> Panel | None:
    """The samples that a run left in its student's folder at this step count; None if it left none that can be read."""
    path = folder / f"preview-{steps}.safetensors"
    try:
        with safe_open(path, framework="np") as held:
            prompts = json.loads((held.metadata() or {}).get("prompts", "[]"))
            return Panel(title, held.get_tensor("x").astype(np.float32), held.get_tensor("label"), tuple(map(str, prompts)))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def draw(found: Sequence[Panel], path: Path, heading: str) -> None:
    """Write one picture of all panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.3 * rows + 0.5), squeeze=False, layout="constrained")
    figure.suptitle(heading, fontsize=12)
    limit = 1.05 * max((float(np.quantile(np.abs(panel.x), 0.999)) for panel in found if panel.x.ndim == 2), default=1.0)
    for axis, panel in zip(axes.flat, found, strict=False):
        _draw_one(axis, panel, limit)
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_one(axis: Any, panel: Panel, limit: float) -> None:
    axis.set_title(panel.title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    if panel.x.ndim == 2:
        axis.scatter(panel.x[:, 0], panel.x[:, 1], c=panel.label, cmap="tab10", s=2.0, linewidths=0, alpha=0.7)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        return
    side = int(len(panel.x) ** 0.5)
    images = panel.x[: side * side]
    channels, height, width = images.shape[1:]
    grid = images.reshape(side, side, channels, height, width).transpose(0, 3, 1, 4, 2).reshape(side * height, side * width, channels)
    if channels == 3:
        axis.imshow((grid.clip(-1, 1) + 1) / 2, interpolation="nearest")
    else:
        axis.imshow(-grid[..., 0], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
