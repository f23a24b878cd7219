"""How long a pipeline takes from prompts to images, stage by stage: text encoder, denoiser, decoder. docs/latency.md.

One call passes through all stages, with a mark after each (on an accelerator once it is idle), so that the stages sum to the whole.
Teacher, students and released pipelines take turns in rounds (A B C A B C ...) on the same prompts and noise; batches, and compiled
or not, come one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .api import Samples, Student
from .conditions import Conditions
from .errors import UsageError
from .jobs import TEACHER
from .latency import ROUNDS, WARM_UP, ratio_interval
from .networks.diffusers_base import DiffusersBackbone
from .networks.diffusers_tools import quiet
from .records import LatencyRecord, environment
from .runner import peak_memory, reset_peak_memory
from .teachers.diffusers import DiffusersTeacher
from .tracks.text_to_image import PipelineTrack
from .training.costs import count

WARM_UP_COMPILED = 5
MOST = 1024  # images in a batch that are tried on an accelerator
TEXT, DENOISER, DECODE = "text encoder", "denoiser", "decode"

Draw = Callable[[Conditions, list[int]], Samples]


@dataclass(frozen=True)
class Timed:
    """What is measured at one step count. subject: of its records, a run's id, "teacher" or another hash.  label: for people.

    opened: whose text encoder and decoder.  draw: latents of conditions and seeds.  networks: what `compiled` compiles.
    """

    subject: str
    label: str
    steps: int
    opened: DiffusersTeacher
    draw: Draw
    networks: tuple[nn.Module, ...]
    nulls: dict[str, Any] = field(default_factory=dict)

    def encode(self, prompts: list[str]) -> Conditions:
        """The conditions of exactly these prompts, computed anew; the negative prompt's embedding is a constant and is kept."""
        kind = self.opened.kind
        if kind.text is None:
            return Conditions.none(len(prompts))
        with torch.no_grad():
            fields = kind.text.encode(self.opened.pipeline, prompts, self.opened.settings)
        return Conditions({**fields, "prompt": prompts}, self.nulls, size=len(prompts))

    @property
    def stages(self) -> tuple[str, ...]:
        return (TEXT, DENOISER, DECODE) if self.opened.kind.text is not None else (DENOISER, DECODE)


def timed_teacher(track: PipelineTrack, steps: int) -> Timed:
    """The track's teacher by its own scheduler under the track's guidance."""
    return timed_pipeline(track.opened(), steps, guidance=track.guidance, subject=TEACHER, label=TEACHER)


def timed_pipeline(opened: DiffusersTeacher, steps: int, *, subject: str, label: str, guidance: float | None = None) -> Timed:
    """A pipeline as `score` samples it: by its own scheduler, under `guidance` (None: what its folder says)."""

    def draw(conditions: Conditions, seeds: list[int]) -> Samples:
        return opened.sample(conditions, seeds, steps, guidance_scale=guidance)

    return Timed(subject, label, steps, opened, draw, (opened.denoiser,), opened.conditions([""]).nulls)


def timed_student(track: PipelineTrack, student: Student, steps: int, *, subject: str, label: str) -> Timed:
    """A trained student between its teacher's text encoder and decoder."""

    def draw(conditions: Conditions, seeds: list[int]) -> Samples:
        return student.generate(conditions, steps=steps, seeds=seeds)

    opened = track.opened()
    return Timed(subject, label, steps, opened, draw, tuple(student.networks(steps)), opened.conditions([""]).nulls)


# ---------------------------------------------------------------------- one call


def inputs(track: PipelineTrack, batch: int) -> tuple[list[str], list[int]]:
    """Prompts and seeds of a batch: the track's own, from the first; prompts begin again where there are too few."""
    prompts = track.prompts()
    return [prompts[i % len(prompts)] for i in range(batch)], [track.first_seed + i for i in range(batch)]


