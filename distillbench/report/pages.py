"""Pages from templates. Everything that comes from a record is escaped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .. import __version__
from ..leaderboard.texts import budget_name
from ..records import RunRecord
from ..tracks.facts import facts_of
from . import runs
from .captions import CLAIMS, PASS

_HERE = Path(__file__).parent


def environment() -> Environment:
    return Environment(loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def copy_assets(out: Path) -> None:
    for name in ("style.css", "sort.js"):
        shutil.copyfile(_HERE / name, out / name)


def index_page(pages: Environment, tracks: Sequence[Mapping[str, Any]], claims: Sequence[Any], methods: int, records: int) -> str:
    return pages.get_template("index.html.j2").render(
        root="", version=__version__, tracks=tracks, claims=claims, claims_about=CLAIMS, pass_about=PASS, methods=methods, runs=records,
    )  # fmt: skip


def run_page(
    pages: Environment,
    record: RunRecord,
    *,
    published: bool,
    losses: Sequence[Mapping[str, Any]],
    pictures: Sequence[tuple[int, str]],
    points: bool,
) -> str:
    """pictures: (steps, file beside the page)."""
    facts = facts_of(record.track)
    budget = budget_name(record.budget, facts)
    identity = [
        ("run", record.id),
        ("method", f"{record.method}, version {record.method_version}, {record.family or 'reference'}"),
        ("track", record.track),
        ("budget", "none" if record.budget is None else f"{float(record.budget['amount']):,.0f} {record.budget['unit']}"),
        ("training seed", record.seed),
        ("step counts scored", ", ".join(map(str, record.steps))),
        ("step counts trained for", ", ".join(map(str, record.trained_for)) or "none"),
        ("training data", record.data_access or "none"),
        ("tuning", _tuning(record)),
        ("threads, numbers, device", f"{record.threads}, {record.dtype}, {record.device_class}"),
        ("rules of running and scoring", record.rules),
        ("made", record.created),
        ("record", "published with distillbench" if published else "of the store"),
    ]
    if record.source_sha256:
        identity.append(("source of the method (SHA-256)", record.source_sha256))
    return pages.get_template("run.html.j2").render(
        root="../", version=__version__, record=record, track_name=facts.name, budget=budget,
        command=runs.command_of(record), identity=identity, scores=runs.scores_of(record), charts=runs.charts(losses),
        pictures=pictures, picture_kind="points" if points else "images",
        knobs=runs.knobs_of(record), spent=runs.spent_of(record),
    )  # fmt: skip


def _tuning(record: RunRecord) -> str:
    tuning = record.tuning or {}
    return f"{tuning['trials']:.0f} trials, {tuning['passes']:,.0f} passes" if tuning.get("trials") else "none"
