"""What the page of one run says: how to do it again, its knobs, its scores with their identities, and its losses."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import as_text
from ..leaderboard.texts import count_text
from ..record_checks import score_key
from ..records import RunRecord
from ..store import Store
from ..tracks.facts import FACTS

MOST_POINTS = 200  # of a curve
WIDTH, HEIGHT = 320.0, 130.0  # of a chart of losses


@dataclass(frozen=True)
class Chart:
    """A curve of one loss as a line in a box of WIDTH x HEIGHT. low, high, last: its numbers, as text."""

    title: str
    points: str
    log: bool
    low: str
    high: str
    last: str
    end: str  # teacher passes at the right edge


def command_of(record: RunRecord) -> str:
    """The command line that runs this again, apart from the number of threads and the device."""
    track = record.track.partition("@")[0]
    if record.kind == "released":
        told = [("pipeline", record.label.partition("(")[0]), ("steps", ",".join(map(str, record.steps))), ("track", track)]
        told += [(name, as_text(record.config[name])) for name in ("guidance", "scheduler") if name in record.config]
        return shlex.join(["distillbench", "score", *(word for name, value in told for word in (f"--{name}", value))])
    if record.kind == "reference" or record.budget is None:
        return f"distillbench bench {shlex.quote(track)}"
    own_file = next(
        (name for name, sha in record.provenance.items() if record.source_sha256 is not None and sha == record.source_sha256), None
    )
    words = ["distillbench", "run", own_file or record.method, track, "--budget", _budget(record), "--seed", str(record.seed), "--steps"]
    words.append(",".join(map(str, record.steps)))
    for name, value in sorted(record.overrides.items()):
        words += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else as_text(value)}"]
    return shlex.join(words)


def _budget(record: RunRecord) -> str:
    """The name where the track gives it this amount, else the amount to its last digit."""
    budget = record.budget or {}
    facts = FACTS.get(record.track.partition("@")[0])
    if facts is not None and budget["unit"] == "passes" and facts.budgets.get(budget["name"]) == float(budget["amount"]):
        return str(budget["name"])
    return f"{float(budget['amount']):.17g}{budget['unit']}"


def knobs_of(record: RunRecord) -> list[tuple[str, str, bool]]:
    """(name, value, changed from the track's recipe)."""
    return [(name, _plain(value), name in record.overrides) for name, value in sorted(record.config.items())]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "(empty)"
    if isinstance(value, Mapping):
        return json.dumps(value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


_SPENT = {
    "passes": "teacher passes", "macs": "multiply-adds", "seconds": "seconds by the clock", "processor_seconds": "seconds of the processor",
    "images": "examples", "peak_memory_mb": "peak memory, MB",
}  # fmt: skip


def spent_of(record: RunRecord) -> list[tuple[str, str]]:
    return [(_SPENT.get(name, name), f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}") for name, value in record.spent.items()]


def scores_of(record: RunRecord) -> list[dict[str, Any]]:
    """A row a step count and score."""
    rows = []
    for steps, scores in sorted(record.scores.items(), key=lambda item: int(item[0])):
        for score in scores:
            known = score["low"] is not None and score["high"] is not None
            rows.append({
                "steps": steps, "evaluations": record.evaluations.get(steps), "name": score["name"],
                "arrow": {True: "↑", False: "↓", None: ""}[score["higher_is_better"]],
                "value": "–" if score["value"] is None else f"{score['value']:.4g}", "note": score["note"],
                "interval": f"[{score['low']:.4g}, {score['high']:.4g}]" if known else "–", "n": f"{score['n']:,}",
                "key": score_key(score["identity"]),
                "identity": [(name, _identity(value)) for name, value in sorted(score["identity"].items())],
            })  # fmt: skip
    return rows


def _identity(value: Any) -> str:
    return "none" if value is None or value == [] else value if isinstance(value, str) else json.dumps(value)


def losses_of(stores: Sequence[Store], run_id: str) -> list[dict[str, Any]]:
    """The losses that a run left beside its student: [{"passes", "turn", term: value}]; empty if it left none that can be read."""
    for store in stores:
        try:
            data = json.loads((store.student_folder(run_id) / "losses.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(data, list) and all(isinstance(line, dict) and "passes" in line for line in data):
            return data
    return []


def charts(losses: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each turn and term, in the order in which they first come."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in losses:
        for term, value in line.items():
            if term not in ("passes", "turn") and isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(f"{line.get('turn', '')}: {term}", []).append((float(line["passes"]), float(value)))
    end = max((x for curve in curves.values() for x, _ in curve), default=0.0)
    return [_chart(title, curve, end) for title, curve in curves.items()]


def _chart(title: str, curve: Sequence[tuple[float, float]], end: float) -> Chart:
    stride = -(-len(curve) // MOST_POINTS)
    parts = [curve[i : i + stride] for i in range(0, len(curve), stride)]
    points = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]  # means, not picks: losses jump
    values = [y for _, y in points]
    low, high = min(values), max(values)
    log = low > 0 and high > 20 * low
    bottom, top = (math.log(low), math.log(high)) if log else (low, high)
    placed = []
    for x, y in points:
        share = ((math.log(y) if log else y) - bottom) / (top - bottom) if top > bottom else 0.5
        placed.append(f"{WIDTH * x / end if end else 0:.1f},{HEIGHT * (1 - share):.1f}")
    return Chart(title, " ".join(placed), log, f"{low:.3g}", f"{high:.3g}", f"{values[-1]:.3g}", count_text(end))
