"""`python -m distillbench.publish mixture2d --store DIR`: a store's records into `leaderboards/<track>/` and the README.

Published are the ok runs under named budgets with the track's recipe: read-only records, previews and losses of seed 0, rendered tables
and the picture; in `claims/` the ablations that the methods' claims stand on, and in `claims.md` what they come to.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from .claims import Decision, decided, jobs_of
from .discovery import discover
from .jobs import Job, resolve
from .leaderboard import Board, render, verdict
from .leaderboard.texts import count_text, latency_text, places_by_column, ratio_text, score_text, spent_text, trained_for_text
from .listing import board_of
from .pictures import draw, panels
from .records import RunRecord
from .report import curves, figures, look
from .store import Store
from .tracks.facts import TrackFacts, facts_of

NAMED = ("S", "M", "L")
SHAPES = ("fd", "attributes", "clipcos", "diversity")
BRIEF = {"mixture2d": ("in-mode", "sliced-w2", "coverage"), "digits": ("fd", "recall", "label-agreement"), "shapes-sd": SHAPES,
         "shapes-sana": SHAPES}  # columns in the README  # fmt: skip


@click.command()
@click.argument("track")
@click.option("--store", "source", default=None, metavar="DIR")
@click.option("--out", default="leaderboards", show_default=True, metavar="DIR")
@click.option("--readme", default="README.md", show_default=True, metavar="FILE")
def main(track: str, source: str | None, out: str, readme: str) -> None:
    """Publish the ok runs of TRACK under named budgets with the track's recipe, and its references."""
    facts = facts_of(track)
    held = Store(source)
    target = Store(Path(out) / facts.home)
    kept = set()
    for record in held.records(facts.id):
        if record.ok and (record.kind == "reference" or _is_current(record)):
            target.add(record)
            kept.add(record.id)
            if record.seed == 0:
                _copy_kept(held.student_folder(record.id), target.student_folder(record.id))
    for latency in held.latencies(facts.id):
        if latency.subject == "teacher" or latency.subject in kept:
            target.add(latency)
    board = board_of(facts.name, target)
    folder = target.folder
    for ending, form in (("md", "markdown"), ("tex", "latex"), ("csv", "csv")):
        (folder / f"table.{ending}").write_text(render(board, form))
    draw(panels(board, target), folder / "samples.png", f"{facts.id}: samples of each method")
    _draw_passes(board, folder / "passes.png")
    ablations = _publish_claims(facts, held, target)
    page = Path(readme)
    page.write_text(with_block(page.read_text(), f"board {facts.name}", brief(board)))
    for lock in folder.rglob(".lock"):
        lock.unlink()
    click.echo(f"{len(kept)} records and {ablations} ablations in {folder}")


def _is_current(record: RunRecord) -> bool:
    """A run under a named budget that a bench would make today: this version of a built-in method, with this recipe."""
    if record.budget is None or record.budget["name"] not in NAMED or record.source_sha256 is not None:
        return False
    job = Job(record.method, record.track, record.budget["name"], record.seed, tuple(record.steps), threads=record.threads)
    return record.method in discover() and resolve(job).record.id == record.id


def _draw_passes(board: Board, path: Path) -> None:
    """The headline curve, quality against passes, as a picture for pages without a browser's pictures."""
    table = [line for line in curves.panels(board) if any(panel.lines for panel in line)]
    looks = look.styles(sorted({row.label for row in board.rows if row.competes}))
    with look.drawing():
        figures.quality_against_passes(table, looks, curves.most_evaluations(board)).savefig(path, dpi=200, facecolor=look.PAGE)


def _publish_claims(facts: TrackFacts, held: Store, target: Store) -> int:
    """The records of this track that claims stand on and no board shows, and the page of the claims; how many records."""
    claims = [claim for found in discover().values() for claim in found.info.claims if facts_of(claim.track) == facts]
    beside = Store(target.folder / "claims")
    records = [held.get(resolve(job).record.id) for job in jobs_of(claims)]
    ablations = [record for record in records if record is not None and record.ok and record.overrides]
    for record in ablations:
        beside.add(record)
    page = claims_page(facts, decided([target, beside], track=facts.name))
    (target.folder / "claims.md").write_text(page)
    return len(ablations)


