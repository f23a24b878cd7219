"""Studies: figures of trainings that were scored on their way. A study is a json file of numbers, made by a command of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..errors import BadFileError
from ..leaderboard.texts import count_text
from . import figures, look

FOLDER = "studies"  # beside a track's published records
UNEVEN = 3.0  # a distance's axis is logarithmic where its values span more than this


@dataclass(frozen=True)
class Dot:
    """A mean over training seeds, and the least and the largest of them.  x: teacher passes."""

    x: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class StudyPanel:
    """One score from one start; lines by label, in the order of the legend."""

    title: str
    score: str
    higher_is_better: bool
    lines: dict[str, tuple[Dot, ...]]


@dataclass(frozen=True)
class Study:
    """name: of its files.  text: what is shown, for a stranger.  command: what made it.  columns: panels in a line of the figure."""

    name: str
    title: str
    text: str
    track: str
    seeds: int
    command: str
    version: str
    columns: int
    panels: tuple[StudyPanel, ...]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path


def read(path: Path) -> Study:
    """Raises `BadFileError` on a file that is no study."""
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        panels = tuple(_panel(**panel) for panel in card.pop("panels"))
        return Study(panels=panels, **card)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(f"{path} is no study ({type(error).__name__}: {error}); `make studies` writes them") from None


def _panel(lines: Mapping[str, Sequence[Mapping[str, float]]], **rest: Any) -> StudyPanel:
    return StudyPanel(lines={label: tuple(Dot(**dot) for dot in dots) for label, dots in lines.items()}, **rest)


def studies_in(home: Path) -> list[Study]:
    """Those beside the records of a track, by name."""
    return [read(path) for path in sorted((home / FOLDER).glob("*.json"))]


def draw(study: Study, looks: Mapping[str, look.Style], *, narrow: bool = False) -> Figure:
    """A panel for each score and start; narrow: one below another."""
    columns = 1 if narrow else study.columns
    rows = -(-len(study.panels) // columns)
    figure = Figure(figsize=(look.SINGLE if narrow else look.DOUBLE, 0.9 + 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    labels = list(dict.fromkeys(label for panel in study.panels for label in panel.lines))
    styles = _styles(labels, looks)
    for axis, panel in zip(axes.flat, study.panels, strict=False):
        _one_panel(axis, panel, styles)
    for axis in axes.flat[len(study.panels) :]:
        axis.set_visible(False)
    figure.supxlabel("teacher passes spent")
    handles = [Line2D([], [], color=styles[label].colour, marker=styles[label].marker, label=label) for label in labels]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(2 if narrow else 4, len(handles)), frameon=False, handlelength=2.6)
    return figure


def _styles(labels: Sequence[str], looks: Mapping[str, look.Style]) -> Mapping[str, look.Style]:
    """Those of the other figures, unless they do not know a label or two of these lines would have one colour."""
    known = {label: looks[label] for label in labels if label in looks}
    apart = len({style.colour for style in known.values()}) == len(labels)
    return known if apart else look.styles(labels)


def _one_panel(axis: Any, panel: StudyPanel, styles: Mapping[str, look.Style]) -> None:
    axis.grid(axis="y")
    for label, dots in panel.lines.items():
        style, x = styles[label], [dot.x for dot in dots]
        axis.fill_between(x, [dot.low for dot in dots], [dot.high for dot in dots], color=style.colour, alpha=0.15, linewidth=0)
        axis.plot(x, [dot.value for dot in dots], color=style.colour, marker=style.marker, markersize=3.2, markeredgecolor=look.PAGE,
                  markeredgewidth=0.4)  # fmt: skip
    values = [dot.value for dots in panel.lines.values() for dot in dots]
    if not panel.higher_is_better and min(values) > 0 and max(values) > UNEVEN * min(values):
        axis.set_yscale("log")
        axis.set_ylim(0.8 * min(values), 1.25 * max(values))
        figures.plain_ticks(axis.yaxis)
    axis.xaxis.set_major_formatter(lambda passes, _: count_text(passes) if passes else "0")
    axis.set_title(panel.title)
    axis.set_ylabel(f"{panel.score} ({'higher' if panel.higher_is_better else 'lower'} is better)")


def caption(study: Study) -> str:
    seeds = (
        f"means over {study.seeds} training seeds, bands reach from the least to the largest" if study.seeds > 1 else "one training seed"
    )
    return (
        f"{study.title}, on {study.track}. {study.text} Lines are {seeds}. Scored along one training, whose rates fall over the whole of "
        f"it, so a point is no training that ended there. Made by `{study.command}`."
    )
