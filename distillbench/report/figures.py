"""The figures of a track, from the numbers in curves.py and the pictures in samples.py. Nothing of pyplot: no state outside a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ..leaderboard.texts import count_text
from .curves import Panel, Place
from .look import DOUBLE, FAINT, INK, MUTED, PAGE, SINGLE, Style
from .samples import Grid

OFF = 0.25  # the teacher is left off the scale where it would take more than this share of the axis for itself
ASIDE = 1.3  # the marks of one budget are spread over an interval whose ends have this ratio
Looks = Mapping[str, Style]

_TEACHER: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.0}
_FULL: dict[str, Any] = {"linestyle": (0, (6, 1.5, 1, 1.5)), "linewidth": 1.0}
_TRUTH: dict[str, Any] = {"linestyle": (0, (1, 1.5)), "linewidth": 1.2}


def quality_against_passes(table: Sequence[Sequence[Panel]], looks: Looks, most: int, *, narrow: bool = False) -> Figure:
    """Small multiples: a row for each score and a column for each number of evaluations; narrow: the first score, one below another."""
    lines = [[panel] for panel in table[0]] if narrow else [list(line) for line in table]
    size = (SINGLE, 0.9 + 1.35 * len(lines)) if narrow else (DOUBLE, 0.9 + 1.6 * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lines), len(lines[0]), squeeze=False, sharex=True, sharey="all" if narrow else "row")
    shown = [label for label in looks if any(label in panel.lines for line in lines for panel in line)]
    budgets = sorted({(m.x, m.budget) for line in table for panel in line for marks in panel.lines.values() for m in marks})
    for axis in axes.flat:
        _budget_ticks(axis, budgets)
    for place, (row, line) in enumerate(zip(axes, lines, strict=True)):
        scale = _scale_of([panel for one in lines for panel in one] if narrow else line)
        for axis, panel in zip(row, line, strict=True):
            _one_panel(axis, panel, looks, shown)
            scale.apply(axis)
            if panel.teacher is not None:
                _say_off_scale(axis, scale, [(panel.evaluations, panel.teacher)])
            if narrow or place == 0:
                axis.set_title(f"{panel.evaluations} evaluation{'s' if panel.evaluations > 1 else ''} a sample")
        row[0].set_ylabel(f"{line[0].score}\n({'higher' if line[0].higher_is_better else 'lower'} is better)")
    figure.supxlabel("training budget of each student, in teacher passes")
    unit = "" if narrow else " evaluations"
    references = [(f"teacher, as many{unit}", _TEACHER), (f"teacher, {most}{unit}", _FULL), ("truth", _TRUTH)]
    _legend(figure, [_handle(label, looks) for label in shown], [_reference(*one) for one in references], 2 if narrow else 4)
    return figure


def _one_panel(axis: Any, panel: Panel, looks: Looks, shown: Sequence[str]) -> None:
    axis.grid(axis="y")
    for value, style in ((panel.teacher, _TEACHER), (panel.full, _FULL), (panel.truth, _TRUTH)):
        if value is not None:
            axis.axhline(value, color=MUTED, zorder=1, **style)
    for label, marks in panel.lines.items():
        look = looks[label]
        shift = ASIDE ** ((shown.index(label) + 0.5) / len(shown) - 0.5)  # so that whiskers do not hide each other
        x, low, high = [m.x * shift for m in marks], [m.low for m in marks], [m.high for m in marks]
        axis.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0, zorder=2)
        axis.vlines(x, low, high, color=look.colour, linewidth=0.9, zorder=3)
        axis.plot(x, [m.value for m in marks], color=look.colour, marker=look.marker, markeredgecolor=PAGE, markeredgewidth=0.5, zorder=4)


class Scale:
    """An axis of scores: logarithmic for distances. The teacher at few evaluations may lie outside; then `outside` says so."""

    def __init__(self, values: Sequence[float], teacher: Sequence[float], higher: bool):
        known = [value for value in values if math.isfinite(value)]
        self.log = not higher and min([*known, *teacher]) > 0
        down, up = (math.log, math.exp) if self.log else (float, float)
        low, high = down(min(known)), down(max(known))
        span = max(high - low, 0.02 * max(abs(high), 1e-9))
        places = [down(value) for value in teacher]
        low = min([low, *(place for place in places if place >= low - OFF * span)])
        high = max([high, *(place for place in places if place <= high + OFF * span)])
        room = [0.2 if off else 0.06 for off in (any(place < low for place in places), any(place > high for place in places))]
        self.low, self.high = up(low - room[0] * span), up(high + room[1] * span)

    def outside(self, value: float) -> bool:
        return not self.low <= value <= self.high

    def apply(self, axis: Any) -> None:
        axis.set_yscale("log" if self.log else "linear")
        axis.set_ylim(self.low, self.high)
        if self.log:
            plain_ticks(axis.yaxis, many=math.log10(self.high / self.low) > 2.5)


def _scale_of(line: Sequence[Panel]) -> Scale:
    values = [v for panel in line for marks in panel.lines.values() for m in marks for v in (m.low, m.value, m.high)]
    values += [v for panel in line for v in (panel.full, panel.truth) if v is not None]
    return Scale(values, [panel.teacher for panel in line if panel.teacher is not None], line[0].higher_is_better)


def _say_off_scale(axis: Any, scale: Scale, values: Sequence[tuple[int, float]]) -> None:
    """A line of text at the edge beyond which the teacher's values lie. values: (evaluations, value)."""
    for beyond, sign, place in ((False, "▼", 0.03), (True, "▲", 0.97)):
        told = [f"{value:.3g} at {n}" for n, value in values if scale.outside(value) and (value > scale.high) == beyond]
        if told:
            axis.text(0.02, place, f"{sign} teacher {', '.join(told)}", transform=axis.transAxes, va="top" if beyond else "bottom",
                      color=MUTED, in_layout=False)  # fmt: skip


