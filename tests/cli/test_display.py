"""Progress and remaining time, by a clock of the test's own: what is estimated when, what is shown in a terminal and in a log."""

from __future__ import annotations

import io
import itertools
import math
import re

import pytest
from rich.console import Console

from distillbench.bench import kind_of
from distillbench.display import LOG_EVERY, LOG_WIDTH, Display, clock, percent
from distillbench.jobs import Job
from distillbench.remaining import Kind, Remaining


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


REFERENCE = Kind("teacher", "toy", 0.0)
CD, DMD2 = Kind("cd", "toy", 4.0), Kind("dmd2", "toy", 4.0)


def drive(jobs: Remaining, now: Clock, number: int, duration: float, start: float = 0.0, end: float = 1.0, parts: int = 50) -> None:
    """A job of `duration` seconds when whole, from `start` to `end` at one pace."""
    if number not in jobs.running:
        jobs.report(number, 0.0)
    jobs.report(number, start)
    for part in range(1, parts + 1):
        now.time += duration * (end - start) / parts
        jobs.report(number, start + (end - start) * part / parts, ok=True)


def test_clock_and_percent():
    assert [clock(s) for s in (0.4, 65, 3725, -1)] == ["0:00", "1:05", "1:02:05", "0:00"]
    assert [percent(f) for f in (0.0, 0.29, 0.999, 1.0)] == ["  0 %", " 29 %", " 99 %", "100 %"]


@pytest.mark.parametrize("start", [0.0, 0.4, 0.9])
def test_a_job_is_judged_by_its_own_progress_since_it_went_on(start):
    now = Clock()
    jobs = Remaining([CD], 1, now)
    jobs.report(0, 0.0)
    now.time += 5.0  # the worker starts, the checkpoint is read
    assert jobs.left(0) is None
    jobs.report(0, start)
    assert jobs.left(0) is None
    drive(jobs, now, 0, 200.0, start, start + 0.05, parts=20)
    assert jobs.left(0) == pytest.approx(200.0 * (0.95 - start))
    assert jobs.all_left() == pytest.approx(200.0 * (0.95 - start))


def test_nothing_is_said_before_something_is_known():
    now = Clock()
    jobs = Remaining([CD], 1, now)
    jobs.report(0, 0.0)
    jobs.report(0, 0.0001)
    now.time += 0.01
    jobs.report(0, 0.02)  # much in no time
    assert jobs.left(0) is None
    now.time += 29.0
    jobs.report(0, 0.0002)  # little in little time
    fresh = Remaining([CD], 1, now)
    fresh.report(0, 0.0)
    fresh.report(0, 0.0)
    now.time += 29.0
    fresh.report(0, 0.001)
    assert fresh.left(0) is None
    now.time += 31.0
    fresh.report(0, 0.002)
    assert fresh.left(0) == pytest.approx(30000, rel=0.1)


def test_a_slower_stage_shows_and_one_slow_turn_does_not():
    now = Clock()
    jobs = Remaining([CD], 1, now)
    drive(jobs, now, 0, 100.0, 0.0, 0.5)
    drive(jobs, now, 0, 400.0, 0.5, 0.7)
    assert jobs.left(0) == pytest.approx(400.0 * 0.3, rel=0.01)  # the later half of its 130 s is all of the slow stage
    before = jobs.left(0)
    now.time += 5.0
    jobs.report(0, 0.7001)
    assert before < jobs.left(0) < 1.1 * before


def test_an_estimate_is_never_wild():
    """Whatever the pace of ten stages, from the first word to the last it lies between the fastest and the slowest pace so far."""
    now = Clock()
    jobs = Remaining([CD], 1, now)
    jobs.report(0, 0.0)
    at, paces = 0.3, []
    jobs.report(0, at)
    for stage in range(70):
        paces.append(40.0 * (1 + stage * 7 % 10))
        for _ in range(5):
            now.time += paces[-1] * 0.002
            at += 0.002
            jobs.report(0, at)
            left = jobs.left(0)
            assert left is None or (1 - at) * min(paces) * 0.99 - 1e-9 <= left <= (1 - at) * max(paces) * 1.01 + 1e-9
    assert math.isclose(at, 1.0)


