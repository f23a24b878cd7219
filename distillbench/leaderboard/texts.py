"""How numbers, budgets and reasons are written, in every format alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..records import LatencyRecord
from ..tracks.facts import TrackFacts
from .board import NOT_RUN, RELEASED, SELF_REPORTED, Board, Row

DASH = "–"  # does not apply: references have no rank, no budget and no training


def decimals(values: Iterable[float]) -> int:
    """Decimals that give the median value of a column three significant digits."""
    sizes = sorted(abs(value) for value in values if value)
    if not sizes:
        return 2
    return min(max(2 - math.floor(math.log10(sizes[len(sizes) // 2])), 1), 6)


def score_text(row: Row, name: str, places: int, interval: bool = True) -> str | None:
    """`0.873 ±0.012`, with a star where one seed's interval is sampling noise only; None for an empty cell."""
    cell = row.cells.get(name)
    if cell is None or cell.value is None:
        return None
    text = f"{cell.value:.{places}f}"
    if interval and cell.low is not None and cell.high is not None:
        width = max(cell.high - cell.value, cell.value - cell.low)
        text += f" ±{width:.{places}f}" + ("*" if cell.sampling_only else "")
    return text


def places_by_column(board: Board) -> dict[str, int]:
    return {name: decimals(value for row in board.rows if (value := row.value(name)) is not None) for name in board.columns}


def marks(board: Board, rows: Sequence[Row]) -> dict[tuple[int, str], str]:
    """(place in rows, score) -> "best" or "second" among the methods with as many evaluations; a method alone gets none."""
    found: dict[tuple[int, str], str] = {}
    for evaluations in {row.evaluations for row in rows}:
        for name in board.columns:
            if board.higher_is_better(name) is None:
                continue
            sign = 1.0 if board.higher_is_better(name) else -1.0
            group = [(i, row.value(name)) for i, row in enumerate(rows) if row.competes and row.evaluations == evaluations]
            ranked = [(sign * value, i) for i, value in group if value is not None]
            levels = sorted({value for value, _ in ranked}, reverse=True)[:2]
            if len(levels) == 2:
                found.update({(i, name): "best" if value == levels[0] else "second" for value, i in ranked if value in levels})
    return found


def groups(rows: Sequence[Row]) -> list[int]:
    """The evaluations of each row where a method stands, and 0 for the references at the end that no method meets."""
    met = {row.evaluations or row.steps for row in rows if row.kind == "run"}
    return [0 if row.is_truth or (row.evaluations or row.steps) not in met else (row.evaluations or row.steps) for row in rows]


def rank_text(row: Row) -> str:
    """`2`, or `1=` where rows share it because no paired interval parts them."""
    return DASH if row.rank is None else f"{row.rank}{'=' if row.tied else ''}"


def count_text(number: float) -> str:
    """A number in at most five characters: 3.98M, 16k, 812."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def budget_name(budget: dict[str, Any] | None, facts: TrackFacts) -> str:
    """S, M or L where the track has that name for this many passes, else the amount: `5M passes`, `60 seconds`."""
    if budget is None:
        return DASH
    named = [name for name, passes in facts.budgets.items() if budget["unit"] == "passes" and float(budget["amount"]) == passes]
    return named[0] if named else f"{count_text(budget['amount'])} {budget['unit']}"


def trained_for_text(row: Row, facts: TrackFacts) -> str:
    """`1,2,4`, and where a student was trained for each step count, how often the budget was spent."""
    if row.kind != "run":
        return DASH
    steps = ",".join(map(str, row.trained_for)) or "any"
    return steps if row.trainings == 1 else f"{steps} ({row.trainings} x {budget_name(row.budget, facts)})"


def reason_text(row: Row, name: str, in_full: bool) -> str:
    """What an empty cell says: the reason, or its first word where the row's status stands in another cell."""
    reason = one_line(row.why_empty(name))
    return reason if in_full or row.status == "ok" else reason.partition(":")[0]


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why something is missing, one line a label and reason."""
    lines: dict[str, None] = {}
    for row in rows:
        if row.status != "ok":
            lines[f"{row.label}: {one_line(row.status)[:300]}"] = None
        for name, cell in row.cells.items():
            if cell.value is None:
                lines[f"{row.label}: {name}: {one_line(cell.note)[:300]}"] = None
    return list(lines)


def spent_text(row: Row, name: str) -> str:
    """What a run spent of `name`; "seconds" are the processor's where a record on a processor has them."""
    name = "shown_seconds" if name == "seconds" else name
    if row.kind != "run":
        return DASH
    return count_text(row.spent[name]) if name in row.spent else _unknown(row)


def parameters_text(row: Row) -> str:
    if row.is_truth:
        return DASH
    return _unknown(row) if row.parameters is None else count_text(row.parameters)


