"""The command line. Exit status: 0 done, 1 a run failed or a check was not passed, 2 wrong input, 130 stopped."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from . import __version__
from .cli_options import DATA, DEVICE, JOBS, LOG, STORE, TEACHER, check_device, numbers
from .commands import evidence, latency, new, report, score, submission
from .errors import DistillbenchError, UsageError, unknown


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="distillbench")
def cli() -> None:
    """Benchmark diffusion distillation: one student interface, one metered budget, one protocol."""


@cli.command("list")
@click.argument("what", default="methods", metavar="[methods|tracks|metrics]")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable rows.")
def list_(what: str, as_json: bool) -> None:
    """List methods, tracks or metrics."""
    from .listing import LISTS, print_rows

    if what not in LISTS:
        raise unknown("list", what, LISTS)
    rows = LISTS[what]()
    click.echo(json.dumps(rows, indent=1)) if as_json else print_rows(what, rows)


@cli.command()
@click.argument("method")
@click.argument("track")
@click.option("--budget", default="S", show_default=True, help="S, M, L, or 5e6passes, 60s, 2000steps.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--steps", default=None, show_default="1,2,4, of those that METHOD is made for", help="Step counts that are scored.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a knob of the method; may be given again.")
@TEACHER
@DATA
@DEVICE
@STORE
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on from a checkpoint of the same run, or start afresh.")
@LOG
def run(
    method: str, track: str, budget: str, seed: int, steps: str | None, settings: tuple[str, ...], teacher: str | None, data: str | None,
    device: str, store_dir: str | None, resume: bool, log: str | None,
) -> None:  # fmt: skip
    """Train METHOD (an id, path.py, path.py:Class) on TRACK within a budget, and score it."""
    from .closing import told
    from .execution import jobs_here, run_jobs_here
    from .jobs import merged
    from .listing import print_record
    from .store import Store

    store = Store(store_dir)
    counts = None if steps is None else numbers(steps)
    check_device(device)
    plan = jobs_here(method, track=track, budget=budget, seed=seed, steps=counts, settings=_settings(settings), teacher=teacher, data=data,
                     device=device)  # fmt: skip
    with told(store, plan, log):
        record = merged(run_jobs_here(plan, store, resume=resume, show=True, log=log))
        print_record(record)
        if record.status.startswith("failed"):
            sys.exit(1)


@cli.command()
@click.argument("track")
@click.option(
    "--methods", default=None, metavar="A,B|all", help="Methods to run (default: the track's own list; all: every installed one)."
)
@click.option("--budget", default="S", show_default=True, help="S, M, L, or 5e6passes, 60s, 2000steps.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Number of training seeds.")
@TEACHER
@DATA
@DEVICE
@JOBS
@STORE
@click.option("--plan", "plan_only", is_flag=True, help="Print the plan as JSON and run nothing.")
@LOG
def bench(
    track: str, methods: str | None, budget: str, seeds: int, teacher: str | None, data: str | None, device: str, jobs: int,
    store_dir: str | None, plan_only: bool, log: str | None,
) -> None:  # fmt: skip
    """Run what is missing of a plan, measure latency, and print the leaderboard."""
    from rich.console import Console

    from . import bench as benching
    from .closing import told
    from .discovery import discover
    from .store import Store

    chosen = benching.default_methods(track) if methods is None else list(discover()) if methods == "all" else _names(methods)
    check_device(device)
    plan = benching.make_plan(track, chosen, budget=budget, seeds=seeds, teacher=teacher, data=data, device=device)
    store = Store(store_dir)
    if plan_only:
        missing = {id(job) for job in benching.still_missing(plan, store)}
        click.echo(json.dumps([{**job.to_json(), "done": id(job) not in missing} for job in plan], indent=1))
        return
    console = Console(stderr=True)
    with told(store, plan, log, board_shown=True):
        records = benching.run_plan(plan, store, jobs, console, log)
        benching.measure_missing(track, store, console, plan)
        _tell_problems(store)
        from .listing import print_board

        print_board(track, store)
        failed = [record for record in records if record.status.startswith("failed")]
        for record in failed:
            click.echo(f"{record.label}, seed {record.seed}: {record.status}", err=True)
        if failed:
            sys.exit(1)


@cli.command()
@click.argument("track")
@STORE
@click.option("--published", is_flag=True, help="Show the published records too.")
@click.option("--format", "format_", default="terminal", show_default=True, help="terminal, markdown, csv, latex or json.")
def board(track: str, store_dir: str | None, published: bool, format_: str) -> None:
    """Print the leaderboard of TRACK from the records in the store."""
    from .leaderboard import FORMATS, render
    from .listing import board_of
    from .store import Store

    if format_ not in FORMATS:
        raise unknown("format", format_, FORMATS)
    store = Store(store_dir)
    text = render(board_of(track, store, published=published), format_, width=_width(), color=sys.stdout.isatty())
    _tell_problems(store)
    click.echo(text)


@cli.command()
@click.argument("run_id")
@STORE
def show(run_id: str, store_dir: str | None) -> None:
    """Show one run: what it was, what it spent, what it scored."""
    from .listing import print_record
    from .store import Store

    store = Store(store_dir)
    try:
        print_record(store.find(run_id))
    finally:
        _tell_problems(store)


@cli.group(invoke_without_command=True)
@click.pass_context
def zoo(context: click.Context) -> None:
    """The shipped teachers, classifiers and data."""
    if context.invoked_subcommand is None:
        context.invoke(zoo_list)


@zoo.command("list")
def zoo_list() -> None:
    """List what is shipped, with its card."""
    from .listing import print_rows, zoo_rows

    print_rows("zoo", zoo_rows())


@zoo.command("train")
@click.argument("name")
@click.option("--out", default=None, metavar="DIR", help="Folder to write (default: ./zoo/NAME).")
@click.option("--data", default=None, metavar="PATH", help="The data, where NAME is not trained on what is shipped.")
def zoo_train(name: str, out: str | None, data: str | None) -> None:
    """Make an equivalent of NAME again from its recipe."""
    from .teachers.zoo import zoo_entry

    folder = Path(out or f"zoo/{name}")
    entry = zoo_entry(name)
    card = entry.train(folder, lambda line: click.echo(line, err=True), **entry.on(data))
    click.echo(f"wrote {folder} (sha256 {card['sha256'][:16]}...)")


@cli.command()
@click.argument("target")
def check(target: str) -> None:
    """Hold a method (an id, path.py, path.py:Class) to the contract."""
    from .conformance import check_method

    ok = True
    for result in check_method(target):
        mark = "skip" if result.skipped else "ok" if result.passed else "FAIL"
        click.echo(f"{mark:>4}  {result.name}" + (f": {result.detail}" if result.detail else ""))
        ok &= result.passed or result.skipped
    if not ok:
        sys.exit(1)


@cli.command()
@click.argument("track", required=False)
@TEACHER
@DATA
def doctor(track: str | None, teacher: str | None, data: str | None) -> None:
    """Say what this machine has, and what is missing for what: for everything, or for TRACK with the command that gets it."""
    from .doctor import findings, track_findings

    if track is None and (teacher or data):
        raise UsageError("--teacher and --data belong to a track: distillbench doctor TRACK --teacher PATH --data PATH")
    bad = False
    for state, what, detail in findings() if track is None else track_findings(track, teacher, data):
        click.echo(f"{state:>7}  {what}: {detail}")
        bad |= state == "broken"
    if bad:
        sys.exit(1)


@cli.command()
@click.option("--out", default="distillbench-demo.png", show_default=True, metavar="FILE", help="Where the picture goes.")
def demo(out: str) -> None:
    """Show a board and a picture from the published records; trains nothing."""
    from .leaderboard import render
    from .listing import board_of
    from .pictures import draw, panels
    from .published import published_store

    store = published_store("mixture2d")
    shown = board_of("mixture2d", store)
    if not shown.rows:
        raise UsageError("this installation carries no published records; run `distillbench bench mixture2d` to make your own")
    click.echo(render(shown, "terminal", width=_width(), color=sys.stdout.isatty()))
    found = panels(shown, store)
    if found:
        draw(found, Path(out), "mixture2d, published records: what each method's samples look like")
        click.echo(f"\nThe picture is {out}. Next: distillbench bench mixture2d")


for command in (
    evidence.claims,
    evidence.gate,
    evidence.tune,
    latency.latency,
    new.new,
    report.report,
    score.score,
    submission.submit,
    submission.verify,
):
    cli.add_command(command)


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UsageError("--methods names no method; write ids or files separated by commas, or all")
    return list(dict.fromkeys(names))


def _settings(settings: tuple[str, ...]) -> dict[str, str]:
    from .config import parse_settings

    return parse_settings(settings)


def _width() -> int:
    import shutil

    return max(60, min(160, shutil.get_terminal_size((100, 24)).columns))


def _tell_problems(store: Any) -> None:
    for problem in store.problems:
        click.echo(problem, err=True)


def main() -> None:
    """Entry point: every foreseen failure is one line on stderr."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.UsageError as error:
        click.echo(f"distillbench: {error.format_message()} (see distillbench {_command(error)}--help)", err=True)
        sys.exit(2)
    except UsageError as error:
        click.echo(f"distillbench: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; the state is kept, the same command goes on from here", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except DistillbenchError as error:
        click.echo(f"distillbench: {error}", err=True)
        sys.exit(130 if type(error).__name__ == "Interrupted" else 1)


def _command(error: click.UsageError) -> str:
    name = error.ctx.info_name if error.ctx is not None and error.ctx.parent is not None else None
    return f"{name} " if name else ""
