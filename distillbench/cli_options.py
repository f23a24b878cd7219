"""Options that several commands share."""

from __future__ import annotations

import click

from .errors import UsageError

STORE = click.option("--store", "store_dir", metavar="DIR", help="Folder of the records (default: $DISTILLBENCH_STORE or .distillbench).")
LOG = click.option("--log", default=None, metavar="tensorboard", help="Write event files to STORE/logs (default: none).")
TEACHER = click.option("--teacher", default=None, metavar="PATH", help="The teacher's pipeline folder, where TRACK ships none.")
DATA = click.option("--data", default=None, metavar="PATH", help="The data, where TRACK ships none (distillbench doctor TRACK).")
DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1.")
JOBS = click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="Worker processes, a thread each.")


def numbers(text: str) -> tuple[int, ...]:
    """What `--steps` says, each once. Raises UsageError."""
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--steps {text!r} is not a list of whole numbers such as 1,2,4") from None
    if min(found) < 1:
        raise UsageError(f"--steps {text!r}: step counts start at 1")
    return found


def check_device(device: str) -> None:
    """Raises UsageError for a device that this machine or this torch does not have."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {device}: this machine or this torch has no such device; cpu always works") from None
