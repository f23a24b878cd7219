"""Progress and remaining time of a plan: live bars in a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from .remaining import Kind, Remaining

LOG_EVERY = 10.0  # seconds between lines where the output is no terminal
LOG_WIDTH = 100  # characters of such a line
UNKNOWN = "estimating"


def clock(seconds: float) -> str:
    """1:05 or 1:02:05."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def left(seconds: float | None) -> str:
    """`1:05 left`, or that nothing is known yet."""
    return UNKNOWN if seconds is None else f"{clock(seconds)} left"


def percent(fraction: float) -> str:
    """Rounded down: 100 % is said of what is done."""
    return f"{int(100 * fraction + 1e-9):3d} %"


def stamp() -> str:
    """The local time, for a line of a log."""
    return time.strftime("%m-%d %H:%M:%S")


class _Elapsed(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(clock(task.elapsed or 0.0), style="progress.elapsed")


class _Bars(Progress):
    def make_tasks_table(self, tasks: Iterable[RichTask]) -> Table:
        """Narrower than the terminal: a ^C echoed behind a full line would begin another one, which nobody wipes."""
        table = super().make_tasks_table(tasks)
        if hasattr(self, "live"):  # rich asks for a first table before it has a console
            table.width = max(40, self.console.width - 3)
        return table


class Display:
    """Shows how far numbered jobs have come, and how long they still take (see `remaining`).

    `update(number, fraction, what)` as they report, first with fraction 0 when they are given out.

    kinds: what each job is like, for the estimates.  now, stamp: the clocks (a test gives its own).
    """

    def __init__(self, names: Sequence[str], workers: int = 1, console: Console | None = None, kinds: Sequence[Kind] | None = None,
                 now: Callable[[], float] = time.monotonic, stamp: Callable[[], str] = stamp):  # fmt: skip
        self.names = list(names)
        self.console = console or Console(stderr=True)
        self.jobs = Remaining(kinds or [Kind()] * len(self.names), workers, now)
        self._now, self._stamp = now, stamp
        self._tasks: dict[int, TaskID] = {}
        self._doing: dict[int, str] = {}
        self._logged = now()
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal

        def column(least: int, most: int | None = None, ratio: int | None = None) -> Column:
            return Column(no_wrap=True, overflow="ellipsis", min_width=least, max_width=most, ratio=ratio)

        self._bars = _Bars(
            TextColumn("{task.description}", markup=False, table_column=column(12, 32)),
            BarColumn(16, table_column=column(4)),
            TextColumn("{task.fields[percent]}", markup=False, table_column=column(5)),
            _Elapsed(table_column=column(5)),
            TextColumn("{task.fields[left]}", markup=False, table_column=column(10)),
            TextColumn("{task.fields[what]}", markup=False, table_column=column(0, ratio=1)),
            console=self.console, disable=not self._live, expand=True, get_time=now,
        )  # fmt: skip

    def __enter__(self) -> Display:
        self._bars.start()
        self._total = self._bars.add_task("all", total=1.0, percent=percent(0.0), left=UNKNOWN, what=self._count())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    @property
    def fraction(self) -> float:
        """Of the whole plan."""
        return self.jobs.fraction

    def update(self, number: int, fraction: float, what: str) -> None:
        """Job `number` stands at `fraction` and is doing `what`; at 1, `what` is its status."""
        self.jobs.report(number, fraction, what == "ok")
        self._doing[number] = what
        if self._live:
            self._show(number)
        elif fraction >= 1:
            self._log(f"{self.names[number]}: {what} after {clock(self.jobs.spent(number))}")
        elif self._now() - self._logged >= LOG_EVERY:
            at = [(self.names[i], percent(self.jobs.of(i)).strip(), left(self.jobs.left(i))) for i in self.jobs.running]
            self._log(*(f"{name} {done}, {rest.removesuffix(' left')}" for name, done, rest in at))

    def _show(self, number: int) -> None:
        """Bars of what runs; a job that ends leaves its bar for a line above them that stays."""
        if self.jobs.of(number) >= 1:
            if number in self._tasks:
                self._bars.remove_task(self._tasks.pop(number))
            word = f"{self.names[number]}: {self._doing[number]} after {clock(self.jobs.spent(number))}"
            self._bars.console.print(Text(word), highlight=False, no_wrap=True, overflow="ellipsis")
        elif number not in self._tasks:
            self._tasks[number] = self._bars.add_task(self.names[number], total=1.0, percent="", left="", what="")
        for i, task in self._tasks.items():
            at = self.jobs.of(i)
            self._bars.update(task, completed=at, percent=percent(at), left=left(self.jobs.left(i)), what=self._doing[i])
        at = self.fraction
        self._bars.update(self._total, completed=at, percent=percent(at), left=left(self.jobs.all_left()), what=self._count())

    def _count(self) -> str:
        return f"{self.jobs.ended} of {len(self.names)} jobs done"

    def _log(self, *parts: str) -> None:
        """One line: the time, the whole plan, and as many of the parts as fit, but at least one."""
        self._logged = self._now()
        line = f"{self._stamp()} [{percent(self.fraction).strip()}, {left(self.jobs.all_left())}]"
        for shown, part in enumerate(parts):
            more = "" if shown + 1 == len(parts) else f"; {len(parts) - shown - 1} more"
            if shown and len(line) + 2 + len(part) + len(more) > LOG_WIDTH:
                line += f"; {len(parts) - shown} more"
                break
            line += f"{'; ' if shown else ' '}{part}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
