"""What the report adds for tracks with prompts: the same prompts drawn by every method, and what is right in them, by category."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from ..leaderboard import Board, Row
from ..leaderboard.texts import budget_name
from ..store import Store
from .curves import most_evaluations
from .look import DOUBLE, FAINT, INK, MUTED, Style
from .samples import of_row

SHOWN = 8  # prompts
CATEGORIES = ("object", "count", "colour", "position", "binding")


@dataclass(frozen=True)
class PromptGrid:
    """lines: (label, evaluations) -> images (prompts, h, w, 3) of numbers in 0..255, truth and teacher first."""

    prompts: tuple[str, ...]
    lines: dict[tuple[str, int], np.ndarray]
    budget: str


def chosen_rows(board: Board) -> list[Row]:
    """Truth, the teacher at 1, 4 and most evaluations, and what competes under the largest budget that most methods ran at."""
    full = most_evaluations(board)
    references = [row for row in board.rows if row.kind == "reference"]
    truth = [row for row in references if row.is_truth]
    teacher = [row for row in references if not row.is_truth and row.steps in (1, 4, max(r.steps for r in references))]
    budgets = [[row for row in board.under(budget) if row.competes] for budget in board.budgets]
    students = max(budgets[::-1], key=lambda rows: len({row.label for row in rows}), default=[])
    known = sorted((row for row in students if row.evaluations is not None and row.evaluations < full), key=_order)
    return [*truth, *sorted(teacher, key=lambda row: -row.steps), *known]


def _order(row: Row) -> tuple[str, int]:
    return row.label, row.evaluations or 0


def grid(board: Board, stores: Sequence[Store]) -> PromptGrid | None:
    """The first prompts that samples were kept of; None where no samples or no prompts were kept."""
    rows = chosen_rows(board)
    panels = {("truth" if row.is_truth else row.label, row.evaluations or 0): of_row(stores, row) for row in rows}
    kept = {key: panel for key, panel in panels.items() if panel is not None and panel.prompts and panel.x.ndim == 4}
    if not kept:
        return None
    prompts = next(iter(kept.values())).prompts
    spaced = np.linspace(0, len(prompts) - 1, min(SHOWN, len(prompts))).round().astype(int)
    lines = {key: _bytes(panel.x[spaced]) for key, panel in kept.items() if panel.prompts == prompts}
    budget = next((row.budget for row in rows if row.kind != "reference"), None)
    return PromptGrid(tuple(prompts[i] for i in spaced), lines, budget_name(budget, board.facts) if budget else "")


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.round(255 * (np.clip(x, -1, 1).transpose(0, 2, 3, 1) + 1) / 2).astype(np.uint8)


def draw_grid(found: PromptGrid, looks: Mapping[str, Style]) -> Figure:
    """A column a prompt, a line a method and number of evaluations."""
    columns, lines = len(found.prompts), len(found.lines)
    side = (DOUBLE - 1.0) / columns
    figure = Figure(figsize=(DOUBLE, lines * (side + 0.03) + 0.9), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, gridspec_kw={"hspace": 0.02, "wspace": 0.02})
    for axis, prompt in zip(axes[0], found.prompts, strict=True):
        axis.set_title("\n".join(textwrap.wrap(prompt, 15)), fontsize=5.5, loc="left")
    for line, ((label, evaluations), images) in zip(axes, found.lines.items(), strict=True):
        told = label if label == "truth" else f"{label}, {evaluations}"
        line[0].set_ylabel(told, rotation=0, ha="right", va="center", color=looks[label].colour if label in looks else MUTED)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color(FAINT)
    return figure


@dataclass(frozen=True)
class Bar:
    """One method's shares of right answers by category, with 95 % intervals where there are any. share: value, low, high."""

    label: str
    evaluations: int
    shares: dict[str, tuple[float, float, float]]


def bars(board: Board) -> list[Bar]:
    """Of the rows that `chosen_rows` names, those that were checked by category."""
    found = []
    for row in chosen_rows(board):
        shares = {}
        for name in CATEGORIES:
            cell = row.cells.get(name)
            if cell is not None and cell.value is not None:
                low = cell.value if cell.low is None else cell.low
                high = cell.value if cell.high is None else cell.high
                shares[name] = (cell.value, low, high)
        if len(shares) == len(CATEGORIES):
            found.append(Bar("truth" if row.is_truth else row.label, row.evaluations or 0, shares))
    return found


def draw_bars(found: Sequence[Bar], looks: Mapping[str, Style]) -> Figure:
    """A panel a category, a line a method and number of evaluations; marks with intervals."""
    figure = Figure(figsize=(DOUBLE, 0.22 * len(found) + 0.9), layout="constrained")
    axes = figure.subplots(1, len(CATEGORIES), squeeze=False, sharey=True)[0]
    places = list(range(len(found)))[::-1]
    for axis, name in zip(axes, CATEGORIES, strict=True):
        for place, bar in zip(places, found, strict=True):
            value, low, high = bar.shares[name]
            look = looks.get(bar.label)
            colour = MUTED if look is None else look.colour
            axis.hlines(place, low, high, color=colour, linewidth=0.9)
            axis.plot([value], [place], marker="h" if look is None else look.marker, color=colour, markersize=4)
        axis.set(title=name, xlim=(-0.03, 1.03), xticks=[0, 0.5, 1])
        axis.grid(axis="x")
    axes[0].set_yticks(places, [bar.label if bar.label == "truth" else f"{bar.label}, {bar.evaluations}" for bar in found])
    for tick, bar in zip(axes[0].get_yticklabels(), found, strict=True):
        tick.set_color(looks[bar.label].colour if bar.label in looks else INK)
    figure.supxlabel("share of images that are right, of those whose caption states it")
    return figure
