"""Put a store's records into `leaderboards/<track>/`: read-only records, previews, rendered tables and the picture.

python -m distillbench.publish mixture2d --store .distillbench
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from .leaderboard import render
from .listing import board_of
from .pictures import draw, panels
from .store import Store
from .tracks.facts import facts_of

NAMED = ("S", "M", "L")


@click.command()
@click.argument("track")
@click.option("--store", "source", default=None, metavar="DIR")
@click.option("--out", default="leaderboards", show_default=True, metavar="DIR")
def main(track: str, source: str | None, out: str) -> None:
    """Publish the ok runs of TRACK under named budgets with the track's recipe, and its references."""
    facts = facts_of(track)
    held = Store(source)
    target = Store(Path(out) / facts.name)
    kept = set()
    for record in held.records(facts.id):
        named = record.kind == "reference" or (record.budget is not None and record.budget["name"] in NAMED)
        if record.ok and named and not record.overrides and record.source_sha256 is None:
            target.add(record)
            kept.add(record.id)
            if record.seed == 0:
                _copy_previews(held.student_folder(record.id), target.student_folder(record.id))
    for latency in held.latencies(facts.id):
        if latency.subject == "teacher" or latency.subject in kept:
            target.add(latency)
    board = board_of(facts.name, target)
    folder = target.folder
    (folder / "table.md").write_text(render(board, "markdown") + "\n")
    (folder / "table.tex").write_text(render(board, "latex") + "\n")
    (folder / "table.csv").write_text(render(board, "csv") + "\n")
    draw(panels(board, target), folder / "samples.png", f"{facts.id}: what the samples look like")
    (folder / ".lock").unlink(missing_ok=True)
    click.echo(f"{len(kept)} records in {folder}")


def _copy_previews(source: Path, target: Path) -> None:
    for path in source.glob("preview-*.safetensors"):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    main()
