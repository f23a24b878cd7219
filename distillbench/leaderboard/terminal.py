"""A board as text for a terminal of a given width: scores, then what they cost, then latency."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..records import LatencyRecord
from . import stages, texts
from .board import Board, Row
from .verdict import verdict

LABEL_WIDTH = 30  # a longer label folds


@dataclass(frozen=True)
class _Column:
    """header: lines.  text(i, row): the cell of the i-th row."""

    header: str
    text: Callable[[int, Row], Text]
    left: bool = False


def render_terminal(board: Board, width: int = 100, color: bool = False) -> str:
    """All budgets, one under the other; no line is longer than `width`. Escape codes only with `color`."""
    file = io.StringIO()
    colors: Any = "standard" if color else None
    console = Console(file=file, width=width, force_terminal=color, color_system=colors, no_color=not color)
    for i, budget in enumerate(board.sections()):
        if i:
            console.print()
        _one_budget(console, board, budget)
    if board.stages:
        print_stages(console, board.stages)
    if board.rows:
        console.print(Text(texts.glossary(board), style="dim"))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _one_budget(console: Console, board: Board, budget: dict[str, Any] | None) -> None:
    rows = board.under(budget)
    title, about = texts.heading(board, rows, budget)
    console.print(Text(title, style="bold"))
    console.print(Text(about, style="dim"))
    if not rows:
        console.print(f"\nNo runs in this store. Type: distillbench bench {board.facts.name}")
        return
    scored = {row.label for row in rows if row.cells}
    shown = [row for row in rows if row.label in scored]
    console.print()
    if shown:
        for table in _score_tables(console, board, shown):
            console.print(table)
            console.print()
        console.print(_cost_table(board, shown))
        console.print()
        _print_latency(console, board, shown)
    reasons = texts.reasons(rows)
    for line in reasons:
        console.print(Text(line, style="yellow"))
    if reasons:
        console.print()
    console.print(Text(verdict(board, rows), style="bold"))
    console.print()


def _score_tables(console: Console, board: Board, rows: Sequence[Row]) -> list[Table]:
    """As many score columns side by side as fit, the others in further tables below."""
    places, marks = texts.places_by_column(board), texts.marks(board, rows)
    main = board.facts.main

    def score(name: str) -> _Column:
        def text(i: int, row: Row) -> Text:
            shown = texts.score_text(row, name, places[name], interval=name == main)
            if shown is None:
                return Text(texts.reason_text(row, name, in_full=False).partition(":")[0][:10], style="dim")
            return Text(shown, style={"best": "bold", "second": "underline"}.get(marks.get((i, name), ""), ""))

        header = name if name == main else name.replace("-", "-\n")
        return _Column(header + texts.direction_text(board, name), text)

    fixed = [_Column("method", lambda i, row: _name(row), left=True), _Column("eval", lambda i, row: Text(texts.evaluations_text(row)))]
    ranked = [_Column("#", lambda i, row: Text(texts.rank_text(row))), *fixed]
    waiting = [score(name) for name in sorted(board.columns, key=lambda name: name != main)]
    tables: list[Table] = []
    while waiting:
        first = fixed if tables else ranked
        taken = 1
        while taken < len(waiting) and _fits(console, _table([*first, *waiting[: taken + 1]], rows)):
            taken += 1
        tables.append(_table([*first, *waiting[:taken]], rows))
        waiting = waiting[taken:]
    return tables


def _name(row: Row) -> Text:
    spaced = row.label.replace(",", ", ")  # a long label then breaks between knobs
    return Text(spaced, style="" if row.kind == "run" else "dim")


def _fits(console: Console, table: Table) -> bool:
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width


def _table(columns: Sequence[_Column], rows: Sequence[Row], sections: bool = True) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        label = column.header == "method"
        table.add_column(column.header, justify="left" if column.left else "right", vertical="top", no_wrap=not label, overflow="fold",
                         max_width=LABEL_WIDTH if label else None)  # fmt: skip
    groups = texts.groups(rows) if sections else [0] * len(rows)
    for i, row in enumerate(rows):
        table.add_row(*(column.text(i, row) for column in columns), end_section=i + 1 < len(rows) and groups[i + 1] != groups[i])
    return table


def _cost_table(board: Board, rows: Sequence[Row]) -> Table:
    """One line a training: what it used, spent and left."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.kind != "reference":
            lines.setdefault((row.label, row.run_ids), row)
    teacher = next((row for row in rows if row.method == "teacher" and row.kind == "reference"), None)
    facts = board.facts
    columns = [
        _Column("method", lambda i, row: _name(row), left=True),
        _Column("data access", lambda i, row: Text(row.data_access), left=True),
        _Column("trained\nfor", lambda i, row: Text(texts.trained_for_text(row, facts)), left=True),
        _Column("passes", lambda i, row: Text(texts.spent_text(row, "passes"))),
        _Column("seconds", lambda i, row: Text(texts.spent_text(row, "seconds"))),
        _Column("para-\nmeters", lambda i, row: Text(texts.parameters_text(row))),
        _Column("peak\nMB", lambda i, row: Text(texts.spent_text(row, "peak_memory_mb"))),
        _Column("seeds", lambda i, row: Text(texts.seeds_text(row))),
        _Column("tuning\ntrials", lambda i, row: Text(texts.trials_text(row))),
    ]
    return _table(columns, [*lines.values(), *([teacher] if teacher else [])], sections=False)


def _print_latency(console: Console, board: Board, rows: Sequence[Row]) -> None:
    if not any(row.latency for row in rows):
        console.print(Text("Latency: not run.\n", style="dim"))
        return

    base = texts.ratio_base(board)

    def columns(batch: int) -> list[_Column]:
        return [
            _Column(f"latency\nbatch {batch}", lambda i, row: Text(texts.latency_text(row.latency.get(batch)))),
            _Column(f"ratio to\n{base}", lambda i, row: Text(texts.ratio_text(row.latency.get(batch)))),
        ]

    named = [_Column("method", lambda i, row: _name(row), left=True), _Column("eval", lambda i, row: Text(texts.evaluations_text(row)))]
    measured = [column for batch in texts.batches(board.facts) for column in columns(batch)]
    bases = {record.reference_steps for row in rows for record in row.latency.values()}
    shown = [row for row in rows if row.kind == "run" or (row.latency and row.steps in bases)]
    console.print(_table([*named, *measured], shown, sections=False))
    console.print()


def print_stages(console: Console, records: Sequence[LatencyRecord]) -> None:
    """Latency of whole pipelines by stages: times, then what they cost."""
    console.print(Text(stages.TITLE, style="bold"))
    for columns in (stages.times(records), stages.costs(records)):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for header, _ in columns:
            label = header == "method"
            table.add_column(header, justify="left" if label else "right", max_width=LABEL_WIDTH if label else None, overflow="fold")
        for cells in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*map(Text, cells))
        console.print(table)
        console.print()
    console.print(Text(stages.notes(records), style="dim"))
    console.print()
