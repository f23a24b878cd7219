"""`distillbench latency`: how long whole pipelines take, by stages."""

from __future__ import annotations

import json

import click

from ..cli_options import DATA, STORE, TEACHER, numbers


@click.command()
@click.argument("track")
@click.option("--pipeline", default=None, metavar="PATH_OR_ID", help="Measure this pipeline too (a folder, or a hub id with --revision).")
@click.option("--revision", default=None, metavar="R", help="Of the hub id.")
@click.option("--lora", default=None, metavar="PATH", help="A LoRA file that is fused into the pipeline.")
@click.option("--guidance", default=None, type=float, metavar="G", help="Scale of the pipeline's guidance (default: what its folder says).")
@click.option("--steps", default="1,2,4", show_default=True, help="Step counts of --pipeline.")
@click.option("--batch", default="1,largest", show_default=True, help="Batches: numbers, or largest (what fits).")
@click.option("--compile", "compile_too", is_flag=True, help="Measure with torch.compile as well.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="Rounds that count.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda")
@click.option("--format", "format_", default="table", show_default=True, metavar="table|json")
@TEACHER
@DATA
@STORE
def latency(
    track: str, pipeline: str | None, revision: str | None, lora: str | None, guidance: float | None, steps: str, batch: str,
    compile_too: bool, rounds: int, threads: int, device: str, format_: str, teacher: str | None, data: str | None,
    store_dir: str | None,
) -> None:  # fmt: skip
    """Time TRACK's teacher, the students of seed 0 in the store, and a pipeline: text encoder, denoiser, decoder, end to end."""
    from rich.console import Console

    from ..bench import ensure_writable
    from ..display import Display
    from ..errors import unknown
    from ..latency_subjects import check_device, parse_batches, pipeline_track, subjects_of
    from ..leaderboard.terminal import print_stages
    from ..store import Store

    if format_ not in ("table", "json"):
        raise unknown("format", format_, ("table", "json"))
    batches, counts = parse_batches(batch), numbers(steps)
    check_device(device)
    on, store = pipeline_track(track, teacher, data), Store(store_dir)
    ensure_writable(store)
    notes = Console(stderr=True)

    def note(line: str) -> None:
        notes.print(line, markup=False, soft_wrap=True)

    subjects = subjects_of(on, store, note, pipeline=pipeline, revision=revision, lora=lora, guidance=guidance, steps=counts, data=data)
    from ..latency_stages import measure_stages

    with Display([f"latency by stages, {len(subjects)} in turns"]) as display:
        records = measure_stages(
            on, subjects, batches=batches, compilations=(False, True) if compile_too else (False,), device=device, threads=threads,
            rounds=rounds, say=lambda done: display.update(0, done, "rounds" if done < 1 else "ok"),
        )  # fmt: skip
    for record in records:
        store.add(record)
    if format_ == "json":
        click.echo(json.dumps([record.to_json() for record in records], indent=1))
    else:
        print_stages(Console(), records)
        flagged = sum(record.flagged for record in records)
        if flagged:
            note(f"{flagged} of {len(records)} rows are too noisy to quote (~): measure again on a quiet machine, or with more --rounds")
