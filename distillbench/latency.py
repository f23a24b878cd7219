"""The latency protocol: fixed inputs, warm-up, interleaved rounds so that drift hits all alike, raw seconds kept.

Students and teacher take turns (A B C A B C ...) at batch 1 and at the track's batch. What is quoted is the median and the
ratio to the teacher at its full step count, with a bootstrap interval over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .api import Student
from .jobs import TEACHER
from .records import LatencyRecord, environment
from .runner import sample_teacher
from .tracks.base import Track

WARM_UP, ROUNDS, RESAMPLES = 3, 20, 1000

Key = tuple[str, int, int]  # subject (a run's id or "teacher"), steps, batch


def interleaved(calls: Mapping[Key, Callable[[], Any]], *, device: str = "cpu", rounds: int = ROUNDS,
                say: Callable[[float], None] | None = None) -> dict[Key, list[float]]:  # fmt: skip
    """Seconds of each call in each round, after warm-up rounds that do not count."""
    cuda = device.startswith("cuda")
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for number in range(WARM_UP + rounds):
        for key, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds[key].append(time.perf_counter() - start)
        if say is not None:
            say((number + 1) / (WARM_UP + rounds))
    return seconds


def ratio_interval(mine: Sequence[float], teacher: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of the rounds' ratios, with the 95 % percentile bootstrap over rounds."""
    ratios = np.asarray(mine) / np.asarray(teacher)
    rows = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[rows], axis=1), [0.025, 0.975])
    return {"value": float(np.median(ratios)), "low": float(low), "high": float(high)}


def measure(track: Track, students: Mapping[tuple[str, int], Student], *, device: str = "cpu", threads: int = 1, rounds: int = ROUNDS,
            say: Callable[[float], None] | None = None) -> list[LatencyRecord]:  # fmt: skip
    """Latency records of students (by run id and steps) and of the teacher at its reference steps."""
    torch.set_num_threads(threads)
    for student in students.values():
        for value in vars(student).values():
            if isinstance(value, torch.nn.Module):
                value.to(device)
    conditions, seeds = track.evaluation()
    calls: dict[Key, Callable[[], Any]] = {}
    for batch in sorted({1, track.facts.latency_batch}):
        few, numbers = conditions[:batch].to(device), list(seeds[:batch])
        for (subject, steps), student in students.items():
            calls[subject, steps, batch] = _bound(student, few, numbers, steps)
        for steps in track.reference_steps:
            calls[TEACHER, steps, batch] = _bound_teacher(track, few, numbers, steps, device)
    seconds = interleaved(calls, device=device, rounds=rounds, say=say)
    full = max(track.reference_steps)
    records = []
    for (subject, steps, batch), times in seconds.items():
        anchor = subject == TEACHER and steps == full
        records.append(
            LatencyRecord.measured(
                track=track.id,
                subject=subject,
                steps=steps,
                batch=batch,
                seconds=times,
                threads=threads,
                dtype="float32",
                device_class=device.partition(":")[0],
                environment=environment(),
                ratio=None if anchor else ratio_interval(times, seconds[TEACHER, full, batch]),
                reference_steps=None if anchor else full,
            )
        )
    return records


def _bound(student: Student, conditions: Any, seeds: list[int], steps: int) -> Callable[[], Any]:
    return lambda: student.generate(conditions, steps=steps, seeds=seeds)


def _bound_teacher(track: Track, conditions: Any, seeds: list[int], steps: int, device: str) -> Callable[[], Any]:
    return lambda: sample_teacher(track, steps, device=device, conditions=conditions, seeds=seeds)
