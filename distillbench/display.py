"""Progress and remaining time of a plan: live bars in a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LOG_EVERY = 10.0  # seconds between lines where the output is no terminal


def clock(seconds: float) -> str:
    """1:05 or 1:02:05."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Display:
    """Shows how far numbered jobs have come. `update(number, fraction, what)` as they report."""

    def __init__(self, names: list[str], workers: int = 1, console: Console | None = None):
        self.names = names
        self.fractions = [0.0] * len(names)
        self.console = console or Console(stderr=True)
        self.started = time.monotonic()
        self._tasks: dict[int, TaskID] = {}
        self._logged = self.started
        self._live = self.console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<30}", markup=False), BarColumn(24), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", markup=False), console=self.console, disable=not self._live,
        )  # fmt: skip

    def __enter__(self) -> Display:
        self._bars.start()
        self._total = self._bars.add_task("all", total=1.0, what="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    @property
    def fraction(self) -> float:
        return sum(self.fractions) / max(1, len(self.fractions))

    def remaining(self) -> str:
        """Estimated time left, from the time taken so far."""
        elapsed = time.monotonic() - self.started
        return clock(elapsed * (1.0 - self.fraction) / self.fraction) + " left" if self.fraction > 0.02 else "estimating"

    def update(self, number: int, fraction: float, what: str) -> None:
        """Job `number` stands at `fraction` and is doing `what`."""
        self.fractions[number] = max(self.fractions[number], fraction)
        if number not in self._tasks and self._live:
            self._tasks[number] = self._bars.add_task(self.names[number], total=1.0, what="")
        if self._live:
            self._bars.update(self._tasks[number], completed=self.fractions[number], what="" if fraction >= 1 else what)
            self._bars.update(self._total, completed=self.fraction, what=self.remaining())
            if fraction >= 1:
                self._bars.update(self._tasks[number], visible=what != "ok", what=what)
        elif fraction >= 1 or time.monotonic() - self._logged > LOG_EVERY:
            self._logged = time.monotonic()
            print(f"[{100 * self.fraction:3.0f} %, {self.remaining()}] {self.names[number]}: {what}", file=sys.stderr, flush=True)
