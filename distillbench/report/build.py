"""Collects records and writes the report. See `build`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..leaderboard import Board, render
from ..leaderboard.texts import budget_name
from ..listing import gathered
from ..published import published_evidence, published_folder
from ..records import RunRecord
from ..store import Store
from ..tracks.facts import FACTS, TrackFacts
from . import captions, curves, figures, look, pages, prompts, robust, runs, samples, studies, tables

if TYPE_CHECKING:  # claims.py loads tracks, and with them torch
    from ..claims import Decision

Say = Callable[[str], None]
SHOWN = (1, 2, 4)  # evaluations in the grid of samples
MINE = 'content="distillbench report"'


@dataclass(frozen=True)
class TrackData:
    """A track's records. board: of the runs with the track's recipe (of all, if there is no other).  everything: of all runs, if some have
    changed knobs.  stores: where their samples and losses may be, the user's own first.  studies: published beside the records."""

    facts: TrackFacts
    records: dict[str, RunRecord]
    published: frozenset[str]
    board: Board
    everything: Board | None
    stores: tuple[Store, ...]
    studies: tuple[studies.Study, ...] = ()


def collect(store: Store, *, published: bool) -> list[TrackData]:
    """The tracks that have records; raises `UsageError` if none has."""
    found = [track for facts in FACTS.values() if (track := _track(facts, store, published)).records]
    if not found:
        with_published = "" if published else ", or add --published to see the published records"
        raise UsageError(f"nothing to report: {store.folder} holds no records; run `distillbench bench mixture2d` first{with_published}")
    return found


def _track(facts: TrackFacts, store: Store, published: bool) -> TrackData:
    others = [held for held in published_evidence() if held.folder.is_relative_to(published_folder(facts.name))] if published else []
    found = gathered(facts.name, store, published=published)
    ablations = {record.id: record for held in others for record in held.records(facts.id) if record.overrides}
    records = ablations | found.records
    reported: dict[str, Any] = {"reported": found.reported, "reported_latencies": found.reported_latencies}
    everything = Board.from_records(records.values(), found.latencies, facts, **reported)
    plain = [record for record in records.values() if not record.overrides]
    mixed = any(record.kind == "run" for record in plain) and len(plain) < len(records)
    board = Board.from_records(plain, found.latencies, facts, **reported) if mixed else everything
    records |= {record.id: record for record in found.reported if record.id not in records}
    own = {record.id for record in store.records(facts.id)}
    return TrackData(facts, records, frozenset(records.keys() - own), board, everything if mixed else None, (store, *others),
                     tuple(studies.studies_in(published_folder(facts.name))) if published else ())  # fmt: skip


def build(tracks: Sequence[TrackData], out: Path, decisions: Sequence[Decision] = (), *, say: Say = lambda line: None) -> Path:
    """Write the report of what `collect` found into `out` and return its index page. Equal records give equal files.

    decisions: of the claims, in the order in which they are shown; those on tracks that are not in the report are left out.
    say: told what is going on, one line at a time.  Raises `UsageError` if `out` holds something that is not a report.
    """
    try:
        _prepare(out)
        looks = look.styles(sorted({row.label for track in tracks for row in track.board.rows if row.competes}))
        told = [_write_track(track, out, looks, say) for track in tracks]
        _write_runs(tracks, out, say)
        methods = len({record.method for track in tracks for record in track.records.values() if record.kind == "run"})
        index = out / "index.html"
        claims = tables.claim_groups([one for one in decisions if one.track in {track.facts.id for track in tracks}])
        index.write_text(
            pages.index_page(pages.environment(), told, claims, methods, sum(len(track.records) for track in tracks)), encoding="utf-8"
        )
    except OSError as error:
        raise UsageError(f"cannot write the report to {out}: {error.strerror or error}") from error
    return index


def _prepare(out: Path) -> None:
    """An empty folder, or an earlier report emptied; anything else is left alone."""
    if out.is_dir() and any(out.iterdir()):
        index = out / "index.html"
        if not (index.is_file() and MINE in index.read_text(encoding="utf-8", errors="replace")):
            raise UsageError(f"{out} is not empty and holds no report; name another folder with --out")
        for name in ("runs", "figures", "tables"):
            shutil.rmtree(out / name, ignore_errors=True)
    for name in ("runs", "figures", "tables"):
        (out / name).mkdir(parents=True, exist_ok=True)
    pages.copy_assets(out)
    (out / "index.html").write_text(
        f"<!doctype html><meta name=generator {MINE}><title>unfinished</title>The report is being made.", encoding="utf-8"
    )


def _write_track(track: TrackData, out: Path, looks: figures.Looks, say: Say) -> dict[str, Any]:
    """Figures and tables of a track as files, and what the index page says of it."""
    board, facts = track.board, track.facts
    say(f"{facts.id}: figures")
    with look.drawing():
        shown = _prompts(track, out, looks) or _samples(track, out, looks)
        drawn = [
            figure for figure in (_passes(board, out, looks), _latency(board, out, looks), _categories(board, out, looks), shown) if figure
        ]
        drawn += [_study(study, facts, out, looks) for study in track.studies]
    for ending, form in (("tex", "latex"), ("csv", "csv")):
        (out / "tables" / f"{facts.name}.{ending}").write_text(render(board, form), encoding="utf-8")
    boards = tables.tables(board, track.records)
    changed = {record.id for record in track.records.values() if record.overrides}
    variants = tables.tables(track.everything, track.records, lambda row: changed.issuperset(row.run_ids)) if track.everything else []
    glossary = [(column.name, column.about) for column in boards[0].columns] if boards else []
    return {
        "name": facts.name, "id": facts.id, "about": captions.about(board), "tables": boards, "variants": variants, "figures": drawn,
        "glossary": glossary, "main": facts.main, "arrow": "↓" if board.higher_is_better(facts.main) is False else "↑",
        "robust": robust.summaries(board, track.records), "robust_about": robust.ABOUT,
    }  # fmt: skip


