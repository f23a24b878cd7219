"""What the command line prints: lists, boards, single records. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .closing import store_option
from .discovery import discover
from .leaderboard import Board, render
from .leaderboard.texts import count_text
from .published import published_store
from .records import LatencyRecord, RunRecord
from .store import Store
from .submission import FOLDER, Submitted, submitted
from .tracks.facts import EXTERNAL, FACTS, facts_of

if TYPE_CHECKING:
    from .claims import Decision
    from .tuning import Study

Rows = list[dict[str, Any]]


def method_rows() -> Rows:
    """One row a method, from its card."""
    rows = []
    for name, found in discover().items():
        info = found.info
        rows.append({
            "id": name, "family": info.family, "domain": list(info.domain), "needs": list(info.needs), "title": info.title,
            "paper": info.paper, "year": info.year, "version": info.version, "data_access": info.data_access,
            "steps": list(info.steps), "trains": info.trains, "deviations": list(info.deviations),
            "claims": [claim.text for claim in info.claims],
        })  # fmt: skip
    return rows


def track_rows() -> Rows:
    return [
        {
            "id": facts.id,
            "title": facts.title,
            "teacher": facts.teacher,
            "main": facts.main,
            "scores": list(facts.columns),
            "budgets": facts.budgets,
        }
        for facts in (FACTS | EXTERNAL).values()
    ]


def metric_rows() -> Rows:
    """Every score of every track with its line of the glossary."""
    rows = []
    for facts in (FACTS | EXTERNAL).values():
        told = {}
        for part in facts.glossary.split("; "):
            names, _, meaning = part.partition(": ")
            for name in names.replace(" and ", ",").split(","):
                told[name.strip()] = meaning
        rows += [{"name": name, "track": facts.id, "main": name == facts.main, "meaning": told.get(name, "")} for name in facts.columns]
    return rows


def zoo_rows() -> Rows:
    from .errors import BadFileError
    from .teachers.cards import read_card
    from .teachers.zoo import ZOO

    rows = []
    for entry in ZOO.values():
        try:
            card = read_card(entry.folder)
        except BadFileError as error:
            rows.append({"name": entry.name, "what": entry.title, "parameters": "-", "recipe": str(error), "sha256": "-"})
            continue
        held = card.get("parameters", 0)
        rows.append({
            "name": entry.name, "what": f"{entry.title} ({entry.cost})",
            "parameters": f"{sum(held.values()) if isinstance(held, dict) else held:,}",
            "recipe": f"distillbench zoo train {entry.name}{' --data PATH' if entry.needs_data else ''}", "sha256": card["sha256"][:12],
        })  # fmt: skip
    return rows


LISTS: dict[str, Callable[[], Rows]] = {"methods": method_rows, "tracks": track_rows, "metrics": metric_rows}
_SHOWN = {
    "methods": ("id", "family", "year", "needs", "data_access", "steps", "title"),
    "tracks": ("id", "title", "teacher", "main", "budgets"),
    "metrics": ("name", "track", "meaning"),
    "zoo": ("name", "what", "parameters", "sha256", "recipe"),
}


def print_rows(what: str, rows: Rows) -> None:
    """A table that fits the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in _SHOWN[what]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*[escape(_text(row[column])) for column in _SHOWN[what]])
    console().print(table)


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {count_text(amount)}" for key, amount in value.items())
    return str(value)


class Gathered(NamedTuple):
    """A track's evidence. records: by id, verified submissions included.  reported: what nobody but its author has run."""

    records: dict[str, RunRecord]
    latencies: list[LatencyRecord]
    reported: list[RunRecord]
    reported_latencies: list[LatencyRecord]


def gathered(track: str, store: Store, *, published: bool = False) -> Gathered:
    """What a store holds of a track, with the published records and those that authors sent in beside them if asked for.

    A submission that is not trusted is named in the store's `problems`. Latencies of a verified one are left out: no one has repeated them.
    """
    facts = facts_of(track)
    stores = [store, published_store(track)] if published else [store]
    records = {record.id: record for held in reversed(stores) for record in held.records(facts.id)}
    latencies = [latency for held in reversed(stores) for latency in held.latencies(facts.id)]
    sent = submitted(stores[-1].folder / FOLDER, facts, list(records.values())) if published else Submitted()
    store.problems += sent.problems
    verified = {record.id: record for found in sent.verified for record in found.records}
    return Gathered(
        verified | records, latencies, [record for found in sent.reported for record in found.records],
        [latency for found in sent.reported for latency in found.latencies],
    )  # fmt: skip


