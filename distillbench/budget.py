"""Budgets: teacher passes, seconds or steps, written as S, M, L, 5e6passes, 60s or 2000steps. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UsageError

_PATTERN = re.compile(r"^([0-9.]+(?:[eE][+]?[0-9]+)?)\s*(passes|pass|p|s|sec|seconds|m|min|h|steps|step)$")
_UNITS = {"passes": "passes", "pass": "passes", "p": "passes", "steps": "steps", "step": "steps"}
_SECONDS = {"s": 1, "sec": 1, "seconds": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """`amount` in `unit` (passes, seconds or steps; a step is one cycle of the stage's turns)."""

    name: str
    amount: float
    unit: str


def parse_budget(text: str, named: Mapping[str, float]) -> Budget:
    """A budget from its name on this track, or from a number with a unit."""
    if text in named:
        return Budget(text, float(named[text]), "passes")
    match = _PATTERN.match(text.strip())
    if not match:
        raise UsageError(f"unknown budget {text!r}: write {', '.join(named)} or a number with a unit (5e6passes, 60s, 2000steps)")
    try:
        amount, unit = float(match[1]), match[2]
    except ValueError:
        raise UsageError(f"budget {text!r} does not start with a number") from None
    if unit in _SECONDS:
        amount, unit = amount * _SECONDS[unit], "seconds"
    unit = _UNITS.get(unit, unit)
    if not amount > 0 or not math.isfinite(amount):
        raise UsageError(f"budget {text!r} must be above 0")
    return Budget(f"{amount:g}{unit}", amount, unit)
