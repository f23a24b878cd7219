"""Options that several commands share."""

from __future__ import annotations

import click

STORE = click.option("--store", "store_dir", metavar="DIR", help="Folder of the records (default: $DISTILLBENCH_STORE or .distillbench).")
LOG = click.option("--log", default=None, metavar="tensorboard", help="Write event files to STORE/logs (default: none).")
JOBS = click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Worker processes, a thread each.")