def plain_ticks(axis: Any, many: bool = False) -> None:
    """On a logarithmic axis, numbers such as 0.02 and 50 in the place of powers of ten; fewer where there are many decades."""
    axis.set_major_locator(LogLocator(subs=(1,) if many else (1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _budget_ticks(axis: Any, budgets: Sequence[tuple[float, str]]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(
        [x for x, _ in budgets], [f"{count_text(x)}\n({name})" if name in ("S", "M", "L") else count_text(x) for x, name in budgets]
    )
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(budgets[0][0] / 1.6, budgets[-1][0] * 1.6)


def _handle(label: str, looks: Looks) -> Line2D:
    return Line2D([], [], color=looks[label].colour, marker=looks[label].marker, label=label)


def _reference(label: str, style: Mapping[str, Any]) -> Line2D:
    return Line2D([], [], color=MUTED, label=label, **style)


def _legend(figure: Figure, methods: Sequence[Line2D], references: Sequence[Line2D], columns: int) -> None:
    """Methods in the first lines, references below them. matplotlib fills a legend column by column, hence the blanks."""
    columns = min(columns, max(len(methods), len(references)))
    blank = Line2D([], [], linestyle="none", label=" ")
    cells = [one for group in (methods, references) for one in [*group, *[blank] * (-len(group) % columns)]]
    figure.legend(handles=[one for column in range(columns) for one in cells[column::columns]], loc="outside upper center", ncols=columns,
                  frameon=False, handlelength=2.6, columnspacing=1.4)  # fmt: skip


def quality_against_latency(
    by_budget: Mapping[str, Sequence[Place]],
    score: str,
    higher: bool,
    truth: float | None,
    batch: int,
    looks: Looks,
    *,
    narrow: bool = False,
) -> Figure:
    """A panel for each budget (narrow: the last alone). The fuller a mark, the surer it is on the front."""
    chosen = dict(list(by_budget.items())[-1:]) if narrow else dict(by_budget)
    figure = Figure(figsize=(SINGLE if narrow else DOUBLE, 3.6), layout="constrained")
    axes = figure.subplots(1, len(chosen), squeeze=False, sharex=True, sharey=True)[0]
    everything = [place for places in chosen.values() for place in places]
    shown = [label for label in looks if any(place.label == label for place in everything if place.method)]
    teachers = [place for place in everything if not place.method]
    most = max((place.evaluations for place in teachers), default=0)
    values = [v for place in everything if place.method or place.evaluations == most for v in (place.low, place.value, place.high)]
    scale = Scale(values + ([] if truth is None else [truth]), [place.value for place in teachers], higher)
    left, right = 0.7e3 * min(place.p10 for place in everything), 2e3 * max(place.p90 for place in everything)
    for axis, (budget, places) in zip(axes, chosen.items(), strict=True):
        axis.set(xscale="log", xlim=(left, right), title=f"budget {budget}")
        scale.apply(axis)
        axis.grid(axis="y")
        if truth is not None:
            axis.axhline(truth, color=MUTED, zorder=1, **_TRUTH)
        _front_line(axis, places, right)
        for label in [*shown, "teacher"]:
            _one_method(axis, [place for place in places if place.label == label], looks.get(label), scale)
        _number_marks(axis, places, scale, higher)
        off = sorted({(place.evaluations, place.value) for place in places if not place.method and scale.outside(place.value)})
        _say_off_scale(axis, scale, off)
        plain_ticks(axis.xaxis)
    axes[0].set_ylabel(f"{score} ({'higher' if higher else 'lower'} is better)")
    figure.supxlabel(f"median time for a batch of {batch}, in milliseconds")
    teacher = Line2D([], [], color=MUTED, marker="h", label="teacher")
    front = Line2D([], [], color=FAINT, linewidth=5, label="Pareto front")
    references = [front] if truth is None else [front, _reference("truth", _TRUTH)]
    _legend(figure, [*[_handle(label, looks) for label in shown], teacher], references, 3 if narrow else 5)
    return figure


def _one_method(axis: Any, places: Sequence[Place], look: Style | None, scale: Scale) -> None:
    colour, marker = (MUTED, "h") if look is None else (look.colour, look.marker)
    inside = sorted((place for place in places if not scale.outside(place.value)), key=lambda place: place.evaluations)
    axis.plot([1e3 * place.median for place in inside], [place.value for place in inside], color=colour, linewidth=0.8, alpha=0.6, zorder=2)
    for place in inside:
        x, y = 1e3 * place.median, place.value
        axis.hlines(y, 1e3 * place.p10, 1e3 * place.p90, color=colour, linewidth=0.9, zorder=3)
        axis.vlines(x, max(place.low, scale.low), min(place.high, scale.high), color=colour, linewidth=0.9, zorder=3)
        axis.plot([x], [y], marker=marker, color=PAGE, markersize=6, zorder=4)  # nothing shines through the mark
        axis.plot([x], [y], marker=marker, color=colour, alpha=place.share, markeredgewidth=0, markersize=6, zorder=5)
        axis.plot([x], [y], marker=marker, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.0, markersize=6, zorder=6)


def _number_marks(axis: Any, places: Sequence[Place], scale: Scale, higher: bool) -> None:
    """Evaluations beside the marks: the teacher's on its worse side, the methods' once, above or below the best of each number."""
    sign = 1 if higher else -1
    best: dict[int, Place] = {}
    for place in places:
        if place.method and (place.evaluations not in best or sign * place.value > sign * best[place.evaluations].value):
            best[place.evaluations] = place
    for place in [*best.values(), *(place for place in places if not place.method)]:
        if not scale.outside(place.value):
            aside = (-4, 5 * sign) if place.method else (6, -6 * sign)
            axis.annotate(str(place.evaluations), (1e3 * place.median, place.value), xytext=aside, textcoords="offset points", zorder=7,
                          ha="right" if place.method else "left", va="bottom" if aside[1] > 0 else "top",
                          color=INK if place.method else MUTED)  # fmt: skip


def _front_line(axis: Any, places: Sequence[Place], right: float) -> None:
    """Steps through the points that nothing beats: what can be had for at most so much time."""
    front = sorted((place for place in places if place.on_front), key=lambda place: place.median)
    x, y = [1e3 * place.median for place in front], [place.value for place in front]
    if x:
        axis.step([*x, right], [*y, y[-1]], where="post", color=FAINT, linewidth=5, zorder=0, solid_joinstyle="round")


def sample_grid(grid: Grid, evaluations: Sequence[int], looks: Looks) -> Figure:
    """Rows: truth and the teacher in full, the teacher, every method. Columns: evaluations."""
    first = next(iter(next(iter(grid.rows.values())).values()))
    columns, rows = max(len(evaluations), len(grid.top)), len(grid.rows) + bool(grid.top)
    width = min(DOUBLE, 0.3 + 1.6 * columns) if grid.points else DOUBLE
    height = (width - 0.3) / columns * first.shape[0] / first.shape[1]
    figure = Figure(figsize=(width, rows * (height + 0.09) + 0.45), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"hspace": 0.02, "wspace": 0.02})
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, (title, pixels) in zip(axes[0], grid.top.items(), strict=False):
        axis.set_title(title)
        _show(axis, pixels)
    for line, (label, pictures) in zip(axes[bool(grid.top) :], grid.rows.items(), strict=True):
        line[0].set_ylabel(label, color=looks[label].colour if label in looks else MUTED)
        for axis, n in zip(line, evaluations, strict=False):
            if label == next(iter(grid.rows)):
                axis.set_title(f"{n} evaluation{'s' if n > 1 else ''}")
            if n in pictures:
                _show(axis, pictures[n])
            else:
                axis.text(0.5, 0.5, "–", ha="center", va="center", color=MUTED, transform=axis.transAxes)
    return figure


def _show(axis: Any, pixels: Any) -> None:
    axis.imshow(pixels, interpolation="nearest")
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color(FAINT)
