"""A score: a number, what exactly it is a number of, and how far sampling noise may move it.

Two scores may stand in one column only if their identities are equal; `Score.key` is the hash to compare.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillbench.errors import BadFileError, UsageError
from distillbench.metrics.arrays import as_float64


@dataclass(frozen=True)
class Score:
    """One cell of a board.

    `value` is None where the metric could not run, and `note` says why. `low` and `high` are a 95 % interval, `n` the number of
    generated samples, `higher_is_better` None for a number that does not rank. A NaN or infinite number is refused.
    """

    name: str
    identity: dict[str, Any]
    value: float | None
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool | None
    unit: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for field in ("value", "low", "high"):
            number = getattr(self, field)
            if number is not None and not math.isfinite(number):
                raise UsageError(f"score {self.name!r}: {field} is {number}; a score that could not be taken has value None and a note")

    @property
    def key(self) -> str:
        """The first 16 hexadecimal digits of the sha256 of the identity as canonical JSON."""
        return hashlib.sha256(canonical_json(self.identity).encode()).hexdigest()[:16]

    def with_interval(self, deviation: float) -> Score:
        """The same score with the interval value +- 1.96 deviation.

        `deviation` is the bootstrap standard deviation: sampling noise alone, not that of training or of the reference choice. The
        interval is centred on the value, because distances of resampled sets are inflated by their repeated rows, so that the
        percentiles of a bootstrap would miss the value itself.
        """
        if self.value is None:
            return self
        return dataclasses.replace(self, low=self.value - 1.96 * deviation, high=self.value + 1.96 * deviation)

    def unless_rewarded(self, rewards: Sequence[str]) -> Score:
        """The same score, but without its value where the network that takes it was a reward in training: that one is no judge."""
        judge = self.identity.get("extractor")
        if judge not in rewards:
            return self
        return dataclasses.replace(self, value=None, low=None, high=None, note=f"not run: {judge} was a reward in training")

    def to_json(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Score:
        """The inverse of `to_json`; a missing or unknown key raises `BadFileError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if not isinstance(data, dict) or not isinstance(data.get("identity"), dict):
            raise BadFileError("not a score: expected an object with an identity; write the record again")
        wrong = sorted((needed - set(data)) | (set(data) - known))
        if wrong:
            raise BadFileError(f"not a score of this version: keys {', '.join(wrong)} are missing or unknown; write the record again")
        return cls(**data)


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data, equal text. NaN and infinity are refused."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def identity(
    metric: str,
    *,
    estimator: str,
    extractor: str | None = None,
    weights_sha256: str | None = None,
    preprocessing: tuple[str, ...] = (),
    dtype: str = "float64",
    n_generated: int,
    n_reference: int | None = None,
    reference_sha256: str | None = None,
    prompts_sha256: str | None = None,
    seeds: Sequence[int] = (),
) -> dict[str, Any]:
    """What a number is a number of; everything that would make it another quantity, nothing else (no device, no versions).

    `estimator` names the formula and its parameters ("unbiased, cubic kernel"), `preprocessing` the steps in order, with library and
    antialiasing where they matter. `seeds` are those of the generated samples; consecutive ones are stored as "first..last".
    """
    seeds = [int(seed) for seed in seeds]
    consecutive = len(seeds) > 1 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return {
        "metric": metric,
        "estimator": estimator,
        "extractor": extractor,
        "weights_sha256": weights_sha256,
        "preprocessing": list(preprocessing),
        "dtype": dtype,
        "n_generated": int(n_generated),
        "n_reference": None if n_reference is None else int(n_reference),
        "reference_sha256": reference_sha256,
        "prompts_sha256": prompts_sha256,
        "seeds": f"{seeds[0]}..{seeds[-1]}" if consecutive else seeds,
    }


def bootstrap(fn: Callable[..., float], arrays: Sequence[Any], *, resamples: int = 32, seed: int) -> float:
    """Standard deviation of fn(*arrays) when the rows of the arrays are drawn again with replacement.

    Each array is resampled by itself; arrays that belong together row by row, as samples and their labels, are given as one tuple and
    handed to `fn` side by side: bootstrap(fn, [(samples, labels), reference], seed=0) calls fn(samples, labels, reference).
    """
    if resamples < 2:
        raise UsageError(f"bootstrap needs at least 2 resamples, got {resamples}")
    groups = [tuple(as_float64(array) for array in (group if isinstance(group, tuple) else (group,))) for group in arrays]
    for group in groups:
        if len({len(array) for array in group}) != 1:
            raise UsageError(f"bootstrap: arrays of one group differ in length: {[len(array) for array in group]}")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = []
        for group in groups:
            rows = generator.integers(len(group[0]), size=len(group[0]))
            drawn += [array[rows] for array in group]
        values.append(float(fn(*drawn)))
    return float(np.std(values, ddof=1))
