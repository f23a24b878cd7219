"""The latency of whole pipelines by stages, as columns of text."""

from __future__ import annotations

from collections.abc import Sequence

from ..records import NOISY, LatencyRecord, summary
from .texts import DASH, count_text, ratio_text

TITLE = "Latency from prompts to images, by stages"


def notes(records: Sequence[LatencyRecord]) -> str:
    """What the columns mean, and whether something was too noisy."""
    words = [
        "denoiser: per step",
        "end to end: median, with p10 to p90",
        "eval: network evaluations per image",
        "FLOPs: two for each multiply-add of the matrix products of one image, exact",
        "peak MB: of the accelerator, or of the whole process",
        "compile s: the first call, not part of the other times",
    ]
    flagged = sum(record.flagged for record in records)
    words.append(
        f"~: spread too wide to quote (p90 above {NOISY:g} medians), {flagged} of {len(records)} rows end to end" if _noisy(records)
        else f"no row's spread is too wide to quote (p90 above {NOISY:g} medians)"
    )  # fmt: skip
    return "; ".join(words) + "."


def times(records: Sequence[LatencyRecord]) -> list[tuple[str, list[str]]]:
    """Headers and cells: who, end to end and each stage."""
    return [
        *_who(records),
        ("end to end", [f"{_ms(record.seconds)} ({record.p10 * 1e3:.3g} to {record.p90 * 1e3:.3g})" for record in records]),
        ("text encoder", [_stage(record, "text encoder") for record in records]),
        ("denoiser", [_stage(record, "denoiser") for record in records]),
        ("decode", [_stage(record, "decode") for record in records]),
    ]


def costs(records: Sequence[LatencyRecord]) -> list[tuple[str, list[str]]]:
    """Headers and cells: who, throughput, memory, arithmetic, compilation."""
    steps = sorted({record.reference_steps for record in records if record.reference_steps})
    base = "teacher" + (f" at {'/'.join(map(str, steps))}" if steps else "")
    return [
        *_who(records),
        (f"ratio to {base}", [DASH if record.ratio is None else ratio_text(record) for record in records]),
        ("images/s", [("~" if record.flagged else "") + f"{record.batch / record.median:.3g}" for record in records]),
        ("peak MB", [count_text(_of(record)["peak_memory_mb"]) for record in records]),
        ("FLOPs", [count_text(flops(record)) for record in records]),
        ("compile s", [DASH if _of(record)["compile_seconds"] is None else f"{_of(record)['compile_seconds']:.3g}" for record in records]),
    ]


def flops(record: LatencyRecord) -> float:
    """Of the matrix products of one image from prompt to pixels, two a multiply-add."""
    return 2.0 * sum(macs["matmul"] for macs in _of(record)["macs"].values())


def _who(records: Sequence[LatencyRecord]) -> list[tuple[str, list[str]]]:
    devices = {(record.device_class, record.threads, record.dtype) for record in records}
    several = [("on", [f"{record.device_class}, {record.threads} threads, {record.dtype}" for record in records])]
    return [
        ("method", [_of(record)["label"] for record in records]),
        ("eval", [str(_of(record)["evaluations"]) for record in records]),
        ("batch", [str(record.batch) for record in records]),
        ("compiled", ["yes" if _of(record)["compiled"] else "no" for record in records]),
        *(several if len(devices) > 1 else []),
    ]


def _of(record: LatencyRecord) -> dict:
    assert record.stages is not None
    return record.stages


def _stage(record: LatencyRecord, name: str) -> str:
    seconds = _of(record)["seconds"].get(name)
    if seconds is None:
        return DASH
    return _ms([second / record.steps for second in seconds] if name == "denoiser" else seconds)


def _ms(seconds: Sequence[float]) -> str:
    found = summary(seconds)
    return ("~" if found["flagged"] else "") + f"{found['median'] * 1e3:.3g} ms"


def _noisy(records: Sequence[LatencyRecord]) -> bool:
    lists = [seconds for record in records for seconds in (record.seconds, *_of(record)["seconds"].values())]
    return any(summary(seconds)["flagged"] for seconds in lists)
