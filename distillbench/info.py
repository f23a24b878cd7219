"""What a method says about itself: plain data, no torch.

`distillbench list` reads these statements from a method's source without running it, so `info = MethodInfo(...)` is
written with literals only (strings, numbers, tuples, `Claim(...)`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DOMAINS = ("diffusion", "language", "radiance")

NEEDS = {
    "labels": "class labels as conditions",
    "text": "text conditions",
    "real data": "real examples in training",
    "second time": "a network that takes a second time",
    "guidance input": "a network that takes the guidance scale as an input",
    "log variance": "a network with a log-variance head",
    "taps": "a network that shows its hidden features",
    "lora": "a network that takes low-rank adapters",
    "resized": "a network that can be made narrower",
    "jvp": "a network through which forward-mode derivatives pass",
}

DATA_ACCESS = ("none", "conditions", "real", "teacher samples", "real and teacher samples")


@dataclass(frozen=True)
class Claim:
    """A paper's headline or ablation as `better` beats `worse` on `metric` at `steps` evaluations.

    `better` and `worse` name a method, if need be with changed knobs (`"dmd2(fake_per_gen=1)"`), or the teacher
    (`"teacher"`, at the same number of evaluations). `margin` is the smallest difference that counts, in the metric's unit.
    """

    text: str
    better: str
    worse: str
    metric: str
    track: str = "mixture2d"
    steps: int = 1
    margin: float = 0.0


@dataclass(frozen=True)
class Search:
    """A knob that `distillbench tune` searches, evenly from low to high (log: in its logarithm), or over choices."""

    knob: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low is not None and self.high is not None):
            raise ValueError(f"Search({self.knob!r}) takes either low and high, or choices")
        if self.low is not None and self.high is not None and not (0 if self.log else -1e300) < self.low < self.high:
            raise ValueError(f"Search({self.knob!r}): low must be below high" + (" and above 0, as log says" if self.log else ""))


MOST_SEARCHED = 3  # knobs a method


@dataclass(frozen=True)
class MethodInfo:
    """The card of a method. `trains` is "one student" (one training serves every step count) or "a student per step count".

    `tunes`: at most three knobs that the common tuning protocol searches on every track.
    `rewards`: networks whose judgement of samples training maximises, by their extractors' names; they score nothing of its runs.
    """

    id: str
    version: int
    title: str
    paper: str
    year: int
    family: str
    domain: tuple[str, ...]
    needs: tuple[str, ...]
    data_access: str
    steps: tuple[int, ...]
    trains: str = "one student"
    deviations: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    tunes: tuple[Search, ...] = ()
    rewards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for domain in self.domain:
            if domain not in DOMAINS:
                raise ValueError(f"{self.id}: unknown domain {domain!r}; known: {', '.join(DOMAINS)}")
        for need in self.needs:
            if need not in NEEDS:
                raise ValueError(f"{self.id}: unknown need {need!r}; known: {', '.join(NEEDS)}")
        if self.data_access not in DATA_ACCESS:
            raise ValueError(f"{self.id}: unknown data_access {self.data_access!r}; known: {', '.join(DATA_ACCESS)}")
        if self.trains not in ("one student", "a student per step count"):
            raise ValueError(f"{self.id}: trains is 'one student' or 'a student per step count', not {self.trains!r}")
        if not isinstance(self.rewards, tuple) or not all(isinstance(name, str) for name in self.rewards):
            raise ValueError(f'{self.id}: rewards is a tuple of names, as in ("clip-shapes",), not {self.rewards!r}')
        if len(self.tunes) > MOST_SEARCHED:
            raise ValueError(f"{self.id}: tunes names {len(self.tunes)} knobs; the protocol allows {MOST_SEARCHED}")

    @property
    def per_step(self) -> bool:
        return self.trains == "a student per step count"


def knob(default: Any, doc: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A documented field of a method's `Config`, with the range (both ends allowed) or the choices that `--set` accepts."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices})
