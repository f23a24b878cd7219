"""The sentence under a board: what its numbers allow one to conclude, by paired intervals over shared training seeds."""

from __future__ import annotations

from collections.abc import Sequence

from ..statistics import mean_interval
from .board import Board, Row, advantage


def _names(rows: Sequence[Row], most: int = 4) -> str:
    names = [row.label if row.evaluations == row.steps else f"{row.label} ({row.steps} steps)" for row in rows]
    if len(names) > most:
        names = names[: most - 1] + [f"{len(names) - most + 1} others"]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _at(evaluations: int) -> str:
    return f"{evaluations} evaluation{'' if evaluations == 1 else 's'}"


def _among_methods(board: Board, rows: Sequence[Row]) -> str:
    """ "dmd2 beats cd", "cd and dmd2 are tied ahead of x", or that seeds are missing."""
    leader, others = rows[0], rows[1:]
    pairs = [(row, advantage(board.higher_is_better(board.facts.main), board.facts.main, leader, row)) for row in others]
    beaten = [row for row, pair in pairs if pair is not None and pair.n >= 2 and pair.sign > 0]
    tied = [row for row, pair in pairs if pair is not None and pair.n >= 2 and pair.sign == 0]
    ahead = [row for row, pair in pairs if pair is not None and pair.n >= 2 and pair.sign < 0]
    unpaired = [row for row, pair in pairs if pair is None or pair.n < 2]
    parts = []
    if tied:
        parts.append(f"{_names([leader, *tied])} are tied" + (f", {leader.label} beats {_names(beaten)}" if beaten else ""))
    elif beaten:
        parts.append(f"{leader.label} beats {_names(beaten)}")
    if ahead:  # the leader's mean is over other seeds than those that they share
        parts.append(f"{_names(ahead)} beats {leader.label} on the seeds that both have")
    if unpaired:
        parts.append(f"{leader.label} against {_names(unpaired)} is undecided (fewer than 2 shared seeds)")
    return ", ".join(parts)


def _against_teacher(board: Board, groups: dict[int, list[Row]], references: Sequence[Row]) -> str:
    """Which methods are better or worse than the teacher at as many evaluations."""
    name = board.facts.main
    sign = -1.0 if board.higher_is_better(name) is False else 1.0
    teacher = {row.evaluations: row.value(name) for row in references if row.method == "teacher"}
    told: dict[str, list[tuple[int, list[Row]]]] = {"beats": [], "loses to": [], "is tied with": []}
    for evaluations, rows in groups.items():
        base = teacher.get(evaluations)
        if base is None:
            continue
        signs: dict[str, list[Row]] = {}
        for row in rows:
            by_seed = row.cells[name].by_seed
            if len(by_seed) >= 2:
                outcome = mean_interval([sign * (value - base) for value in by_seed.values()]).sign
                signs.setdefault(["is tied with", "beats", "loses to"][outcome], []).append(row)
        for verb, found in signs.items():
            told[verb].append((evaluations, found))
    parts = []
    for verb, places in told.items():
        together: dict[str, list[int]] = {}
        for evaluations, rows in places:
            together.setdefault(_names(sorted(rows, key=lambda row: row.label)), []).append(evaluations)
        for names, at in together.items():
            plural = " and " in names
            said = {"beats": "beat", "loses to": "lose to", "is tied with": "are tied with"}[verb] if plural else verb
            parts.append(f"{names} {said} the teacher at {_list(at)}")
    return "; ".join(parts)


def _list(numbers: Sequence[int]) -> str:
    texts = [str(number) for number in sorted(numbers)]
    joined = texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]
    return f"{joined} evaluation{'' if texts == ['1'] else 's'}"


def verdict(board: Board, rows: Sequence[Row]) -> str:
    """One sentence for the rows of one budget. With a single seed nothing is decided, and it says so."""
    name = board.facts.main
    scored = [row for row in rows if row.competes and row.value(name) is not None]
    if not scored:
        return f"Nothing can be concluded: no method was scored on {name} under this budget."
    groups: dict[int, list[Row]] = {}
    for row in scored:
        groups.setdefault(row.evaluations or row.steps, []).append(row)
    if max(len(row.cells[name].by_seed) for row in scored) < 2:
        leaders: dict[str, list[int]] = {}
        for evaluations, group in groups.items():
            leaders.setdefault(group[0].label, []).append(evaluations)
        led = ", ".join(f"{label} at {_list(at)}" for label, at in leaders.items())
        return f"One training seed: training noise is unknown, so nothing is decided; on {name} this seed puts in front {led}."
    parts = [f"at {_at(evaluations)} {said}" for evaluations, group in groups.items() if (said := _among_methods(board, group))]
    seeds = sorted({len(row.cells[name].by_seed) for row in scored})
    shown = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    against = _against_teacher(board, groups, [row for row in rows if row.kind == "reference"])
    sentence = "; ".join(parts + ([against] if against else [])) or f"one method alone, {scored[0].label}, is not compared"
    return f"On {name} ({shown} training seed{'' if shown == '1' else 's'}, 95 % paired intervals): {sentence}."
