"""Work that no budget pays for: drawing data, conditions and noise. Its amount may be random, the price of a turn may not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


def charging() -> bool:
    """False inside `uncharged()`."""
    return _depth == 0


@contextmanager
def uncharged() -> Iterator[None]:
    """What runs inside is not counted by the meter."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