def _unknown(row: Row) -> str:
    return "not known" if row.status == "ok" else row.status.partition(":")[0]


def seeds_text(row: Row) -> str:
    if row.kind != "run":
        return DASH
    return str(len(row.seeds)) if len(row.seeds) == row.attempted else f"{len(row.seeds)} of {row.attempted}"


def trials_text(row: Row) -> str:
    if row.kind != "run":
        return DASH
    return "none" if row.tuning is None else f"{row.tuning['trials']:.0f} ({count_text(row.tuning['passes'])})"


def direction_text(board: Board, name: str) -> str:
    return {True: " ↑", False: " ↓", None: ""}[board.higher_is_better(name)]


def evaluations_text(row: Row) -> str:
    return DASH if row.is_truth else str(row.steps if row.evaluations is None else row.evaluations)


def batches(facts: TrackFacts) -> list[int]:
    """Batch sizes that have a latency column."""
    return list(dict.fromkeys((1, facts.latency_batch)))


def latency_text(record: LatencyRecord | None) -> str:
    """Median seconds per call in milliseconds; `~` in front where the rounds were too noisy to be quoted."""
    if record is None:
        return NOT_RUN
    return ("~" if record.flagged else "") + f"{record.median * 1e3:.3g} ms"


def ratio_text(record: LatencyRecord | None) -> str:
    """The ratio to the teacher's latency with its interval."""
    if record is None or record.ratio is None:
        return DASH if record is not None and record.subject == "teacher" else NOT_RUN
    return f"{record.ratio['value']:#.3g} [{record.ratio['low']:#.3g}, {record.ratio['high']:#.3g}]"


def ratio_base(board: Board) -> str:
    """What latencies are divided by: `teacher at 50`."""
    steps = sorted({record.reference_steps for row in board.rows for record in row.latency.values() if record.reference_steps})
    return "teacher" + (f" at {'/'.join(map(str, steps))}" if steps else "")


def one_line(text: str) -> str:
    return " ".join(text.split())


def heading(board: Board, rows: Sequence[Row], budget: dict[str, Any] | None) -> list[str]:
    """What a table is about: track, budget, and whose students these are."""
    facts = board.facts
    solvers = sorted({str(row.config["solver"]) for row in rows if row.method == "teacher" and "solver" in row.config})
    teacher = facts.teacher + (f", sampled with {' and '.join(solvers)}" if solvers else "")
    allowance = "no runs yet" if budget is None else f"budget {budget_name(budget, facts)}"
    if budget is not None and budget_name(budget, facts) in facts.budgets:
        allowance += f" = {count_text(budget['amount'])} passes"
    charged = "A pass is one forward of the teacher's network on one example; the shipped teacher is not charged."
    return [f"{facts.id}, {allowance}: {facts.title}", f"Teacher: {teacher}. {charged} {coverage(board)}"]


def coverage(board: Board) -> str:
    """How much there is to compare: under each named budget the methods and the fewest and most seeds of their rows."""
    told = []
    for name in board.facts.budgets:
        rows = [row for row in board.rows if row.competes and row.seeds and row.budget is not None and row.budget["name"] == name]
        seeds = sorted({len(row.seeds) for row in rows})
        methods = len({row.method for row in rows})
        span = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' if seeds[0] > 1 else ''}" if seeds else ""
        told.append(f"{name} {methods} method{'s' if methods > 1 else ''}, {span}" if rows else f"{name} none")
    return f"Coverage: {'; '.join(told)}."


def glossary(board: Board) -> str:
    """The columns of all formats in one line."""
    words = [
        board.facts.glossary,
        "#: one more than the methods that beat the row (=: shared)",
        "eval: network evaluations per sample",
        "±: 95 % interval over training seeds (*: one seed, so over samples only)",
        "tied: the paired interval contains 0",
        "truth: what a perfect student gets",
    ]
    if any("processor_seconds" in row.spent for row in board.rows):
        words.append("seconds: processor seconds of a run on the processor, the clock's of one elsewhere or of a record without them")
    if any(row.self_reported for row in board.rows):
        words.append(f"{SELF_REPORTED}: sent in by its author and not rerun by anyone else yet, so neither ranked nor concluded about")
    if any(row.kind == RELEASED for row in board.rows):
        words.append(f"{RELEASED}: trained elsewhere at an unknown cost and scored as it is, under no budget, so not ranked")
    if any(row.trainings > 1 for row in board.rows):
        words.append("k x budget: a student was trained for each step count")
    if any(record.flagged for row in board.rows for record in row.latency.values()):
        words.append("~: latency too noisy to quote")
    if not any(row.latency for row in board.rows):
        words.append("latency: not run")
    return "; ".join(words) + "."