def marks(timed: Timed, prompts: list[str], seeds: list[int], clock: Callable[[], float]) -> tuple[list[float], Samples, Tensor]:
    """The seconds of each of its stages in one call, with the samples (latents) and images (n, 3, h, w) that it made."""
    at = [clock()]
    conditions = timed.encode(prompts)
    if TEXT in timed.stages:
        at.append(clock())
    samples = timed.draw(conditions, seeds)
    at.append(clock())
    images = timed.opened.decode(samples.x)
    at.append(clock())
    return [after - before for before, after in pairwise(at)], samples, images


def clock_of(device: str) -> Callable[[], float]:
    """Seconds, read when the device has finished what it was given."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def multiply_adds(timed: Timed, prompts: list[str], seeds: list[int]) -> tuple[dict[str, dict[str, int]], int]:
    """Exact multiply-adds of each stage for these prompts, as the meter counts them, and the evaluations a sample."""
    kept: dict[str, Any] = {}

    def encode() -> None:
        kept["conditions"] = timed.encode(prompts)

    def denoise() -> None:
        kept["samples"] = timed.draw(kept["conditions"], seeds)

    calls: dict[str, Callable[[], Any]] = {
        TEXT: encode, DENOISER: denoise, DECODE: lambda: timed.opened.decode(kept["samples"].x),
    }  # fmt: skip
    found = {stage: count(call) for stage, call in calls.items()}
    macs = {stage: {"matmul": found[stage].matmul, "elementwise": found[stage].elementwise} for stage in timed.stages}
    return macs, kept["samples"].evaluations


# ---------------------------------------------------------------------- batches and compilation


def largest_batch(run: Callable[[int], Any], most: int) -> int:
    """The largest batch that `run` takes, doubling from 1 until memory ends or `most` is reached. UsageError if not even one fits."""
    fits, batch = 0, 1
    while fits < most:
        try:
            run(batch)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            break
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        fits, batch = batch, min(2 * batch, most)
    if not fits:
        raise UsageError("not even one image fits into this device's memory; use a device with more, or a smaller pipeline")
    return fits


def out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's or the processor's allocator gave up."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def compiled(subjects: Sequence[Timed]) -> Iterator[None]:
    """Each denoiser network compiled by `torch.compile`, for static shapes, and as it was afterwards. Nothing is taken from a cache."""
    import torch._inductor.config as inductor

    modules = list({id(module): module for timed in subjects for module in _compilable(timed.networks)}.values())
    torch._dynamo.reset()
    for module in modules:
        module.compile(dynamic=False)
    try:
        with inductor.patch(force_disable_caches=True):
            yield
    finally:
        for module in modules:
            module._compiled_call_impl = None
        torch._dynamo.reset()


def _compilable(networks: Sequence[nn.Module]) -> list[nn.Module]:
    """The diffusers models themselves, around which taps and schedules stay eager; else the networks as they are."""
    models = [part.model for network in networks for part in network.modules() if isinstance(part, DiffusersBackbone)]
    return models or list(networks)


# ---------------------------------------------------------------------- measuring


@dataclass
class _Group:
    """What one batch size, compiled or not, is measured with."""

    track: PipelineTrack
    subjects: Sequence[Timed]
    batch: int
    is_compiled: bool
    device: str
    rounds: int
    say: Callable[[float], None]

    def __post_init__(self) -> None:
        self.prompts, self.seeds = inputs(self.track, self.batch)
        self.clock = clock_of(self.device)
        self.spent: list[list[list[float]]] = [[] for _ in self.subjects]  # subject, round, stage
        self.first: list[float] = []
        self.peaks: list[float] = []

    def measure(self) -> None:
        warm_up = WARM_UP_COMPILED if self.is_compiled else WARM_UP
        for number in range(warm_up + self.rounds):
            for place, timed in enumerate(self.subjects):
                if number == warm_up - 1:
                    reset_peak_memory(self.device)
                parts = self._call(timed, first=number == 0)
                if number == 0:
                    self.first.append(sum(parts))
                elif number == warm_up - 1:
                    self.peaks.append(peak_memory(self.device))
                elif number >= warm_up:
                    self.spent[place].append(parts)
            self.say((number + 1) / (warm_up + self.rounds))

    def _call(self, timed: Timed, first: bool) -> list[float]:
        try:
            return marks(timed, self.prompts, self.seeds, self.clock)[0]
        except UsageError:
            raise
        except Exception as error:  # a compiler fails in many ways
            if out_of_memory(error):
                raise UsageError(f"{timed.label}: a batch of {self.batch} does not fit into memory; give a smaller --batch") from None
            if not (self.is_compiled and first):
                raise
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(f"{timed.label}: torch.compile does not work here ({words[0][:160]}); measure without --compile") from None


def measure_stages(
    track: PipelineTrack, subjects: Sequence[Timed], *, batches: Sequence[int | None] = (1, None), compilations: Sequence[bool] = (False,),
    device: str = "cpu", threads: int = 1, rounds: int = ROUNDS, say: Callable[[float], None] | None = None,
) -> list[LatencyRecord]:  # fmt: skip
    """A record of each subject at each batch (None: the largest that fits all) and compilation.

    On the processor the largest is at most the track's latency batch. The ratio is to the teacher at the most steps among the subjects,
    where it is among them. say: gets the fraction done.
    """
    tell = say or (lambda fraction: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with quiet():
            for timed in subjects:
                timed.opened.to(device)
                for network in timed.networks:
                    network.to(device)
            sizes = list(dict.fromkeys(_largest(track, subjects, device) if batch is None else batch for batch in batches))
            counted = [multiply_adds(timed, *inputs(track, 1)) for timed in subjects]
            plan = [(batch, is_compiled) for is_compiled in dict.fromkeys(compilations) for batch in sizes]
            records = []
            for number, (batch, is_compiled) in enumerate(plan):
                group = _Group(track, subjects, batch, is_compiled, device, rounds, _part_of(tell, number, len(plan)))
                with compiled(subjects) if is_compiled else nullcontext():
                    group.measure()
                records += _records(group, counted, threads)
            return records
    finally:
        torch.set_num_threads(before)


def _part_of(tell: Callable[[float], None], number: int, parts: int) -> Callable[[float], None]:
    return lambda fraction: tell((number + fraction) / parts)


def _largest(track: PipelineTrack, subjects: Sequence[Timed], device: str) -> int:
    """Each subject is tried at the fewest of its steps: memory does not grow with them."""
    few: dict[str, Timed] = {}
    for timed in sorted(subjects, key=lambda timed: timed.steps):
        few.setdefault(timed.subject, timed)

    def run(batch: int) -> None:
        for timed in few.values():
            marks(timed, *inputs(track, batch), clock_of(device))

    return largest_batch(run, MOST if device.startswith("cuda") else track.facts.latency_batch)


def _records(group: _Group, counted: Sequence[tuple[dict[str, dict[str, int]], int]], threads: int) -> list[LatencyRecord]:
    totals = [[sum(parts) for parts in rounds] for rounds in group.spent]
    anchors = [(timed.steps, place) for place, timed in enumerate(group.subjects) if timed.subject == TEACHER]
    full, anchor = max(anchors) if anchors else (None, None)
    around = environment() | ({"accelerator": torch.cuda.get_device_name(group.device)} if group.device.startswith("cuda") else {})
    records = []
    for place, timed in enumerate(group.subjects):
        macs, evaluations = counted[place]
        compared = anchor is not None and place != anchor
        by_stage = {stage: [parts[at] for parts in group.spent[place]] for at, stage in enumerate(timed.stages)}
        records.append(
            LatencyRecord.measured(
                track=group.track.id, subject=timed.subject, steps=timed.steps, batch=group.batch, seconds=totals[place], threads=threads,
                dtype=str(timed.opened.denoiser.network.dtype).removeprefix("torch."), device_class=group.device.partition(":")[0],
                ratio=ratio_interval(totals[place], totals[anchor]) if compared and anchor is not None else None,
                reference_steps=full if compared else None, environment=around,
                stages={
                    "label": timed.label, "compiled": group.is_compiled,
                    "compile_seconds": group.first[place] if group.is_compiled else None,
                    "peak_memory_mb": group.peaks[place], "evaluations": evaluations, "seconds": by_stage, "macs": macs,
                },
            )
        )  # fmt: skip
    return records
