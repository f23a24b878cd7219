"""Whether a rerun agrees with what an author sent in.

An author controls everything in the file, so no bound on the rerun may rest on the file alone: seeds made up far apart would widen an
interval over seeds, and bounds made up wide a sampling error. What a score may differ by follows from the rerun's own sampling error.
docs/submit.md has the reasons and the measurements behind the constants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from .errors import DistillbenchError
from .records import RunRecord, environment, now, plain
from .statistics import NORMAL_95, Interval
from .submission import FORMAT, Submission

LEVEL = 0.95  # that an honest rerun passes all intervals together
DEVIATIONS = 6.0  # of the rerun's sampling error by which one seed may differ between two kinds of machine
RELATIVE = 0.05  # the same for a score without a sampling error, as a share of its value
EXACT = 1e-6  # the same on one kind of machine, times the value where that is above 1
SAME = ("torch", "numpy", "platform", "processor", "distillbench")  # what of the environment must be equal in one kind of machine


class Refused(DistillbenchError):
    """The submission did not pass; one line a reason."""


@dataclass(frozen=True)
class Compared:
    """A score of the rerun beside the one that was sent in.

    low, high: where one more seed lies, by the seeds that were not rerun.  tolerance: how far the rerun may be from the reported value.
    """

    steps: str
    name: str
    reported: float | None
    rerun: float | None
    low: float
    high: float
    tolerance: float

    @property
    def reason(self) -> str | None:
        """Why it does not agree."""
        plural = "" if self.steps == "1" else "s"
        at = f"{self.name} at {self.steps} step{plural}: reported {_text(self.reported)}, rerun {_text(self.rerun)}"
        if self.reported is None or self.rerun is None:
            return None if self.reported is self.rerun else at
        if abs(self.rerun - self.reported) > self.tolerance:
            return f"{at}; more than {self.tolerance:.2g} apart"
        if not self.low <= self.rerun <= self.high:
            return f"{at}; by the other seeds one more lies in [{_text(self.low)}, {_text(self.high)}]"
        return None


@dataclass(frozen=True)
class Verification:
    """A rerun that agreed. how: "bit for bit" (the same student), "same numbers" or "within the noise"."""

    submission: Submission
    seed: int
    how: str
    scores: tuple[Compared, ...]
    runs: tuple[RunRecord, ...]

    def to_json(self) -> dict[str, Any]:
        return plain({
            "format": FORMAT, "submission": self.submission.digest, "seed": self.seed, "how": self.how,
            "scores": [dataclasses.asdict(score) for score in self.scores], "runs": [record.to_json() for record in self.runs],
            "environment": environment(), "created": now(),
        })  # fmt: skip


def compare(found: Submission, seed: int, reruns: Sequence[RunRecord]) -> Verification:
    """Raises `Refused` with every score that does not agree."""
    pairs = [(rerun, *(r for r in found.records if r.seed == seed and r.steps == rerun.steps)) for rerun in reruns]
    compared: list[Compared] = []
    reasons: list[str] = []
    total = sum(len(scores) for rerun in reruns for scores in rerun.scores.values())
    same_student = all(rerun.device_class == record.device_class and rerun.checksums == record.checksums for rerun, record in pairs)
    for rerun, record in pairs:
        exact = same_student or same_kind(rerun, record)
        reasons += _facts_apart(rerun, record)
        for steps, scores in rerun.scores.items():
            theirs = {score["name"]: score["value"] for score in record.scores[steps]}
            for score in scores:
                others = [r.scores.get(steps, ()) for r in found.records if r.seed != seed]
                values = [s["value"] for scores in others for s in scores if s["name"] == score["name"] and s["value"] is not None]
                compared.append(_compared(steps, score, theirs[score["name"]], values, exact, level=1 - (1 - LEVEL) / total))
    reasons += [score.reason for score in compared if score.reason]
    if reasons:
        raise Refused(f"{found.path.name}: the rerun of seed {seed} does not agree with it:\n" + "\n".join(reasons))
    equal = all(same_kind(rerun, record) for rerun, record in pairs)
    how = "bit for bit" if same_student else "same numbers" if equal else "within the noise"
    return Verification(found, seed, how, tuple(compared), tuple(reruns))


def same_kind(a: RunRecord, b: RunRecord) -> bool:
    """Whether the same seed must give both the same numbers: device class, threads, dtype, packages, harness and kind of processor."""
    told = all(a.environment.get(name) is not None and a.environment.get(name) == b.environment.get(name) for name in SAME)
    fields = all(getattr(a, name) == getattr(b, name) for name in ("device_class", "threads", "dtype"))
    return told and fields and a.device_class == "cpu" and a.provenance.get("distillbench") == b.provenance.get("distillbench")


def _facts_apart(rerun: RunRecord, record: RunRecord) -> list[str]:
    """What does not depend on rounding: evaluations, parameters, and passes to 1 % (a stage may end at another cycle)."""
    reasons = [
        f"{name}: reported {getattr(record, name)}, rerun {getattr(rerun, name)}"
        for name in ("evaluations", "parameters")
        if getattr(record, name) != getattr(rerun, name)
    ]
    ours, theirs = rerun.spent["passes"], record.spent.get("passes", 0.0)
    if abs(ours - theirs) > 0.01 * ours + ours / max(rerun.spent["cycles"], 1):
        reasons.append(f"passes spent: reported {theirs:.4g}, rerun {ours:.4g}")
    return reasons


def _compared(steps: str, score: dict[str, Any], reported: float | None, others: Sequence[float], exact: bool,
              level: float) -> Compared:  # fmt: skip
    rerun = score["value"]
    if rerun is None or reported is None:
        return Compared(steps, score["name"], reported, rerun, -math.inf, math.inf, 0.0)
    deviation = (score["high"] - score["low"]) / (2 * NORMAL_95) if score["low"] is not None and score["high"] is not None else 0.0
    noise = DEVIATIONS * deviation if deviation > 0 else RELATIVE * abs(rerun)
    tolerance = EXACT * max(1.0, abs(reported)) if exact else noise
    interval = prediction_interval(others, level, least=noise)
    return Compared(steps, score["name"], reported, rerun, interval.low, interval.high, tolerance)


def prediction_interval(values: Sequence[float], level: float = LEVEL, least: float = 0.0) -> Interval:
    """Where one more draw lies: mean +- t s sqrt(1 + 1 / n), no narrower than `least` to either side. Unbounded below two values.

    The interval of the mean, +- t s / sqrt(n), says where the average of many seeds is; most single seeds lie outside it.
    """
    n = len(values)
    mean = math.fsum(values) / n if n else 0.0
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = max(float(stdtrit(n - 1, 0.5 + level / 2)) * deviation * math.sqrt(1 + 1 / n), least)
    return Interval(mean, mean - half, mean + half, n)


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
