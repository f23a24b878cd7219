"""Ids follow from what determines a result and from nothing else; a record is believed only when all of it fits."""

from __future__ import annotations

import copy
import getpass
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillbench.errors import BadFileError
from distillbench.record_checks import score_key, scrub, scrub_words
from distillbench.records import LatencyRecord, RunRecord, environment, now, run_id

DETERMINANTS: dict[str, Any] = {
    "track": "mixture2d@1", "method": "cd", "method_version": 1, "source_sha256": None, "config": {"lr": 1e-3, "betas": (0.9, 0.99)},
    "budget": {"name": "S", "unit": "passes", "amount": 4e6}, "seed": 0, "threads": 1, "dtype": "float32", "device_class": "cpu",
    "trained_for": [1, 2, 4], "steps": [1, 2, 4],
}  # fmt: skip
CHANGES: dict[str, Any] = {
    "track": "mixture2d@2", "method": "dmd2", "method_version": 2, "source_sha256": "a" * 64, "config": {"lr": 2e-3, "betas": (0.9, 0.99)},
    "budget": {"name": "S", "unit": "passes", "amount": 1.6e7}, "seed": 1, "threads": 2, "dtype": "bfloat16", "device_class": "cuda",
    "trained_for": [1], "steps": [1, 2], "rules": 2, "kind": "reference",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_each_determinant_changes_the_id(name: str) -> None:
    assert run_id(**{**DETERMINANTS, name: CHANGES[name]}) != run_id(**DETERMINANTS)


def test_what_does_not_determine_a_result_leaves_the_id(run: Any) -> None:
    record = run()
    other = replace(record, environment={"python": "3.13.0"}, created=now(), provenance={"a": "b" * 64}, spent={"seconds": 9.0},
                    tuning={"trials": 8, "passes": 1e6}, overrides={"lr": 1e-3}, label="cd(lr=0.001)")  # fmt: skip
    assert run_id(**other.determinants()) == record.id
    assert len(record.id) == 16


def test_equal_numbers_and_names_of_budgets_give_equal_ids() -> None:
    budget = {"name": "4e6passes", "unit": "passes", "amount": 4_000_000}
    assert run_id(**{**DETERMINANTS, "budget": budget}) == run_id(**DETERMINANTS)
    assert run_id(**{**DETERMINANTS, "config": {"betas": [0.9, 0.99], "lr": 1e-3}}) == run_id(**DETERMINANTS)
    assert run_id(**{**DETERMINANTS, "config": {"lr": 1e-3, "betas": (0.9, 0.999)}}) != run_id(**DETERMINANTS)


def test_settings_are_shared_by_seeds_and_scored_steps_alone(run: Any) -> None:
    record = run()
    assert run(seed=5).setting == record.setting
    assert run(threads=2).setting != record.setting
    assert run(config={"lr": 5e-3}).setting != record.setting


def test_a_run_record_round_trips_through_json(run: Any) -> None:
    record = run(config={"betas": (0.9, 0.99), "clip": float("inf")})
    again = RunRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert again.to_json() == record.to_json()
    assert again.config["clip"] == "inf"


BAD_FIELDS: list[tuple[str, Any]] = [
    ("seed", "0"), ("seed", True), ("seed", -1), ("threads", 0), ("steps", []), ("steps", [0]), ("steps", [1, 1]), ("status", "fine"),
    ("status", "failed: "), ("budget", None), ("budget", {"name": "S", "unit": "dollars", "amount": 1.0}), ("spent", {"passes": "many"}),
    ("budget", {"name": "S", "unit": "passes", "amount": -1}), ("spent", {"joules": 1.0}), ("created", "yesterday"), ("id", "../../../x"),
    ("created", "2025-01-01T00:00:00"), ("track", "mixture2d"), ("label", "=1+1"), ("label", "\x1b[31mred"), ("kind", "latency"),
    ("environment", {"host": "box"}), ("environment", {"python": ["3"]}), ("checksums", {"student": "short"}), ("evaluations", {}),
    ("evaluations", {"1": 1, "2": 2, "4": 4, "8": 8}), ("tuning", {"trials": 2}), ("parameters", 0), ("config", []), ("scores", {}),
    ("scores", {"1": [{"name": "in-mode"}]}), ("family", 7), ("dtype", "<script>"), ("source_sha256", "zz"), ("rules", 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_a_wrong_field_is_refused_in_one_line(run: Any, name: str, value: Any) -> None:
    data = run().to_json() | {name: value}
    with pytest.raises(BadFileError) as caught:
        RunRecord.from_json(data, "records/x.json")
    assert str(caught.value).startswith("records/x.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "record", 3, {}])
def test_what_is_no_record_is_refused(data: object) -> None:
    with pytest.raises(BadFileError):
        RunRecord.from_json(data)


def test_missing_unknown_and_tampered_fields_are_refused(run: Any) -> None:
    data = run().to_json()
    for name in data:
        with pytest.raises(BadFileError):
            RunRecord.from_json({key: value for key, value in data.items() if key != name})
    with pytest.raises(BadFileError, match="unknown 'extra'"):
        RunRecord.from_json(data | {"extra": 1})
    with pytest.raises(BadFileError, match="not the hash"):
        RunRecord.from_json(data | {"seed": 7})


@pytest.mark.parametrize(
    "change",
    [
        {"value": float("nan")}, {"value": float("inf")}, {"value": None}, {"key": "0" * 16}, {"n": 1.5}, {"higher_is_better": 1},
        {"identity": "fd"}, {"name": ""}, {"unknown": 1},
    ],
)  # fmt: skip
def test_a_wrong_score_is_refused(run: Any, change: dict[str, Any]) -> None:
    data = copy.deepcopy(run().to_json())
    data["scores"]["1"][0].update(change)
    with pytest.raises(BadFileError, match="scores"):
        RunRecord.from_json(data)


def test_a_score_may_lack_its_value_if_it_says_why(run: Any, scored: Any) -> None:
    record = run(scores={1: [scored("in-mode", None, note="not run: weights missing")]})
    assert RunRecord.from_json(record.to_json()).scores["1"][0]["note"] == "not run: weights missing"


def test_score_keys_are_those_of_the_metrics() -> None:
    score = pytest.importorskip("distillbench.metrics.score")
    made = score.Score("fd", score.identity("fd", estimator="naïve", n_generated=5, seeds=[1, 2, 3]), 1.0, None, None, 5, False)
    assert score_key(made.identity) == made.key


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("cannot open /home/ada/data/x.bin now", "/home"), ("at ~/secret/x", "~/secret"), (r"C:\Users\ada\x", "Users"),
        ("file:///etc/hosts", "etc"), ("root='/srv/box7/run'", "box7"), (r"\\server\share", "server"),
    ],
)  # fmt: skip
def test_absolute_paths_are_refused_and_scrubbed(run: Any, text: str, shows: str) -> None:
    record = run(status=f"failed: {text}")
    with pytest.raises(BadFileError, match="path"):
        RunRecord.from_json(record.to_json())
    clean = record.scrubbed()
    assert shows not in clean.status
    assert RunRecord.from_json(clean.to_json()).status == clean.status


@pytest.mark.parametrize("text", ["https://example.org/a/b", "fd/efflite0-b10@64", "and/or, 3 img/s, 1/2/4", "a / b / c", "alpha ~ 1/x"])
def test_what_only_looks_like_a_path_stays(text: str) -> None:
    assert scrub(text) == text


def test_two_files_of_one_name_stay_two_and_scrubbing_twice_changes_nothing(run: Any) -> None:
    first, second = scrub({"data": "/a/b/x.txt"}), scrub({"data": "/a/c/x.txt"})
    assert first != second
    assert scrub(first) == first
    record = run(config={"data": "/a/b/x.txt"})
    assert RunRecord.from_json(record.scrubbed().to_json()).id == record.id


def test_user_and_host_leave_free_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "adalove")
    monkeypatch.setattr("socket.gethostname", lambda: "box7.example.org")
    assert scrub_words("adalove@box7.example.org ran on box7, not box77") == "(private)@(private) ran on (private), not box77"


def test_the_environment_names_no_one() -> None:
    found = environment()
    assert {"python", "torch", "cpus"} <= set(found)
    assert not {"user", "host", "path"} & set(found)
    assert scrub_words(scrub(found)) == found


def test_a_latency_record_follows_from_its_seconds() -> None:
    seconds = [0.010, 0.011, 0.012, 0.013, 0.030]
    record = LatencyRecord.measured(track="mixture2d@1", subject="teacher", steps=50, batch=1, seconds=seconds, threads=1, dtype="float32",
                                    device_class="cpu")  # fmt: skip
    assert (record.median, record.p10) == pytest.approx((0.012, 0.0104))
    assert record.p90 == pytest.approx(0.0232)
    assert record.flagged
    assert LatencyRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    with pytest.raises(BadFileError, match="edited"):
        LatencyRecord.from_json(record.to_json() | {"median": 0.001})
    steady = replace(record, median=0.001, id="")
    with pytest.raises(BadFileError, match="follow"):
        LatencyRecord.from_json(replace(steady, id=steady.content_id()).to_json())


def test_boards_need_no_torch() -> None:
    code = "import sys, distillbench.leaderboard, distillbench.store, distillbench.statistics; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
