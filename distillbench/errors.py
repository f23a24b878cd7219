"""Failures a user can cause or must see. Each carries one line: what was wrong, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistillbenchError(Exception):
    """Base of all errors that are shown as one line."""


class UsageError(DistillbenchError):
    """A wrong name, knob, option or file: exit status 2."""


class ContractError(DistillbenchError):
    """A method breaks the contract of `distillbench.api`."""


class NotApplicable(DistillbenchError):
    """Raised by a method's `build` where it cannot run on this track with these knobs: the run is `skipped: why`."""


class NonFiniteError(DistillbenchError):
    """A loss or a gradient is NaN or infinite."""


class MeterError(DistillbenchError):
    """The audit found that a turn costs something else than was charged."""


class BadFileError(DistillbenchError):
    """A checkpoint, record or weight file is truncated, foreign or hostile."""


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """A `UsageError` that names the nearest valid names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return UsageError(f"unknown {what} {name!r}: did you mean {' or '.join(near)}? (known: {', '.join(known)})")
    return UsageError(f"unknown {what} {name!r}; known: {', '.join(known) or 'none'}")