def test_jobs_that_have_not_begun_cost_what_their_like_cost():
    now = Clock()
    jobs = Remaining([REFERENCE, CD, DMD2, CD, DMD2], 1, now)
    assert jobs.all_left() is None
    drive(jobs, now, 0, 3.0)
    assert jobs.all_left() is None  # a reference says nothing about trainings
    drive(jobs, now, 1, 10.0)
    assert jobs.all_left() == pytest.approx(30.0)  # dmd2 as cd, of which one is left
    drive(jobs, now, 2, 40.0, end=0.5)
    assert jobs.all_left() == pytest.approx(20.0 + 10.0 + 40.0)
    assert jobs.left(3) == pytest.approx(10.0)
    drive(jobs, now, 2, 40.0, 0.5, 1.0)
    drive(jobs, now, 3, 10.0)
    assert jobs.all_left() == pytest.approx(40.0)
    drive(jobs, now, 4, 40.0)
    assert (jobs.all_left(), jobs.fraction, jobs.ended) == (0.0, 1.0, 5)


def test_references_count_while_no_training_is_left():
    now = Clock()
    jobs = Remaining([REFERENCE, CD, CD], 2, now)
    jobs.report(0, 0.0)
    drive(jobs, now, 1, 10.0)
    jobs.report(0, 0.001)
    now.time += 1.0
    assert jobs.all_left() == pytest.approx(10.0)
    drive(jobs, now, 2, 10.0)
    assert jobs.all_left() is None
    now.time += 21.0
    jobs.report(0, 0.501)
    assert jobs.all_left() == jobs.left(0) == pytest.approx(32.0, rel=0.01)


def test_a_larger_budget_costs_more_and_another_track_says_nothing():
    now = Clock()
    jobs = Remaining([CD, CD._replace(size=16.0), DMD2._replace(size=16.0)], 1, now)
    drive(jobs, now, 0, 10.0)
    assert jobs.all_left() == pytest.approx(80.0)
    assert jobs.fraction == pytest.approx(1 / 9)
    elsewhere = Remaining([CD, CD._replace(track="other")], 1, now)
    drive(elsewhere, now, 0, 10.0)
    assert elsewhere.all_left() is None


def test_a_resumed_failed_or_known_job_does_not_mislead_the_others():
    now = Clock()
    resumed = Remaining([CD, CD], 1, now)
    drive(resumed, now, 0, 100.0, start=0.9)
    assert resumed.all_left() == pytest.approx(100.0)
    failed = Remaining([CD, CD], 1, now)
    failed.report(0, 0.0)
    failed.report(0, 0.0)
    now.time += 3.0
    failed.report(0, 1.0, ok=False)
    assert failed.all_left() is None
    known = Remaining([CD, CD], 1, now)
    known.report(0, 0.0)
    known.report(0, 1.0, ok=True)
    assert known.all_left() is None


def test_workers_share_what_is_left():
    now = Clock()
    jobs = Remaining([CD] * 5, 2, now)
    for number in (0, 1):
        jobs.report(number, 0.0)
        jobs.report(number, 0.0)
    for part in range(1, 11):
        now.time += 5.0
        jobs.report(0, part / 10, ok=True)  # 50 s
        jobs.report(1, part / 20)  # 100 s
    # job 1 ends in 50 s; its like take 75 s: one worker 75 + 75, the other 50 + 75
    assert jobs.all_left() == pytest.approx(150.0)


def test_kinds_of_jobs():
    teacher, small, large = (
        kind_of(Job(target, "mixture2d", budget=budget)) for target, budget in (("teacher", "S"), ("cd", "S"), ("cd", "M"))
    )
    assert (teacher.size, large.size) == (0.0, 4 * small.size)
    assert (small.target, small.track) == ("cd", "mixture2d@1")


# ---------------------------------------------------------------------- what is shown

NAMES = [
    "teacher",
    "cd S seed 0",
    "a_method_with_a_very_long_name_indeed 1-step 5e6passes seed 12",
    "dmd2 2-step S seed 0",
    "dmd2 4-step S seed 0",
]
KINDS = [REFERENCE, CD, DMD2, DMD2, DMD2]