def claims_page(facts: TrackFacts, decisions: Sequence[Decision]) -> str:
    """The decisions on one track as a Markdown table."""
    header = ("method", "claim", "better", "worse", "metric", "steps", "verdict", "n", "effect", "p", "p (Holm)")
    lines = [
        f"# What the methods' papers claim, on `{facts.id}`", "",
        f"Paired seeds under budget S, 95 % intervals, Holm's correction within a method; at least {facts.claim_seeds} seeds decide.",
        "The effect is how much better the first is than the second, above 0 in the claim's favour. Written by `make publish`.", "",
        "| " + " | ".join(header) + " |", "|" + "---|" * len(header),
    ]  # fmt: skip
    for d in decisions:
        c = d.claim
        sides = f"`{c.better}` | `{c.worse}` | {c.metric} | {c.steps}"
        if d.effect is None:
            figures = f"{d.n} | {d.why} | – | –"
        else:
            margin = f", margin {c.margin:g}" if c.margin else ""
            figures = f"{d.n} | {d.effect.value:+.3g} [{d.effect.low:+.3g}, {d.effect.high:+.3g}]{margin} | {d.p:.2g} | {d.p_adjusted:.2g}"
        lines.append(f"| {d.method} | {c.text} | {sides} | **{d.verdict}** | {figures} |")
    return "\n".join(lines) + "\n"


def with_block(text: str, name: str, block: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- end -->` replaced."""
    return re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{block.strip()}\n{m[2]}", text, flags=re.DOTALL)


def brief(board: Board) -> str:
    """The board at its smallest budget in a few columns, with its verdict and picture."""
    facts = board.facts
    budget = board.sections()[0]
    rows = [row for row in board.under(budget) if row.is_truth or row.kind == "run" or row.steps in (1, 2, 4, 50)]
    names, places = BRIEF[facts.name], places_by_column(board)
    seeds = max((len(row.seeds) for row in rows if row.kind == "run"), default=0)
    arrows = [{True: " ↑", False: " ↓", None: ""}[board.higher_is_better(name)] for name in names]
    batch = facts.latency_batch
    over = f"{seeds} training seeds, 95 % intervals over seeds" if seeds > 1 else "1 training seed, 95 % intervals over samples"
    lines = [
        f"**`{facts.id}`**, budget S ({count_text(facts.budgets['S'])} teacher passes), {over}:", "",
        "| method | evaluations | " + " | ".join(f"{name}{arrow}" for name, arrow in zip(names, arrows, strict=True))
        + f" | trained for | seconds | latency, batch {batch} | ratio to teacher at 50 |",
        "|---|---|" + "---|" * (len(names) + 4),
    ]  # fmt: skip
    for row in rows:
        cells = [score_text(row, name, places[name], interval=row.kind == "run") or "-" for name in names]
        latency = row.latency.get(batch)
        spent = [trained_for_text(row, facts), spent_text(row, "seconds")]
        tail = ["-"] * 4 if row.is_truth else [*spent, latency_text(latency), ratio_text(latency)]
        evaluations = "-" if row.is_truth else str(row.evaluations)
        lines.append("| " + " | ".join([f"**{row.label}**" if row.kind == "run" else row.label, evaluations, *cells, *tail]) + " |")
    lines += [
        "",
        verdict(board, board.under(budget)),
        "",
        "k x S: a student was trained for each step count; ~: latency too noisy to quote.",
        "",
        "Quality against training budget, one panel for each number of evaluations; bands are 95 % intervals over seeds:",
        "",
        f"![quality against passes](leaderboards/{facts.home}/passes.png)",
        "",
        f"![samples](leaderboards/{facts.home}/samples.png)",
    ]
    return "\n".join(lines)


def _copy_kept(source: Path, target: Path) -> None:
    """Previews and losses: what a report shows of a run besides its record."""
    for path in [*source.glob("preview-*.safetensors"), *source.glob("losses.json")]:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    main()