def board_of(track: str, store: Store, *, published: bool = False) -> Board:
    """The board of what `gathered` finds."""
    found = gathered(track, store, published=published)
    return Board.from_records(
        found.records.values(), found.latencies, track, reported=found.reported, reported_latencies=found.reported_latencies
    )


def print_board(track: str, store: Store) -> None:
    """The leaderboard, its picture, and what to type next."""
    from .pictures import draw, panels

    facts = facts_of(track)
    board = board_of(track, store)
    print(render(board, "terminal", width=max(80, min(160, console().width)), color=sys.stdout.isatty()))
    found = panels(board, store)
    if found:
        path = store.folder / f"{facts.name}.png"
        draw(found, path, f"{facts.id}: what the samples look like")
        print(f"\nPicture: {path}")
    again = f"distillbench board {facts.name}{store_option(store)}"
    print(f"Again at any time: {again}. With the published rows: {again} --published.")


def print_record(record: RunRecord) -> None:
    """One record as a person reads it."""
    out = console()
    budget = record.budget or {}
    status = escape(record.status)
    out.print(f"[bold]{escape(record.label)}[/] on {record.track}, seed {record.seed}, budget {budget.get('name', 'none')}: {status}")
    trained = "released, not trained here" if record.kind == "released" else f"trained for {_text(record.trained_for)} steps"
    out.print(f"run {record.id}, {trained}, {record.parameters or 0:,} parameters")
    if record.spent:
        spent = record.spent
        out.print(
            f"spent {spent.get('passes', 0):,.0f} teacher passes in {spent.get('seconds', 0):.1f} s: "
            f"{spent.get('updates', 0):,.0f} updates, {spent.get('images', 0):,.0f} examples, {spent.get('peak_memory_mb', 0):,.0f} MB"
        )
    if record.scores:
        names = [score["name"] for score in next(iter(record.scores.values()))]
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("steps")
        for name in names:
            table.add_column(name, justify="right")
        for steps, scores in record.scores.items():
            table.add_row(steps, *["-" if score["value"] is None else f"{score['value']:.4g}" for score in scores])
        out.print(table)
    if record.config:
        out.print("knobs: " + ", ".join(f"{name}={value}" for name, value in record.config.items()), markup=False)


def print_decisions(decisions: list[Decision]) -> None:
    """The claims, a block each: they are sentences, and a table of them would not fit."""
    out = console()
    for decision in decisions:
        claim, effect = decision.claim, decision.effect
        out.print(f"[bold]{decision.verdict}[/]  {decision.method} {decision.number}: {escape(claim.text)}")
        plural = "s" if claim.steps > 1 else ""
        out.print(escape(f"    {claim.better} over {claim.worse}, {claim.metric} on {decision.track} at {claim.steps} step{plural}"))
        if effect is None:
            out.print(escape(f"    {decision.why}"))
            continue
        margin = f", margin {claim.margin:g}" if claim.margin else ""
        note = f" ({decision.why})" if decision.why else ""
        numbers = f"by {effect.value:+.3g} [{effect.low:+.3g}, {effect.high:+.3g}]{margin}, n = {decision.n}"
        out.print(escape(f"    {numbers}, p = {decision.p:.2g}, {decision.p_adjusted:.2g} by Holm{note}"))
    counts = {
        verdict: sum(decision.verdict == verdict for decision in decisions) for verdict in dict.fromkeys(d.verdict for d in decisions)
    }
    out.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "no claims")


def print_trials(study: Study) -> None:
    """The trials of a tuning, the best one marked."""
    knobs = list(dict.fromkeys(name for trial in study.trials for name in trial.values))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("trial", *knobs, f"{study.facts.tuned_on}, validation", "passes", ""):
        table.add_column(column, justify="right")
    for number, trial in enumerate(study.trials, start=1):
        values = [_text(trial.values.get(name, "default")) for name in knobs]
        best = "best" if trial is study.best else escape(trial.note[:60])
        table.add_row(str(number), *values, f"{trial.score:.4g}", count_text(trial.passes), best)
    console().print(table)
