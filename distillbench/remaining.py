"""How long jobs still take: each by its own progress, all of them over a number of workers. Never a wild number: None until it is known.

A job:     the rate of its progress over the later half of its time, so that a slower stage shows and a single turn does not. Its time
           begins with its first report, not at 0: a job that goes on from 40 % has not made 40 % in no time. Known after `SOON` seconds
           and `SOME` of the job, or after `LONG` seconds.
One that has not begun, or is not known yet: seconds per size, as the mean of the jobs of its target that are known or done; where there
           are none, of all the trainings on its track, because one budget costs about alike.
All:       each job goes, in order, to the worker that is free first; the last end counts. References (size 0) are short, and their few
           steps cost unlike: they count as nothing while a training is left.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SOON, SOME, LONG = 2.0, 0.01, 30.0


class Kind(NamedTuple):
    """What a job is like. size: its budget, in the unit that the jobs of its track share; 0 for a reference."""

    target: str = ""
    track: str = ""
    size: float = 1.0


@dataclass
class _Job:
    kind: Kind
    fraction: float = 0.0
    began: float | None = None
    ended: float | None = None
    ok: bool = False
    points: list[tuple[float, float]] = field(default_factory=list)  # time, fraction; from the first report of the job itself

    @property
    def running(self) -> bool:
        return self.began is not None and self.ended is None

    def report(self, now: float, fraction: float, ok: bool) -> None:
        if self.began is None:
            self.began = now
        elif not self.points:
            self.points.append((now, fraction))
        if fraction > 0 and not self.points:
            self.points.append((now, fraction))
        self.fraction = max(self.fraction, fraction)
        if self.points and (now - self.points[-1][0]) >= 0.01 * (now - self.points[0][0]):  # a few hundred over any time
            self.points.append((now, self.fraction))
        if fraction >= 1 and self.ended is None:
            self.ended, self.ok = now, ok

    def rate(self, now: float) -> float | None:
        """Of progress, in fractions a second; None while it is not known."""
        if not self.points:
            return None
        (first, start), gained = self.points[0], self.fraction - self.points[0][1]
        time_ = now - first
        if gained <= 0 or not (time_ >= LONG or (time_ >= SOON and gained >= SOME)):
            return None
        then, at = next((point for point in reversed(self.points) if point[0] <= first + time_ / 2), (first, start))
        return (self.fraction - at) / (now - then) if self.fraction > at else gained / time_

    def left(self, now: float) -> float | None:
        """Seconds to its end."""
        rate = self.rate(now)
        return None if rate is None else (1.0 - self.fraction) / rate

    def cost(self, now: float) -> float | None:
        """Seconds that the whole job takes, if its own progress says so."""
        if self.ended is None:
            left = self.left(now)
            return None if left is None else left / (1.0 - self.fraction)
        if not self.ok or not self.points or self.points[0][1] >= 1:
            return None
        first, start = self.points[0]
        return (self.ended - first) / (1.0 - start)


class Remaining:
    """The numbered jobs of a plan. All times in seconds of `now`."""

    def __init__(self, kinds: Sequence[Kind], workers: int = 1, now: Callable[[], float] = time.monotonic):
        self._jobs = [_Job(kind) for kind in kinds]
        self._workers, self._now = workers, now

    def report(self, number: int, fraction: float, ok: bool = False) -> None:
        """Job `number` stands at `fraction`; the first word of a job may say 0 when it is given out. ok: whether it ended well."""
        self._jobs[number].report(self._now(), fraction, ok)

    def of(self, number: int) -> float:
        """How far a job is."""
        return self._jobs[number].fraction

    def spent(self, number: int) -> float:
        """Seconds since a job began, here."""
        job = self._jobs[number]
        return 0.0 if job.began is None else (self._now() if job.ended is None else job.ended) - job.began

    @property
    def running(self) -> list[int]:
        return [number for number, job in enumerate(self._jobs) if job.running]

    @property
    def ended(self) -> int:
        return sum(job.ended is not None for job in self._jobs)

    @property
    def fraction(self) -> float:
        """Of all, by size; below 1 until all have ended."""
        sizes = [job.kind.size for job in self._jobs]
        weights = sizes if sum(sizes) > 0 else [1.0] * len(sizes)
        if self.ended == len(self._jobs):
            return 1.0
        return min(0.99, sum(w * job.fraction for w, job in zip(weights, self._jobs, strict=True)) / sum(weights))

    def left(self, number: int) -> float | None:
        """Seconds until this job ends; None where nothing is known yet."""
        job, now = self._jobs[number], self._now()
        own = job.left(now)
        if own is not None or job.ended is not None:
            return own if job.ended is None else 0.0
        typical = self._typical(job.kind)
        return None if typical is None else typical * (1.0 - job.fraction)

    def _typical(self, kind: Kind) -> float | None:
        """Seconds of a job of this kind, from those that are known."""
        now = self._now()
        known = [(job.kind, cost) for job in self._jobs if (cost := job.cost(now)) is not None]
        like = [cost / (k.size or 1.0) for k, cost in known if k[:2] == kind[:2] and bool(k.size) == bool(kind.size)]
        if kind.size and not like:
            like = [cost / k.size for k, cost in known if k.track == kind.track and k.size]
        return None if not like else sum(like) / len(like) * (kind.size or 1.0)

    def all_left(self) -> float | None:
        """Seconds until the last job ends; None while one that counts is anyone's guess."""
        left = [number for number, job in enumerate(self._jobs) if job.ended is None]
        left = [number for number in left if self._jobs[number].kind.size] or left
        waiting = [self._jobs[number].kind for number in left if not self._jobs[number].running]
        typical = {kind: self._typical(kind) for kind in set(waiting)}
        ends = [self.left(number) for number in left if self._jobs[number].running]
        costs = [typical[kind] for kind in waiting]
        if None in ends or None in costs:
            return None
        free = [seconds for seconds in ends if seconds is not None] + [0.0] * (self._workers - len(ends))
        heapq.heapify(free)
        for seconds in costs:
            heapq.heappush(free, heapq.heappop(free) + (seconds or 0.0))
        return max(free, default=0.0)
