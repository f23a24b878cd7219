"""The store loses nothing, believes nothing, deletes nothing."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillbench.errors import BadFileError, UsageError
from distillbench.records import LatencyRecord
from distillbench.store import LARGEST, Store, store_folder, write_atomically

WRITERS, EACH = 8, 12


def _make_run(**changes: Any) -> Any:
    spec = importlib.util.spec_from_file_location("made_up_records", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_run(**changes)


def _write_many(folder: str, writer: int) -> None:
    store = Store(folder)
    for i in range(EACH):
        store.add(_make_run(seed=1000 * writer + i))
        failed = _make_run(seed=77, status="failed: first try", scores={}, steps=[1, 2, 4])
        store.add(failed if writer % 2 else _make_run(seed=77))  # all fight over one id; the ok record must win


def test_eight_writers_lose_no_record(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(str(tmp_path), writer)) for writer in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * WRITERS
    store = Store(tmp_path)
    records = {record.seed: record for record in store.records()}
    assert set(records) == {1000 * writer + i for writer in range(WRITERS) for i in range(EACH)} | {77}
    assert records[77].ok
    assert store.problems == []
    assert not [name for name in os.listdir(tmp_path / "records") if name.startswith(".")]


def test_what_is_added_comes_back(tmp_path: Path, run: Any) -> None:
    store = Store(tmp_path / "new" / "store")
    assert store.records() == []
    record = run()
    assert store.add(record) == "added"
    assert store.get(record.id).to_json() == record.to_json()
    assert store.get("0" * 16) is None
    assert store.find(record.id[:6]).id == record.id
    assert store.records("digits@1") == []
    with pytest.raises(UsageError, match="no run"):
        store.find("zzz")


def test_the_same_result_is_dropped_and_another_one_is_set_aside(tmp_path: Path, run: Any, scored: Any) -> None:
    store, first = Store(tmp_path), run()
    store.add(first)
    assert store.add(replace(first, created="2026-01-01T00:00:00Z", spent={"seconds": 99.0})) == "dropped"
    other = {str(step): [scored("in-mode", 0.1)] for step in (1, 2, 4)}
    assert store.add(replace(first, scores=other)) == "set aside"
    assert store.get(first.id).to_json() == first.to_json()
    assert "differs from the first" in store.problems[0]
    assert len(list((tmp_path / "set-aside").iterdir())) == 1


def test_an_ok_record_replaces_a_failed_one_and_never_the_other_way(tmp_path: Path, run: Any) -> None:
    store = Store(tmp_path)
    failed = run(status="failed: the loss is NaN", scores={}, steps=[1, 2, 4])
    skipped = run(status="skipped: needs taps", scores={}, steps=[1, 2, 4])
    assert [store.add(failed), store.add(skipped), store.add(run()), store.add(failed)] == ["added", "replaced", "replaced", "dropped"]
    assert store.get(failed.id).ok


HOSTILE = {
    "truncated": b'{"kind": "run", "id": "',
    "empty": b"",
    "binary": b"\x80\x04\x95\x00posix\x94system\x94",
    "a list": b"[1, 2]",
    "a tower": b"[" * 100_000,
    "not a number": b'{"id": NaN}',
    "twice a key": b'{"id": 1, "id": 2}',
    "too large": b" " * (LARGEST + 1),
    "broken text": b'{"id": "\xff\xfe"}',
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_files_are_named_and_set_aside_unchanged(tmp_path: Path, run: Any, name: str) -> None:
    store, record = Store(tmp_path), run()
    store.add(record)
    bad = tmp_path / "records" / f"{'e' * 16}.json"
    bad.write_bytes(HOSTILE[name])
    assert [found.id for found in store.records()] == [record.id]
    assert len(store.problems) == 1
    assert bad.name in store.problems[0]
    assert "\n" not in store.problems[0]
    assert (tmp_path / "set-aside" / bad.name).read_bytes() == HOSTILE[name]
    again = Store(tmp_path)
    assert len(again.records()) == 1
    assert again.problems == []


def test_records_that_parse_but_lie_are_set_aside(tmp_path: Path, run: Any) -> None:
    store, record = Store(tmp_path), run()
    folder = tmp_path / "records"
    folder.mkdir()
    huge, misnamed, edited = record.to_json(), record.to_json(), record.to_json() | {"seed": 3}
    text = json.dumps(huge).replace("0.7,", "1e999,", 1)
    (folder / f"{record.id}.json").write_text(text)
    (folder / f"{'a' * 16}.json").write_text(json.dumps(misnamed))
    (folder / f"{'b' * 16}.json").write_text(json.dumps(edited))
    (folder / "notes.txt").write_text("hello")
    (folder / "folder.json").mkdir()
    os.symlink(tmp_path / "elsewhere", folder / "link.json")
    os.mkfifo(folder / "pipe.json")
    assert store.records() == []
    assert len(store.problems) == 7
    assert os.listdir(folder) == []
    assert len(os.listdir(tmp_path / "set-aside")) == 7
    assert store.add(record) == "added"


def test_a_read_only_store_names_bad_files_and_touches_nothing(tmp_path: Path, run: Any) -> None:
    record = run()
    Store(tmp_path).add(record)
    bad = tmp_path / "records" / "x.json"
    bad.write_text("{")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    store = Store(tmp_path, read_only=True)
    assert [found.id for found in store.records()] == [record.id]
    assert "left where it is" in store.problems[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    with pytest.raises(UsageError, match="read-only"):
        store.add(record)


def test_private_strings_are_scrubbed_on_the_way_in_and_wrong_records_refused(tmp_path: Path, run: Any) -> None:
    store = Store(tmp_path)
    store.add(run(status="failed: no file /home/ada/x/y.bin", scores={}, steps=[1]))
    assert "/home" not in next((tmp_path / "records").glob("*.json")).read_text()
    with pytest.raises(BadFileError, match="threads"):
        store.add(run(threads=0))
    assert len(store.records()) == 1


def test_a_write_that_breaks_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_atomically(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_latencies_are_kept_each(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for second in (0.01, 0.02):
        store.add(LatencyRecord.measured(track="mixture2d@1", subject="teacher", steps=50, batch=1, seconds=[second], threads=1,
                                         dtype="float32", device_class="cpu"))  # fmt: skip
    assert sorted(record.median for record in store.latencies("mixture2d@1")) == [0.01, 0.02]


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTILLBENCH_STORE", raising=False)
    assert store_folder() == Path(".distillbench")
    monkeypatch.setenv("DISTILLBENCH_STORE", str(tmp_path))
    assert store_folder() == tmp_path
    assert store_folder("here") == Path("here")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Store(tmp_path / "file")


def test_folders_of_runs_and_students_stay_inside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.run_folder("a" * 16) == tmp_path / "runs" / ("a" * 16)
    assert store.student_folder("a" * 16) == tmp_path / "students" / ("a" * 16)
    for bad in ("../etc", "a" * 15, "A" * 16, ""):
        with pytest.raises(UsageError):
            store.run_folder(bad)
