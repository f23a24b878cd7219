"""Signals around a training: Ctrl-C ends it between two cycles, and a turn that never ends is stopped."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ..errors import ContractError


class Guard:
    """While active, the first SIGINT or SIGTERM sets `stopped`, the second acts at once; a turn may take `limit` seconds.

    Outside the main thread, and where the platform has no timers, it does nothing.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.stopped = False
        self._turn = ""
        self._old: dict[int, Any] = {}
        self._works = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")

    def restart(self, turn: str) -> None:
        """A turn starts: its clock too."""
        self._turn = turn
        if self._works:
            signal.setitimer(signal.ITIMER_REAL, self.limit)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def _late(self, _number: int, _frame: FrameType | None) -> None:
        raise ContractError(f"turn {self._turn!r} did not finish within {self.limit:g} s")

    def __enter__(self) -> Guard:
        if self._works:
            for number, handler in ((signal.SIGINT, self._stop), (signal.SIGTERM, self._stop), (signal.SIGALRM, self._late)):
                self._old[number] = signal.signal(number, handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._works:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self._old.items():
                signal.signal(number, handler)
