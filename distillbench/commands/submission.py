"""`submit` packs an author's records for a pull request, `verify` reruns one seed of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..cli_options import STORE


@click.command()
@click.argument("method")
@click.option("--track", default="mixture2d", show_default=True)
@click.option("--budget", default="S", show_default=True, help="S, M, L, or 5e6passes, 2000steps.")
@click.option("--source", default=None, metavar="URL", help="Where the method's file can be read (default: in the pull request).")
@STORE
@click.option("--out", default="submissions", show_default=True, metavar="DIR")
def submit(method: str, track: str, budget: str, source: str | None, store_dir: str | None, out: str) -> None:
    """Pack the records of METHOD (an id, path.py, path.py:Class) into one file for a pull request."""
    from ..packing import pack, write_submission
    from ..store import Store
    from ..submission import FOLDER
    from ..tracks.facts import facts_of

    store = Store(store_dir)
    try:
        name, content = pack(method, track, budget, store, source)
    finally:
        for problem in store.problems:
            click.echo(problem, err=True)
    path = write_submission(Path(out), name, content)
    file = content["source"]["file"]
    attach = f"; say in it where {file} can be read, or attach it" if source is None else ""
    click.echo(f"{path}: {len(content['records'])} records, {len(content['latencies'])} latencies, the checksums of their students.")
    click.echo(f"Next: put it under leaderboards/{facts_of(track).name}/{FOLDER}/ and open a pull request{attach}.")
    click.echo(f"`distillbench verify {path} --method {method}` shows you what a maintainer will see. docs/submit.md explains.")


@click.command()
@click.argument("file")
@click.option("--method", default=None, metavar="PATH", help="The method's file (default: the installed method of that id).")
@click.option("--seed", default=None, type=click.IntRange(0), help="Seed to rerun (default: drawn at random).")
@click.option("--store", "store_dir", default=None, metavar="DIR", help="Fresh folder in which the rerun is kept (default: it is not).")
def verify(file: str, method: str | None, seed: int | None, store_dir: str | None) -> None:
    """Check a submission and rerun one seed of it. This runs the method's code: read it first."""
    from ..bench import name_of
    from ..display import Display
    from ..verification import verify as verify_file

    def show(jobs: Sequence[Any]) -> Display:
        return Display([name_of(job) for job in jobs])

    done = verify_file(Path(file), method, seed, store_dir, show)
    click.echo(f"{done.submission.method} on {done.submission.track}: seed {done.seed} rerun, {len(done.scores)} scores agree, {done.how}.")
    click.echo(f"Wrote {done.submission.verified_path}; commit it beside the submission and the board drops the label self-reported.")
