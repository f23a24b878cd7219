"""`distillbench doctor TRACK`: what this machine lacks for a track, and the command that gets each."""

from __future__ import annotations

import pytest

from distillbench.published_weights import WEIGHTS
from distillbench.tracks import coco_sd15
from distillbench.tracks.facts import EXTERNAL
from given_files import write_data


def lines(out: str) -> dict[str, tuple[str, str]]:
    """what -> state, detail"""
    rows = [line.strip().partition("  ") for line in out.splitlines()]
    return {rest.partition(": ")[0]: (state, rest.partition(": ")[2]) for state, _, rest in rows}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path / "weights"))


@pytest.mark.parametrize("track", EXTERNAL)
def test_what_is_missing_comes_with_how_to_get_it(distillbench, track):
    status, out, err = distillbench("doctor", track)
    found = lines(out)
    assert err == ""
    assert status == int(any(state == "broken" for state, _ in found.values()))
    assert found["data"][0] == "missing"
    assert "--data PATH" in found["data"][1]
    weights = {what.removeprefix("weights ") for what in found if what.startswith("weights ")}
    if track == "emoji":
        assert weights == set()
        assert found["zoo emoji"] == ("ok", "checksum holds")
        return
    assert found["teacher"][0] == "missing"
    assert "--teacher PATH" in found["teacher"][1]
    assert weights
    for name in weights:
        state, detail = found[f"weights {name}"]
        assert state == "missing"
        assert "curl -L --create-dirs -o" in detail
        assert WEIGHTS[name].url in detail
    assert "to train one student" in found["GPU"][1]


def test_embedded_tracks_are_looked_at_too(distillbench):
    status, out, _ = distillbench("doctor", "mixture2d")
    found = lines(out)
    assert status == 0
    assert found["zoo mixture2d"] == ("ok", "checksum holds")
    assert "weights inception2015" not in found
    assert lines(distillbench("doctor", "digits@1").out).keys() >= {"zoo digits", "zoo digits-classifier", "data digits"}


def test_data_that_are_there_are_checked(distillbench, tmp_path):
    data = write_data(tmp_path / "data", ["a", "b"])
    status, out, _ = distillbench("doctor", "coco-sd15", "--data", data, "--teacher", data)
    found = lines(out)
    assert status == 1
    assert found["data"][0] == "broken"
    assert f"2 captions, and coco-sd15 is scored on {coco_sd15.DEFINITION.n}" in found["data"][1]
    assert found["teacher"] == ("broken", f"--teacher {data}: no pipeline folder, its model_index.json is missing or no index")


def test_wrong_words(distillbench):
    for words, said in (
        (("coco-sd1",), "did you mean coco-sd15"),
        (("mixture2d", "--data", "x"), "ships its teacher"),
        (("--data", "x"), "belong to a track"),
    ):
        status, _, err = distillbench("doctor", *words)
        assert (status, len(err.splitlines())) == (2, 1)
        assert said in err
