from __future__ import annotations

import json

import numpy as np
import pytest

from distillbench.errors import BadFileError, UsageError
from distillbench.metrics.score import Score, bootstrap, identity


def recipe(**changes: object) -> dict[str, object]:
    fields: dict[str, object] = {
        "estimator": "covariance with n - 1",
        "extractor": "pixels8x8",
        "weights_sha256": None,
        "preprocessing": ("area 8x8", "scale 0..1"),
        "dtype": "float32",
        "n_generated": 2000,
        "n_reference": 1000,
        "reference_sha256": "ab" * 32,
        "prompts_sha256": None,
        "seeds": range(2000),
    }
    return identity("frechet distance", **{**fields, **changes})  # type: ignore[arg-type]


def score(**changes: object) -> Score:
    fields: dict[str, object] = {
        "name": "fd/pixels8x8",
        "identity": recipe(),
        "value": 1.5,
        "low": None,
        "high": None,
        "n": 2000,
        "higher_is_better": False,
        "unit": "",
        "note": "",
    }
    return Score(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"estimator": "intercept in 1/n"},
        {"extractor": "efflite0-b10"},
        {"weights_sha256": "00"},
        {"preprocessing": ("scale 0..1", "area 8x8")},
        {"dtype": "float16"},
        {"n_generated": 1999},
        {"n_reference": 999},
        {"reference_sha256": "cd" * 32},
        {"prompts_sha256": "ef"},
        {"seeds": range(1, 2001)},
    ],
)
def test_whatever_changes_the_quantity_changes_the_key(change: dict[str, object]) -> None:
    assert score(identity=recipe(**change)).key != score().key


def test_the_key_is_that_of_the_identity_alone() -> None:
    assert score().key == score(name="other", value=None, note="not run", n=1).key
    assert score().key == score(identity=dict(reversed(recipe().items()))).key
    assert score().key == score(identity=recipe(seeds=np.arange(2000), n_generated=np.int64(2000))).key
    # Pinned: a key stored in a record must stay valid.
    assert Score("x", {"b": [1, 2.5], "a": "é"}, 0.0, None, None, 1, None).key == "123b424b7606d08d"


def test_json_round_trip() -> None:
    original = score(low=1.4, high=1.6, note="teacher")
    again = Score.from_json(json.loads(json.dumps(original.to_json())))
    assert again == original
    assert again.key == original.key
    assert recipe(seeds=[3, 1])["seeds"] == [3, 1]


def test_foreign_json_is_refused() -> None:
    data = score().to_json()
    with pytest.raises(BadFileError, match="value"):
        Score.from_json({key: value for key, value in data.items() if key != "value"})
    with pytest.raises(BadFileError, match="extra"):
        Score.from_json({**data, "extra": 1})
    with pytest.raises(BadFileError, match="not a score"):
        Score.from_json({"identity": 3})
    assert Score.from_json({key: value for key, value in data.items() if key != "note"}) == score()


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="value is nan"):
        score(value=float("nan"))


def test_the_interval_is_centred() -> None:
    got = score().with_interval(0.5)
    assert (got.low, got.high) == pytest.approx((1.5 - 0.98, 1.5 + 0.98))
    assert score(value=None).with_interval(0.5).low is None


def test_bootstrap_of_a_mean_is_its_standard_error() -> None:
    rows = np.random.default_rng(0).standard_normal((400, 1)) * 3
    got = bootstrap(lambda x: float(x.mean()), [rows], resamples=2000, seed=0)
    assert got == pytest.approx(rows.std() / 20, rel=0.06)
    assert got == bootstrap(lambda x: float(x.mean()), [rows], resamples=2000, seed=0)
    assert got != bootstrap(lambda x: float(x.mean()), [rows], resamples=2000, seed=1)


def test_bootstrap_keeps_what_belongs_together() -> None:
    rows = np.random.default_rng(1).standard_normal((50, 2))
    assert bootstrap(lambda a, b: float(np.abs(a - b).max()), [(rows, rows)], seed=0) == 0.0
    assert bootstrap(lambda a, b: float(np.abs(a - b).max()), [rows, rows], seed=0) > 0.0
    with pytest.raises(UsageError, match="differ in length"):
        bootstrap(lambda a, b: 0.0, [(rows, rows[:3])], seed=0)
