"""What a forger may do to a submission of the tiny method, and at which check it falls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distillbench.records import LatencyRecord, digest, run_id

SEEDS = 3
Edit = Callable[[dict[str, Any]], object]


def edit(path: Path, *edits: Edit, renew: bool = True) -> None:
    """Change a submission as a forger would: ids and digest made to fit, unless renew is False."""
    data = json.loads(path.read_text())
    for change in edits:
        change(data)
    if renew:
        names = ("track", "method", "method_version", "source_sha256", "config", "budget", "seed", "threads", "dtype", "device_class",
                 "trained_for", "steps", "kind", "rules")  # fmt: skip
        ids = {}
        for record in data["records"]:
            ids[record["id"]] = record["id"] = run_id(**{name: record[name] for name in names})
        data["digest"] = digest({name: value for name, value in data.items() if name != "digest"})
    path.write_text(json.dumps(data))


def better(by: float, seeds: tuple[int, ...] = tuple(range(SEEDS))) -> Edit:
    """Write a better in-mode rate, with its bounds, into the records of these seeds."""

    def change(data: dict[str, Any]) -> None:
        for record in data["records"]:
            for score in (score for scores in record["scores"].values() for score in scores):
                if record["seed"] in seeds and score["name"] == "in-mode":
                    score.update({name: score[name] + by for name in ("value", "low", "high")})

    return change


def elsewhere(data: dict[str, Any]) -> None:
    """As if it came from another kind of machine: other last digits, so other weights."""
    for record in data["records"]:
        record["environment"]["processor"] = "another"
        record["checksums"]["student"] = "ab" * 32


def in_records(**changes: Any) -> Edit:
    return lambda data: [record.update(changes) for record in data["records"]]


def other_knobs(data: dict[str, Any]) -> None:
    data["records"][0]["config"].update(lr=0.1)


def renew_digest(data: dict[str, Any]) -> None:
    data["digest"] = digest({name: value for name, value in data.items() if name != "digest"})


def seed_1_left_out(data: dict[str, Any]) -> None:
    data["records"].pop(1)
    data["records"].append(data["records"][0] | {"seed": 3})


def without_step_2(record: dict[str, Any]) -> None:
    for name in ("scores", "evaluations"):
        record[name].pop("2")
    record.update(steps=[1], trained_for=[1])


def no_latencies(data: dict[str, Any]) -> None:
    data["latencies"].clear()


def units(data: dict[str, Any]) -> None:
    for score in data["records"][0]["scores"]["1"]:
        score["unit"] = 3


def teachers_latency(data: dict[str, Any]) -> None:
    first = LatencyRecord(**data["latencies"][0])
    theirs = dataclasses.replace(first, subject="teacher", id="")
    data["latencies"].append(dataclasses.replace(theirs, id=theirs.content_id()).to_json())


BY_THE_FILE = {
    "edited, digest left": ((better(0.2),), False, "its digest is not that of its content"),
    "changed config, id left": ((other_knobs, renew_digest), False, "its id is not the hash of what it says it ran"),
    "one seed with other knobs": ((other_knobs,), True, "differ in more than their seed"),
    "the worst seed left out": ((seed_1_left_out,), True, "has seeds 0, 2, 3"),
    "too few seeds": ((lambda data: data["records"].pop(2), no_latencies), True, "has seeds 0, 1"),
    "a step left out": ((lambda data: without_step_2(data["records"][0]),), True, "the same step counts"),
    "another method's name": ((in_records(label="dmd2"),), True, "label of run"),
    "a reference": ((in_records(kind="reference"),), True, "kind of run"),
    "a failed run": ((in_records(status="failed: why"),), True, "status of run"),
    "no checksum": ((in_records(checksums={}),), True, "no checksum of its student"),
    "another file": (
        (lambda data: data["source"].update(sha256="cd" * 32, files={"tiny.py": "cd" * 32}),), True, "made by another file",
    ),
    "a field more": ((lambda data: data.update(note="x"),), True, "unknown 'note'"),
    "a path": ((lambda data: data["source"].update(where="/home/ada/tiny.py"),), True, "holds an absolute path"),
    "a score of another kind": ((units,), True, "scores should be"),
    "a latency of the teacher": ((teachers_latency,), True, "is of none of its runs"),
}  # fmt: skip


def quantity(**changes: Any) -> Edit:
    return lambda data: [score.update(changes) for record in data["records"] for score in record["scores"]["1"][:1]]


BY_THE_TRACK = {
    "identity": (quantity(identity={"metric": "in-mode/mixture2d", "estimator": "kinder"}), "another quantity than the board's"),
    "direction": (quantity(higher_is_better=False), "another quantity than the board's"),
    "number of samples": (quantity(n=8192), "another quantity than the board's"),
}


BY_THE_METHOD = {
    "knobs": (lambda data: [r["config"].update(lr=0.1) for r in data["records"]], "lr is 0.1, not 0.001"),
    "tuning": (in_records(tuning={"trials": 1, "passes": 5.0}), "tuning of run"),
    "budget": (
        lambda data: [b["budget"].update(name="S") for b in (data, *data["records"])],
        "the budget called S is 20000 passes there",
    ),
    "overspent": (lambda data: [r["spent"].update(passes=40000.0) for r in data["records"]], "spent 4e+04 passes of a budget of 2e+04"),
    "says nothing of its cost": (in_records(spent={}), "does not say what it spent"),
    "scores left out": (
        lambda data: [scores.pop() for r in data["records"] for scores in r["scores"].values()],
        "no fidelity-w2",
    ),
    "steps left out": (
        lambda data: [without_step_2(record) for record in data["records"]],
        "not trained and scored as planned here, for 1,2 steps",
    ),
    "card": (lambda data: data["card"].update(paper="a famous one"), "the card is not the method's own: paper"),
}


def scattered(data: dict[str, Any]) -> None:
    """Seeds far apart on both sides, so that hardly any rerun leaves their interval; each seed's own value is made up."""
    for record in data["records"]:
        better({0: 0.4, 1: -0.15, 2: 0.3}[record["seed"]], (record["seed"],))(data)


def wide_bounds(data: dict[str, Any]) -> None:
    """A sampling error made up large enough to cover the forged values."""
    for score in (score for record in data["records"] for scores in record["scores"].values() for score in scores):
        score.update(low=score["value"] - 1, high=score["value"] + 1)


BY_THE_RERUN = {
    "better scores": (better(0.2),),
    "slightly better scores on the same machine": (better(0.01),),
    "better scores from another machine": (elsewhere, better(0.2)),
    "scattered seeds from another machine": (elsewhere, scattered),
    "wide bounds from another machine": (elsewhere, better(0.2), wide_bounds),
    "fewer evaluations": (in_records(evaluations={"1": 1, "2": 1}),),
    "fewer parameters": (in_records(parameters=10),),
    "cheaper": (lambda data: [record["spent"].update(passes=15000.0) for record in data["records"]],),
}
