"""`distillbench report`: the records as a folder of pages."""

from __future__ import annotations

from pathlib import Path

import click

from ..cli_options import STORE


@click.command()
@STORE
@click.option("--published", is_flag=True, help="Show the published records too.")
@click.option("--out", default=None, metavar="DIR", help="Folder of the report (default: report/ in the store).")
def report(store_dir: str | None, published: bool, out: str | None) -> None:
    """Write a static report: boards, figures, claims and a page for each run."""
    from ..published import published_evidence
    from ..report.build import build, collect
    from ..store import Store

    store = Store(store_dir)
    folder = Path(out) if out is not None else store.folder / "report"
    tracks = collect(store, published=published)
    from ..claims import decided  # loads the methods, and with them torch: not before it is known that there is something to report

    decisions = decided([store, *(published_evidence() if published else [])])
    index = build(tracks, folder, decisions, say=lambda line: click.echo(line, err=True))
    for problem in store.problems:
        click.echo(problem, err=True)
    click.echo(f"{index}\nOpen it in a browser: {index.resolve().as_uri()}")
