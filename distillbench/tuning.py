"""Tuning by the common protocol: 8 trials over at most 3 declared knobs at S/4, one seed, on a validation split that no board uses.

The first trial is the method as its paper has it; the others are a scrambled Halton sequence over the ranges in the method's card,
the same for every method. The best by the track's distance of distributions is kept, with all trials, in `recipes/<track>.toml`.
"""

from __future__ import annotations

import math
import os
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Console
from scipy.stats import qmc

from .bench import run_plan
from .closing import told
from .config import as_text
from .discovery import Found, find
from .errors import UsageError
from .info import Search
from .jobs import STEPS, Job, resolve, split
from .records import RunRecord, now
from .store import Store
from .tracks.facts import VALIDATES, TrackFacts, facts_of

TRIALS = 8
SEED = 1000
BUDGET = "S/4"


@dataclass(frozen=True)
class Trial:
    """Values of the searched knobs, what they scored (the geometric mean over step counts; infinite if a training failed), what it cost."""

    values: dict[str, Any]
    score: float
    passes: float
    note: str = ""


@dataclass(frozen=True)
class Study:
    """All trials of one method on one track."""

    method: str
    version: int
    facts: TrackFacts
    path: Path  # of the method's file
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The first of the lowest score."""
        return min(self.trials, key=lambda trial: trial.score)


def points(found: Found, config_class: Any) -> list[dict[str, Any]]:
    """The knobs of each trial: none changed, then quasi-random within the ranges of the card."""
    searches = found.info.tunes
    if not searches:
        raise UsageError(f"{found.info.id} declares no knobs to tune; add tunes=(Search(...),) to its info")
    hints = typing.get_type_hints(config_class)
    unknown = [search.knob for search in searches if search.knob not in hints]
    if unknown:
        raise UsageError(f"{found.info.id}: tunes names {unknown[0]!r}, which is no knob of its Config")
    places = qmc.Halton(len(searches), scramble=True, rng=0).random(TRIALS - 1)
    rows = [{s.knob: _value(s, float(u), hints[s.knob]) for s, u in zip(searches, row, strict=True)} for row in places]
    return [{}, *rows]


def _value(search: Search, place: float, hint: Any) -> Any:
    """The knob's value at a place in [0, 1), rounded to two digits."""
    if search.choices:
        return search.choices[int(place * len(search.choices))]
    assert search.low is not None
    assert search.high is not None
    if search.log:
        value = search.low * (search.high / search.low) ** place
    else:
        value = search.low + place * (search.high - search.low)
    whole = hint is int or int in typing.get_args(hint)
    return round(value) if whole else float(f"{value:.2g}")


def run_trials(method: str, track: str, store: Store, workers: int, console: Console, log: str | None = None) -> Study:
    """Run the trials that the store's folder `tuning` lacks, and score them all."""
    facts, found = facts_of(track), find(method)
    if facts.name.endswith(VALIDATES):
        raise UsageError(f"name the track itself: distillbench tune {method} {facts.name.removesuffix(VALIDATES)}")
    split_facts = facts_of(facts.name + VALIDATES)
    held = Store(store.folder / "tuning")
    steps = tuple(n for n in STEPS if n in found.info.steps) or found.info.steps
    tried = points(found, found.load().Config)
    jobs = [_jobs(method, split_facts.name, steps, values) for values in tried]
    every = [job for trial in jobs for job in trial]
    with told(held, every, log, board_shown=True):
        run_plan(every, held, workers, console, log)
    trials = [_trial(values, [held.get(resolve(job).record.id) for job in each], facts) for values, each in zip(tried, jobs, strict=True)]
    return Study(found.info.id, found.info.version, facts, found.path, tuple(trials))


def _jobs(method: str, track: str, steps: tuple[int, ...], values: dict[str, Any]) -> list[Job]:
    """One trial: a training, or one for each step count."""
    settings = {name: as_text(value) for name, value in values.items()}
    return [Job(method, track, BUDGET, SEED, part, settings) for part in split(method, steps)]


def _trial(values: dict[str, Any], records: Sequence[RunRecord | None], facts: TrackFacts) -> Trial:
    passes = sum(record.spent.get("passes", 0.0) for record in records if record is not None)
    bad = next((record.status for record in records if record is not None and not record.ok), "")
    scores = [
        float(score["value"])
        for record in records
        if record is not None
        for rows in record.scores.values()
        for score in rows
        if score["name"] == facts.tuned_on and score["value"] is not None
    ]
    if bad or not scores:
        return Trial(values, math.inf, passes, bad or "not scored")
    return Trial(values, math.exp(math.fsum(map(math.log, scores)) / len(scores)), passes)


def write_recipe(study: Study, path: Path | None = None) -> Path:
    """Put the best values and all trials into the recipe, leaving other methods' sections as they are."""
    path = path or study.path.parent / "recipes" / f"{study.facts.name}.toml"
    if math.isinf(study.best.score):
        raise UsageError(f"every trial of {study.method} on {study.facts.name} failed ({study.best.note}); the recipe is left as it was")
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        held[study.method] = _section(study)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        origin = "with trials as `distillbench tune` found them, without as another track has them"
        head = f"# Values of each method on {study.facts.name}: {origin}.\n\n"
        beside.write_text(head + tomli_w.dumps(dict(sorted(held.items()))), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise UsageError(f"{path.name} cannot be written ({error.strerror}); name another file with --out") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path.name} is no valid TOML: {error}; mend it or move it away") from None
    return path


def _section(study: Study) -> dict[str, Any]:
    trials = []
    for trial in study.trials:
        note = {"note": trial.note} if trial.note else {}
        trials.append({"score": float(f"{trial.score:.4g}"), **trial.values, **note})
    passes = round(sum(trial.passes for trial in study.trials))
    about = {
        "trials": len(study.trials), "passes": passes, "budget": BUDGET, "seed": SEED,
        "minimised": f"{study.facts.tuned_on} on {study.facts.name}{VALIDATES}", "version": study.version, "date": now()[:10],
    }  # fmt: skip
    return {"values": study.best.values, "tuning": {**about, "trial": trials}}
