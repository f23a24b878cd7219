"""Samples as pictures: arrays of pixels made from the previews that runs leave beside their students."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..leaderboard import Board, Row
from ..leaderboard.texts import budget_name
from ..pictures import Panel, preview
from ..store import Store

SIDE = 320  # pixels of a picture of points
PER_CLASS = 4  # images of each class
ACROSS = 10  # colour images in a line
CLASS_COLOURS = np.array([
    [0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [230, 159, 0], [148, 103, 189], [127, 127, 127],
    [140, 86, 75], [188, 189, 34],
])  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Pictures of samples. top: title -> picture.  rows: label -> evaluations -> picture.  n: samples in a picture."""

    top: dict[str, np.ndarray]
    rows: dict[str, dict[int, np.ndarray]]
    budget: str
    n: int
    points: bool


def find_preview(stores: Sequence[Store], run_id: str, steps: int) -> Panel | None:
    """From the first store that kept it."""
    return next((found for store in stores if (found := preview(store.student_folder(run_id), steps, "")) is not None), None)


def of_row(stores: Sequence[Store], row: Row) -> Panel | None:
    """Of the row's first seed that kept one."""
    return next((found for run_id in row.run_ids if (found := find_preview(stores, run_id, row.steps)) is not None), None)


def limit_of(panels: Sequence[Panel]) -> float:
    """Half the side of the square in which points are drawn."""
    return 1.05 * max((float(np.quantile(np.abs(panel.x), 0.999)) for panel in panels if panel.x.ndim == 2), default=1.0)


def picture(panel: Panel, limit: float) -> np.ndarray:
    """(h, w, 4) bytes: points in the colour of their class on nothing, grey images in ink on paper, a column a class, or colour images."""
    if panel.x.ndim == 2:
        return _points(panel.x, panel.label, limit)
    return _images(panel.x[:, 0], panel.label) if panel.x.shape[1] == 1 else _colours(panel.x)


def _points(x: np.ndarray, label: np.ndarray, limit: float) -> np.ndarray:
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    columns = np.round((x[:, 0] / limit + 1) / 2 * (SIDE - 1)).astype(int)
    rows = np.round((1 - x[:, 1] / limit) / 2 * (SIDE - 1)).astype(int)
    inside = (columns >= 0) & (columns < SIDE - 1) & (rows >= 0) & (rows < SIDE - 1)
    colours = np.concatenate([CLASS_COLOURS[label.astype(int) % len(CLASS_COLOURS)], np.full((len(x), 1), 255)], axis=1)
    for down in (0, 1):
        for right in (0, 1):
            pixels[rows[inside] + down, columns[inside] + right] = colours[inside]
    return pixels


def _images(x: np.ndarray, label: np.ndarray) -> np.ndarray:
    height, width = x.shape[1:]
    classes = sorted(set(label.tolist()))
    sheet = np.full((PER_CLASS * height, len(classes) * width), -1.0)
    for column, one in enumerate(classes):
        for row, image in enumerate(x[label == one][:PER_CLASS]):
            sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    grey = np.round(255 * (1 - (np.clip(sheet, -1, 1) + 1) / 2)).astype(np.uint8)
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=2)


def _colours(x: np.ndarray) -> np.ndarray:
    """Colour images in lines of ACROSS."""
    lines = min(PER_CLASS, max(1, len(x) // ACROSS))
    shown = np.concatenate([x, np.ones((max(0, lines * ACROSS - len(x)), *x.shape[1:]))])[: lines * ACROSS]
    sheet = shown.reshape(lines, ACROSS, *x.shape[1:]).transpose(0, 3, 1, 4, 2).reshape(lines * x.shape[2], ACROSS * x.shape[3], 3)
    pixels = np.round(255 * (np.clip(sheet, -1, 1) + 1) / 2).astype(np.uint8)
    return np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 255, np.uint8)], axis=2)


def grid(board: Board, stores: Sequence[Store], evaluations: Sequence[int]) -> Grid | None:
    """Every method beside the teacher, under the budget at which most methods left samples (the larger of two); truth and the teacher in
    full on top. None if no method left any."""
    references = [row for row in board.rows if row.kind == "reference"]
    most = max((row.steps for row in references if not row.is_truth), default=0)
    top = {("truth" if row.is_truth else f"teacher, {most} evaluations"): of_row(stores, row) for row in references[::-1]
           if row.is_truth or row.steps == most}  # fmt: skip
    teacher = _by_label([row for row in references if not row.is_truth], stores, evaluations)
    budgets = [(_by_label([row for row in board.under(budget) if row.competes], stores, evaluations), budget) for budget in board.budgets]
    students, budget = max(budgets[::-1], key=lambda pair: len(pair[0]), default=({}, None))
    if not students:
        return None
    found = {title: panel for title, panel in top.items() if panel is not None}
    rows = {**teacher, **students}
    everything = [*found.values(), *(panel for panels in rows.values() for panel in panels.values())]
    limit, first = limit_of(everything), everything[0]
    points = first.x.ndim == 2
    return Grid(
        {title: picture(panel, limit) for title, panel in found.items()},
        {label: {n: picture(panel, limit) for n, panel in panels.items()} for label, panels in rows.items()},
        budget_name(budget, board.facts), len(first.x) if points else PER_CLASS * len(set(first.label.tolist())), points,
    )  # fmt: skip


def _by_label(rows: Sequence[Row], stores: Sequence[Store], evaluations: Sequence[int]) -> dict[str, dict[int, Panel]]:
    found: dict[str, dict[int, Panel]] = {}
    for row in sorted(rows, key=lambda row: row.label):
        panel = of_row(stores, row) if row.evaluations in evaluations else None
        if panel is not None and row.evaluations is not None:
            found.setdefault(row.label, {})[row.evaluations] = panel
    return found


def write_png(pixels: np.ndarray, path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG", optimize=False)
    path.write_bytes(data.getvalue())