def run_through(display: Display, now: Clock) -> None:
    """The teacher in 4 s, then all others at once, the long name failing half-way."""
    with display:
        display.update(0, 0.0, "starting")
        for part in range(11):
            display.update(0, part / 10, "ok" if part == 10 else "teacher at 50 evaluations")
            now.time += 0.4
        for number in (1, 2, 3, 4):
            display.update(number, 0.0, "starting")
        for part in range(201):
            for number in (1, 2, 3, 4):
                if number == 2 and part > 100:
                    continue
                failed = number == 2 and part == 100
                what = (
                    "failed: KeyError: [/x] " + "why " * 40
                    if failed
                    else "ok"
                    if part == 200
                    else "distribution matching, 3.2e+06 passes [red]"
                )
                display.update(number, 1.0 if failed else part / 200, what)
            now.time += 0.5


def log_lines(width: int = 80) -> list[str]:
    now, file = Clock(), io.StringIO()
    run_through(Display(NAMES, 4, Console(file=file, width=width), KINDS, now, lambda: f"01-02 00:0{now.time - 1000:05.1f}"), now)
    return file.getvalue().splitlines()


def test_a_log_gets_a_line_every_few_seconds_and_one_for_each_job_that_ends():
    lines = log_lines()
    ends = [line for line in lines if " after " in line]
    between = [line for line in lines if " after " not in line]
    assert [line.partition("] ")[2].partition(":")[0] for line in ends] == [NAMES[i] for i in (0, 2, 1, 3, 4)]
    assert re.fullmatch(r"01-02 00:0004.0 \[0 %, estimating\] teacher: ok after 0:04", ends[0])
    assert ends[1].endswith("after 0:50")
    assert "failed: KeyError: [/x] why why" in ends[1]
    assert ends[-1] == "01-02 00:0104.4 [100 %, 0:00 left] dmd2 4-step S seed 0: ok after 1:40"
    times = [float(line[9:14]) for line in lines]
    assert all(
        later - earlier >= LOG_EVERY or line in ends for line, (earlier, later) in zip(lines[1:], itertools.pairwise(times), strict=True)
    )
    assert 6 <= len(between) <= 104 / LOG_EVERY
    assert all(len(line) <= LOG_WIDTH for line in between)
    job, rest = r"cd S seed 0 \d+ %, \d:\d\d", r"\[\d+ %, \d:\d\d left\]"
    assert re.fullmatch(rf"01-02 00:0\d+.\d {rest} {job}; 3 more", between[0])
    assert re.fullmatch(rf"01-02 00:0\d+.\d {rest} {job}; dmd2 2-step S seed 0 \d+ %, 0:\d\d; 1 more", between[-1])


def test_a_log_is_the_same_whatever_the_width():
    assert log_lines(40) == log_lines(300)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_terminal_gets_bars_that_do_not_wrap_and_lines_that_stay(width):
    now, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=30, color_system=None, legacy_windows=False, _environ={})
    display = Display(NAMES, 4, console, KINDS, now)
    frames = []

    def keep() -> None:
        shown = Console(file=io.StringIO(), width=width)
        shown.print(display._bars.get_renderable())
        frames.append(shown.file.getvalue().splitlines())

    update, calls = display.update, itertools.count()
    display.update = lambda *words: (update(*words), next(calls) % 7 or keep())  # type: ignore[method-assign]
    run_through(display, now)
    assert all(len(line.rstrip()) <= width - 3 for frame in frames for line in frame)
    assert max(map(len, frames)) == 1 + 4  # all, and a line for each that runs
    middle = frames[len(frames) // 2]
    numbers = r"\S+ +\d+ % +\d:\d\d +\d:\d\d left"
    assert re.search(rf"^all +{numbers} +1 (of 5 jobs done|o)", middle[0])
    assert re.search(rf"^cd S seed 0 +{numbers} +di", middle[1])
    assert any("…" in line for line in middle) or width == 160
    assert all(line.startswith(("all", *(name[:8] for name in NAMES))) for frame in frames for line in frame)
    lasting = [line for line in file.getvalue().splitlines() if " after " in line or "failed" in line]
    assert len(lasting) == len(NAMES)
    assert any("ok after 1:40" in line for line in lasting)


def test_a_dumb_terminal_gets_the_log(monkeypatch):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})
    with Display(["one"], console=console, stamp=lambda: "now") as display:
        display.update(0, 1.0, "ok")
    assert file.getvalue() == "now [100 %, 0:00 left] one: ok after 0:00\n"
