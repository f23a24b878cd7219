"""What the benchmarks share: two ways of doing one thing, taken in turns, and the machine they ran on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> list[tuple[float, float]]:
    """Seconds of both in each round, after one round that does not count; who goes first alternates, so that a drift hits both."""
    found = []
    for number in range(rounds + 1):
        seconds = {}
        for call in (ours, theirs) if number % 2 else (theirs, ours):
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        found.append((seconds[ours], seconds[theirs]))
    return found[1:]


def line(name: str, pairs: list[tuple[float, float]], bar: str) -> str:
    """One row: both medians in milliseconds, the median of the rounds' ratios theirs / ours, its lowest and highest, and the bar."""
    ours, theirs = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    spread = f"   {ratios[0]:.3f} to {ratios[-1]:.3f}"
    return f"{name:<34}{ours:>11.2f}{theirs:>11.2f}{statistics.median(ratios):>9.3f}{spread}".ljust(88) + bar


def heading(what: str, ours: str = "ours ms", theirs: str = "theirs ms", ratio: str = "times") -> str:
    return f"{what:<34}{ours:>11}{theirs:>11}{ratio:>9}   lowest and highest".ljust(88) + "asked for"


def ratio(pairs: list[tuple[float, float]]) -> float:
    """The median over rounds of theirs / ours."""
    return statistics.median(theirs / ours for ours, theirs in pairs)


def machine(threads: int) -> str:
    """Processor, cores, threads and load, in one line."""
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    import torch

    load = f", load average at the start {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} processors, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}{load}"
