"""Leaderboards: views of records and nothing else. No torch here, so that a board prints at once."""

from __future__ import annotations

from ..errors import unknown
from .board import Board, Cell, Row
from .formats import render_csv, render_json, render_latex, render_markdown
from .verdict import verdict

__all__ = ["FORMATS", "Board", "Cell", "Row", "render", "verdict"]

FORMATS = ("terminal", "markdown", "csv", "latex", "json")


def render(board: Board, format: str = "terminal", *, width: int = 100, color: bool = False) -> str:
    """The board as text. width and color (escape codes) are for the terminal alone; an unknown format raises `UsageError`."""
    if format == "terminal":
        from .terminal import render_terminal

        return render_terminal(board, width, color)
    others = {"markdown": render_markdown, "csv": render_csv, "latex": render_latex, "json": render_json}
    if format not in others:
        raise unknown("format", format, FORMATS)
    return others[format](board)
