"""One look for all figures: colours, markers, sizes and files that come out the same every time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

SINGLE, DOUBLE = 3.25, 6.75  # inches: one and two columns of a paper
POINTS = 8.0  # of all text

PAGE, INK, MUTED, FAINT = "#ffffff", "#1b1f24", "#59636e", "#d5dae0"
# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow, which is lost on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ON_DARK = {
    PAGE: "#14181d", INK: "#e6e9ec", MUTED: "#9aa4af", FAINT: "#3a424b",
    "#0072b2": "#4aa3df", "#d55e00": "#f0803c", "#009e73": "#1fc196", "#cc79a7": "#e29bc4", "#56b4e9": "#8acdf2", "#e69f00": "#f2b632",
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a method looks, the same in every figure."""

    colour: str
    marker: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """label -> style by place in the list; give the same list for every figure."""
    return {label: Style(COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]) for i, label in enumerate(labels)}


@contextmanager
def drawing() -> Iterator[None]:
    """Settings of matplotlib that hold while a figure is made and saved, and are put back."""
    settings: Any = {
        "font.family": "DejaVu Sans", "font.size": POINTS, "axes.titlesize": POINTS, "axes.labelsize": POINTS, "xtick.labelsize": POINTS,
        "ytick.labelsize": POINTS, "legend.fontsize": POINTS, "figure.labelsize": POINTS, "axes.edgecolor": MUTED, "axes.labelcolor": INK,
        "axes.titlecolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "text.color": INK, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.spines.top": False,
        "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
        "grid.color": FAINT, "grid.linewidth": 0.5, "axes.axisbelow": True, "lines.linewidth": 1.2, "lines.markersize": 4.5,
        "pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "distillbench",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def save(figure: Figure, folder: Path, name: str) -> None:
    """NAME.pdf, NAME.svg and NAME-dark.svg. No dates inside, so that equal records give equal files."""
    figure.savefig(folder / f"{name}.pdf", format="pdf", dpi=300, metadata={"CreationDate": None, "Creator": "distillbench"})
    figure.set_layout_engine("none")  # the places are found
    text = io.StringIO()
    figure.savefig(text, format="svg", dpi=200, metadata={"Date": None, "Creator": "distillbench"})
    (folder / f"{name}.svg").write_text(text.getvalue(), encoding="utf-8")
    (folder / f"{name}-dark.svg").write_text(darkened(text.getvalue()), encoding="utf-8")


def darkened(svg: str) -> str:
    """The same picture for a dark page: every colour of the look exchanged for its counterpart."""
    return re.sub("|".join(ON_DARK), lambda match: ON_DARK[match[0]], svg)
