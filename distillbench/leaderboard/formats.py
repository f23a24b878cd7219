"""A board as Markdown, CSV, LaTeX or JSON. The same rows and reasons as on the terminal."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import stages, texts
from .board import NOT_RUN, Board, Row
from .verdict import verdict

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
}  # fmt: skip


def render_json(board: Board) -> str:
    """A list of rows in the board's order."""
    return json.dumps([_json_row(row, board) for row in board.rows], indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _json_row(row: Row, board: Board) -> dict[str, Any]:
    scores = {
        f"{name}#{cell.key}": {
            "name": name, "value": cell.value, "low": cell.low, "high": cell.high, "n": cell.n, "seeds": len(cell.by_seed),
            "sampling_only": cell.sampling_only, "higher_is_better": cell.higher_is_better, "note": cell.note,
        }
        for name, cell in row.cells.items()
    }  # fmt: skip
    latency = {
        str(batch): {"median": record.median, "p10": record.p10, "p90": record.p90, "ratio": record.ratio, "flagged": record.flagged}
        for batch, record in row.latency.items()
    }
    return {
        "rank": row.rank, "tied": row.tied, "method": row.label, "method_id": row.method, "kind": row.kind,
        "self_reported": row.self_reported, "track": board.facts.id, "steps": row.steps,
        "evaluations": row.evaluations, "status": row.status, "budget": row.budget, "trained_for": list(row.trained_for),
        "trainings": row.trainings, "data_access": row.data_access, "family": row.family, "passes": row.spent.get("passes"),
        "seconds": row.spent.get("seconds"), "processor_seconds": row.spent.get("processor_seconds"),
        "peak_memory_mb": row.spent.get("peak_memory_mb"), "parameters": row.parameters,
        "seeds": len(row.seeds), "seed_numbers": list(row.seeds), "seeds_attempted": row.attempted, "tuning": row.tuning,
        "runs": list(row.run_ids), "scores": scores, "latency": latency or NOT_RUN,
    }  # fmt: skip


def render_csv(board: Board) -> str:
    """A row a line, plain numbers; where a number is missing the cell is empty and `why_empty` says why."""
    batches = texts.batches(board.facts)
    header = ["rank", "method", "budget", "steps", "evaluations", "status"]
    header += [f"{name}{part}" for name in board.columns for part in ("", "_low", "_high")]
    header += ["data_access", "trained_for", "trainings", "passes", "seconds", "parameters", "peak_memory_mb"]
    header += [f"latency_b{batch}_{part}" for batch in batches for part in ("median", "ratio", "ratio_low", "ratio_high")]
    header += ["seeds", "seeds_attempted", "trials", "trial_passes", "why_empty"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for row in board.rows:
        line: list[Any] = [
            row.rank,
            row.label,
            texts.budget_name(row.budget, board.facts),
            row.steps,
            row.evaluations,
            texts.one_line(row.status),
        ]
        for name in board.columns:
            cell = row.cells.get(name)
            line += [None, None, None] if cell is None else [cell.value, cell.low, cell.high]
        line += [
            row.data_access,
            ",".join(map(str, row.trained_for)),
            row.trainings,
            row.spent.get("passes"),
            row.spent.get("shown_seconds"),
        ]
        line += [row.parameters, row.spent.get("peak_memory_mb")]
        for batch in batches:
            record = row.latency.get(batch)
            ratio = (record.ratio if record else None) or {}
            line += [record.median if record else None, ratio.get("value"), ratio.get("low"), ratio.get("high")]
        tuning = row.tuning or {}
        line += [len(row.seeds), row.attempted, tuning.get("trials"), tuning.get("passes"), _why_empty(row, board, batches)]
        writer.writerow(line)
    return file.getvalue()


def _why_empty(row: Row, board: Board, batches: Sequence[int]) -> str:
    reasons = [f"{name}: {texts.one_line(row.why_empty(name))}" for name in board.columns if row.value(name) is None]
    if not row.is_truth and any(batch not in row.latency for batch in batches):
        reasons.append(f"latency: {NOT_RUN}")
    return "; ".join(reasons)


@dataclass(frozen=True)
class _Markup:
    """How a text format writes a cell: escape(text), best(escaped), second(escaped)."""

    escape: Callable[[str], str]
    best: str
    second: str

    def number(self, text: str, mark: str | None) -> str:
        return {"best": self.best, "second": self.second}.get(mark or "", "{}").replace("{}", self.escape(text), 1)


def _paper_columns(board: Board, rows: Sequence[Row], markup: _Markup) -> list[tuple[str, list[str]]]:
    """Headers and cells, escaped, of the table that Markdown and LaTeX share."""
    facts, places, marks = board.facts, texts.places_by_column(board), texts.marks(board, rows)
    table: list[tuple[str, list[str]]] = []

    def column(header: str, text: Callable[[Row], str]) -> None:
        table.append((markup.escape(header), [markup.escape(texts.one_line(text(row))) for row in rows]))

    def scores(name: str) -> None:
        shown = [texts.score_text(row, name, places[name]) or texts.reason_text(row, name, in_full=name == facts.main) for row in rows]
        cells = [markup.number(text, marks.get((i, name))) for i, text in enumerate(shown)]
        table.append((markup.escape(name + texts.direction_text(board, name)), cells))

    base = texts.ratio_base(board)

    def latency(batch: int) -> None:
        column(f"latency b{batch}", lambda row: texts.DASH if row.is_truth else texts.latency_text(row.latency.get(batch)))
        column(f"ratio to {base} b{batch}", lambda row: texts.DASH if row.is_truth else texts.ratio_text(row.latency.get(batch)))

    column("#", texts.rank_text)
    column("method", lambda row: row.label)
    column("eval", texts.evaluations_text)
    for name in board.columns:
        scores(name)
    column("data access", lambda row: row.data_access or texts.DASH)
    column("trained for", lambda row: texts.trained_for_text(row, facts))
    column("budget", lambda row: texts.budget_name(row.budget, facts))
    column("passes", lambda row: texts.spent_text(row, "passes"))
    column("seconds", lambda row: texts.spent_text(row, "seconds"))
    column("parameters", texts.parameters_text)
    column("peak MB", lambda row: texts.spent_text(row, "peak_memory_mb"))
    for batch in texts.batches(facts) if any(row.latency for row in rows) else ():
        latency(batch)
    column("seeds", texts.seeds_text)
    column("trials", texts.trials_text)
    return table


_MARKDOWN = _Markup(lambda text: re.sub(r"([|*<>`\\])", r"\\\1", text), "**{}**", "<u>{}</u>")


def render_markdown(board: Board) -> str:
    """A table for each budget, best in bold, second underlined, the verdict and the glossary below."""
    parts = []
    for budget in board.sections():
        rows = board.under(budget)
        title, about = texts.heading(board, rows, budget)
        parts += [f"### {title}", about]
        if rows:
            columns = _paper_columns(board, rows, _MARKDOWN)
            parts.append(_pipes(columns))
            parts += ["\n".join(f"- {_MARKDOWN.escape(line)}" for line in texts.reasons(rows))] if texts.reasons(rows) else []
            parts.append(f"**{_MARKDOWN.escape(verdict(board, rows))}**")
    if board.stages:
        parts.append(f"### {stages.TITLE}")
        for table in (stages.times(board.stages), stages.costs(board.stages)):
            parts.append(_pipes([(header, [_MARKDOWN.escape(cell) for cell in cells]) for header, cells in table]))
        parts.append(_MARKDOWN.escape(stages.notes(board.stages)))
    return "\n\n".join([*parts, _MARKDOWN.escape(texts.glossary(board))]) + "\n"


def _pipes(columns: Sequence[tuple[str, list[str]]]) -> str:
    """Headers and escaped cells as a Markdown table."""
    cells = zip(*(cells for _, cells in columns), strict=True)
    lines = [[header for header, _ in columns], ["---"] * len(columns), *map(list, cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render_latex(board: Board) -> str:
    """Two booktabs tables for each budget, scores and below them costs, in one float (packages: booktabs, graphicx), best in bold, second
    underlined. Both are made smaller where they are wider than the text, and never larger."""
    markup = _Markup(lambda text: "".join(_LATEX.get(letter, letter) for letter in text), r"\textbf{{}}", r"\underline{{}}")
    parts = []
    for budget in board.sections():
        rows = board.under(budget)
        columns, groups = _paper_columns(board, rows, markup), texts.groups(rows)
        first = 3 + len(board.columns)  # rank, method and evaluations go before the scores
        scores, costs = _tabular(columns[:first], groups), _tabular([*columns[1:3], *columns[first:]], groups)
        title, about = texts.heading(board, rows, budget)
        caption = markup.escape(" ".join([title + ".", about, verdict(board, rows)]))
        body = "\n\n\\medskip\n".join([scores, costs])
        parts.append("\\begin{table}\n\\centering\n\\caption{" + caption + "}\n" + body + "\n\\end{table}\n")
    return "\n".join(parts)


def _tabular(columns: Sequence[tuple[str, list[str]]], groups: Sequence[int]) -> str:
    import pandas

    alignment = "".join("l" if header in ("method", "data access", "trained for") else "r" for header, _ in columns)
    style = pandas.DataFrame(dict(columns)).style.hide(axis="index")
    width = r"\ifdim\width>\linewidth\linewidth\else\width\fi"
    return f"\\resizebox{{{width}}}{{!}}{{%\n{_with_midrules(style.to_latex(hrules=True, column_format=alignment), groups)}}}"


def _with_midrules(body: str, groups: Sequence[int]) -> str:
    """A thin rule wherever the number of evaluations changes."""
    lines, out, row = body.splitlines(), [], -1
    inside = False
    for line in lines:
        out.append(line)
        if line == r"\midrule":
            inside = True
        elif inside and line.endswith(r"\\"):
            row += 1
            if row + 1 < len(groups) and groups[row + 1] != groups[row]:
                out.append(r"\midrule")
    return "\n".join(out) + "\n"
