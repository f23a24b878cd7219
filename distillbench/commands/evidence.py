"""The commands that turn runs into conclusions: claims, gate, tune."""

from __future__ import annotations

import sys

import click

from ..cli_options import JOBS, LOG, STORE


@click.command()
@click.argument("method", required=False)
@click.option("--track", default=None, metavar="TRACK", help="Only the claims on this track.")
@click.option("--seeds", default=None, type=click.IntRange(2), help="Paired seeds (default: what the track asks for).")
@click.option("--published", is_flag=True, help="Run nothing; decide from the published records and those of the store.")
@JOBS
@LOG
@STORE
def claims(
    method: str | None, track: str | None, seeds: int | None, published: bool, jobs: int, log: str | None, store_dir: str | None
) -> None:
    """Run what the claims of METHOD (default: of every method) stand on, and say which hold."""
    from rich.console import Console

    from ..bench import run_plan
    from ..claims import decided, jobs_of, methods_with_claims
    from ..closing import told
    from ..listing import print_decisions
    from ..published import published_evidence
    from ..store import Store
    from ..tracks.facts import facts_of

    name = None if track is None else facts_of(track).name
    methods = methods_with_claims(method)
    chosen = [claim for found in methods.values() for claim in found.info.claims if name in (None, facts_of(claim.track).name)]
    store = Store(store_dir)
    for on in dict.fromkeys(facts_of(claim.track).name for claim in chosen if not published):
        plan = jobs_of([claim for claim in chosen if facts_of(claim.track).name == on], seeds)
        with told(store, plan, log):
            run_plan(plan, store, jobs, Console(stderr=True), log)
    for problem in store.problems:
        click.echo(problem, err=True)
    print_decisions(decided([store, *(published_evidence() if published else [])], methods, name, seeds))


@click.command()
@click.argument("target")
@click.option(
    "--against",
    default=None,
    metavar="METHOD",
    help="The baseline (default: the installed method of the same id, else the best published one).",
)
@click.option("--track", default="mixture2d", show_default=True)
@click.option("--budget", default="S", show_default=True, help="S, M, L, or 5e6passes, 60s, 2000steps.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(2), help="Training seeds that both share.")
@click.option("--margin", default="5%", show_default=True, metavar="X", help="How much worse is tolerated: in the score's unit, or 5%.")
@JOBS
@LOG
@STORE
def gate(
    target: str, against: str | None, track: str, budget: str, seeds: int, margin: str, jobs: int, log: str | None, store_dir: str | None
) -> None:
    """Hold TARGET (an id, path.py, path.py:Class) against a baseline. Exit status 0: better or not worse, 1: worse, 3: undecided."""
    from ..gate import gate as decide
    from ..store import Store

    outcome = decide(target, against, track=track, budget=budget, seeds=seeds, margin=margin, store=Store(store_dir), workers=jobs, log=log)
    click.echo(outcome.reasons)
    sys.exit(outcome.exit_code)


@click.command()
@click.argument("method")
@click.argument("track")
@click.option("--out", default=None, metavar="FILE", help="Recipe to write (default: recipes/TRACK.toml beside the method's file).")
@JOBS
@LOG
@STORE
def tune(method: str, track: str, out: str | None, jobs: int, log: str | None, store_dir: str | None) -> None:
    """Tune METHOD for TRACK by the common protocol: 8 trials of at most 3 knobs at S/4, on a seed and a reference no board uses."""
    from pathlib import Path

    from rich.console import Console

    from ..listing import print_trials
    from ..store import Store
    from ..tuning import run_trials, write_recipe

    study = run_trials(method, track, Store(store_dir), jobs, Console(stderr=True), log)
    path = write_recipe(study, None if out is None else Path(out))
    print_trials(study)
    click.echo(f"wrote the best of {len(study.trials)} trials to {path}")