def _passes(board: Board, out: Path, looks: figures.Looks) -> dict[str, Any] | None:
    table = [line for line in curves.panels(board) if any(panel.lines for panel in line)]
    if not table:
        return None
    name, most = f"{board.facts.name}-passes", curves.most_evaluations(board)
    look.save(figures.quality_against_passes(table, looks, most), out / "figures", name)
    look.save(figures.quality_against_passes(table, looks, most, narrow=True), out / "figures", f"{name}-narrow")
    alt = f"Line charts of {captions.listed(line[0].score for line in table)} against training budget; the numbers are in the boards below."
    return {"name": name, "narrow": True, "kind": "chart", "alt": alt, "caption": captions.of_passes(board, table), "places": None}


def _latency(board: Board, out: Path, looks: figures.Looks) -> dict[str, Any] | None:
    facts = board.facts
    by_budget = {budget_name(budget, facts): curves.places(board, budget, np.random.default_rng(0)) for budget in board.budgets}
    by_budget = {budget: places for budget, places in by_budget.items() if any(place.method for place in places)}
    if not by_budget:
        return None
    truth = next((row.value(facts.main) for row in board.rows if row.is_truth), None)
    name, higher = f"{facts.name}-latency", board.higher_is_better(facts.main) is not False
    for narrow, ending in ((False, ""), (True, "-narrow")):
        figure = figures.quality_against_latency(by_budget, facts.main, higher, truth, facts.latency_batch, looks, narrow=narrow)
        look.save(figure, out / "figures", name + ending)
    return {
        "name": name, "narrow": True, "kind": "chart", "caption": captions.of_latency(board, by_budget),
        "alt": f"{facts.main} against the time to sample a batch of {facts.latency_batch}; the numbers are in the table below.",
        "places": [(budget, place) for budget, places in by_budget.items() for place in places],
    }  # fmt: skip


def _samples(track: TrackData, out: Path, looks: figures.Looks) -> dict[str, Any] | None:
    found = samples.grid(track.board, track.stores, SHOWN)
    if found is None:
        return None
    name = f"{track.facts.name}-samples"
    look.save(figures.sample_grid(found, SHOWN, looks), out / "figures", name)
    alt = f"Samples of {captions.listed([*found.top, *found.rows])} side by side."
    return {"name": name, "narrow": False, "kind": "points" if found.points else "images", "alt": alt,
            "caption": captions.of_samples(track.board, found, SHOWN), "places": None}  # fmt: skip


def _prompts(track: TrackData, out: Path, looks: figures.Looks) -> dict[str, Any] | None:
    found = prompts.grid(track.board, track.stores)
    if found is None:
        return None
    name = f"{track.facts.name}-prompts"
    look.save(prompts.draw_grid(found, looks), out / "figures", name)
    alt = f"Images of {len(found.prompts)} prompts, a line for each method and number of evaluations."
    return {"name": name, "narrow": False, "kind": "images", "alt": alt, "caption": captions.of_prompts(track.board, found), "places": None}


def _categories(board: Board, out: Path, looks: figures.Looks) -> dict[str, Any] | None:
    found = prompts.bars(board)
    if not found:
        return None
    name = f"{board.facts.name}-categories"
    look.save(prompts.draw_bars(found, looks), out / "figures", name)
    alt = "Shares of right answers by category; the numbers are in the boards below."
    return {"name": name, "narrow": False, "kind": "chart", "alt": alt, "caption": captions.of_categories(board), "places": None}


def _study(study: studies.Study, facts: TrackFacts, out: Path, looks: figures.Looks) -> dict[str, Any]:
    name = f"{facts.name}-{study.name}"
    look.save(studies.draw(study, looks), out / "figures", name)
    look.save(studies.draw(study, looks, narrow=True), out / "figures", f"{name}-narrow")
    alt = (
        f"Line charts of {captions.listed(dict.fromkeys(panel.score for panel in study.panels))} against teacher passes spent in training."
    )
    return {"name": name, "narrow": True, "kind": "chart", "alt": alt, "caption": studies.caption(study), "places": None}


def _write_runs(tracks: Sequence[TrackData], out: Path, say: Say) -> None:
    environment = pages.environment()
    total, done = sum(len(track.records) for track in tracks), 0
    for track in tracks:
        for record in track.records.values():
            if done % 100 == 0:
                say(f"pages of runs: {done} of {total}")
            done += 1
            kept = {steps: found for steps in record.steps if (found := samples.find_preview(track.stores, record.id, steps)) is not None}
            limit = samples.limit_of(list(kept.values()))
            for steps, panel in kept.items():
                samples.write_png(samples.picture(panel, limit), out / "runs" / f"{record.id}-{steps}.png")
            points = any(panel.x.ndim == 2 for panel in kept.values())
            page = pages.run_page(
                environment, record, published=record.id in track.published, losses=runs.losses_of(track.stores, record.id),
                pictures=[(steps, f"{record.id}-{steps}.png") for steps in kept], points=points,
            )  # fmt: skip
            (out / "runs" / f"{record.id}.html").write_text(page, encoding="utf-8")
