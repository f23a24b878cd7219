"""`distillbench new PATH`."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path

import click


@click.command()
@click.argument("path")
@click.option("--id", "method_id", default=None, metavar="ID", help="What the method is called (default: as the file).")
def new(path: str, method_id: str | None) -> None:
    """Write a small working method to PATH, a .py file, to start from."""
    from ..scaffold import write_method

    write_method(Path(path), method_id, year=datetime.date.today().year)
    file = shlex.quote(path)
    click.echo(f"wrote {path}, a method that works as it stands. Next:")
    click.echo(f"  distillbench check {file}                 is it a method?")
    click.echo(f"  distillbench run {file} mixture2d         train and score it under budget S")
    click.echo(f"  distillbench gate {file} --against cd     better or worse than cd, over five seeds")
