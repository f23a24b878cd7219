"""`distillbench score`: what others released, or a folder of images, scored without any training."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..cli_options import DATA, DEVICE, STORE, check_device, numbers
from ..errors import UsageError, unknown

if TYPE_CHECKING:
    from ..records import RunRecord
    from ..runner import Report

FORMATS = ("table", "json")


@click.command()
@click.option("--pipeline", default=None, metavar="PATH|ID", help="A diffusers pipeline: a folder, or a hub id with --revision.")
@click.option("--track", default=None, metavar="TRACK", help="What the pipeline is scored on; shapes: the track of its format.")
@click.option("--revision", default=None, metavar="REV", help="Of a hub id: the commit that is meant.")
@click.option("--lora", default=None, metavar="PATH", help="A LoRA of that pipeline: a file, or a folder that diffusers wrote.")
@click.option("--steps", default=None, help="Step counts that are scored (default: 1,2,4).")
@click.option("--guidance", default=None, type=float, help="Guidance scale; 0 or 1: none (default: what the folder states, else none).")
@click.option("--scheduler", default=None, metavar="NAME", help="Scheduler of diffusers (default: the pipeline's own).")
@DATA
@click.option("--images", default=None, metavar="DIR", help="Instead of a pipeline: a folder of images.")
@click.option("--reference", default=None, metavar="DIR", help="The folder of real images that they are held against.")
@click.option("--captions", default=None, metavar="FILE", help="A caption for each image, by name: a line each, or .jsonl.")
@click.option("--n", default=None, type=click.IntRange(1), help="How many of the images are scored, the first by name (default: all).")
@click.option("--resize", default=None, type=click.IntRange(1), metavar="SIDE", help="Crop all images to a square and bring it to SIDE.")
@click.option("--metrics", default=None, metavar="A,B", help="Scores of the images (default: all that can be taken).")
@click.option("--weights", default=None, metavar="DIR", help="Folder of published weights (default: $DISTILLBENCH_WEIGHTS).")
@DEVICE
@click.option("--format", "format_", default="table", show_default=True, help="table or json (the record).")
@STORE
def score(format_: str, device: str, store_dir: str | None, **options: Any) -> None:
    """Score a released pipeline on a track's prompts, or a folder of images against another. Trains nothing."""
    if format_ not in FORMATS:
        raise unknown("format", format_, FORMATS)
    given = {name for name, value in options.items() if value is not None}
    of_pipeline = {"pipeline", "track", "revision", "lora", "steps", "guidance", "scheduler", "data"}
    mine = of_pipeline if options["pipeline"] is not None else set(options) - of_pipeline
    if (options["pipeline"] is None) == (options["images"] is None):
        raise UsageError("give --pipeline PATH --track TRACK, or --images DIR --reference DIR, one of the two")
    if given - mine:
        raise UsageError(f"--{min(given - mine)} does not go with --{'pipeline' if options['pipeline'] is not None else 'images'}")
    for name in ("track",) if options["pipeline"] is not None else ("reference",):
        if options[name] is None:
            raise UsageError(f"--{name} is missing: name the {'track to score on' if name == 'track' else 'folder of real images'}")
    check_device(device)
    chosen = {name: value for name, value in options.items() if name in given}
    record, told = (_pipeline if "pipeline" in given else _images)(chosen, device, store_dir)
    for line in told:
        click.echo(line, err=True)
    click.echo(json.dumps(record.to_json(), indent=1, ensure_ascii=False)) if format_ == "json" else _print(record)


def _pipeline(options: dict[str, Any], device: str, store_dir: str | None) -> tuple[RunRecord, list[str]]:
    from ..closing import store_option
    from ..scoring import open_released, score_released
    from ..store import Store

    store = Store(store_dir)
    where, track = options.pop("pipeline"), options.pop("track")
    if "steps" in options:
        options["steps"] = numbers(options["steps"])
    released = open_released(where, track, device=device, **options)
    if released.note:
        click.echo(released.note, err=True)
    record = _shown(store, released.record.label, lambda say: score_released(released, store, say))
    board = f"The board, with it among the trained ones: distillbench board {released.track.facts.name}{store_option(store)}"
    return record, [*store.problems, _kept(store, record), board]


def _images(options: dict[str, Any], device: str, store_dir: str | None) -> tuple[RunRecord, list[str]]:
    from ..scoring_images import open_folders, score_folders
    from ..store import Store

    store = Store(store_dir)
    if "metrics" in options:
        options["metrics"] = [name for part in options["metrics"].split(",") if (name := part.strip())]
    folders = open_folders(options.pop("images"), options.pop("reference"), **options)
    record = _shown(store, f"images of {folders.images.folder.name}", lambda say: score_folders(folders, store, say, device=device))
    lacking = any(score["value"] is None and "weights" in score["note"] for score in record.scores["1"])
    hint = ["Weights of published networks, and how to fetch them: distillbench doctor"] if lacking else []
    return record, [*store.problems, *folders.about, *hint, _kept(store, record)]


def _shown(store: Any, name: str, work: Callable[[Report], RunRecord]) -> RunRecord:
    """Do the work with a live display; nothing begins for a store that cannot keep the result."""
    from ..bench import ensure_writable
    from ..display import Display

    ensure_writable(store)
    with Display([name]) as display:
        display.update(0, 0.0, "starting")
        record = work(lambda fraction, what: display.update(0, fraction, what))
        display.update(0, 1.0, "ok")
    return record


def _kept(store: Any, record: RunRecord) -> str:
    return f"Record {record.id} is in {store.folder / 'records'}"


def _print(record: RunRecord) -> None:
    """A line a score and step count, as a person reads it."""
    from rich.markup import escape
    from rich.table import Table

    from ..listing import console

    out = console()
    out.print(f"[bold]{escape(record.label)}[/] on {record.track}, released, not trained here")
    several = record.method != "images"
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = [*(("steps", "eval") if several else ()), "score", "value", "95 %", "n", "note"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("score", "note") else "right", overflow="fold", no_wrap=column == "score")
    for steps, scores in record.scores.items():
        for found in scores:
            first = (steps, str(record.evaluations[steps])) if several else ()
            value = "-" if found["value"] is None else f"{found['value']:.4g}"
            interval = "" if found["low"] is None or found["high"] is None else f"[{found['low']:.4g}, {found['high']:.4g}]"
            arrow = {True: " ↑", False: " ↓", None: ""}[found["higher_is_better"]]
            table.add_row(*first, found["name"] + arrow, value, escape(interval), str(found["n"]), escape(found["note"]))
    out.print(table)
