"""Claims: how a side is read, what must run for it, and what the verdict is."""

from __future__ import annotations

import dataclasses

import pytest
from scipy import stats

from distillbench.claims import (
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    UNDECIDED,
    Decision,
    Side,
    corrected,
    decided,
    jobs_of,
    methods_with_claims,
)
from distillbench.discovery import discover
from distillbench.errors import UsageError
from distillbench.info import Claim
from distillbench.jobs import TEACHER, resolve
from distillbench.statistics import Interval
from distillbench.store import Store
from distillbench.tracks.facts import facts_of


def test_sides_are_read():
    assert Side.parse("cd") == Side("cd", {})
    assert Side.parse("dmd2(fake_per_gen=5,gan=false)") == Side("dmd2", {"fake_per_gen": "5", "gan": "false"})
    assert Side.parse("cd(w_range=5,15,lr=1e-3)") == Side("cd", {"w_range": "5,15", "lr": "1e-3"})
    assert Side.parse("teacher") == Side(TEACHER, {})


@pytest.mark.parametrize("text", ["", "cd(", "cd(5)", "teacher(x=1)", "cd(x=1) and more"])
def test_a_side_that_is_none(text):
    with pytest.raises(UsageError, match="no side of a claim"):
        Side.parse(text)


@pytest.mark.parametrize("name", sorted(discover()))
def test_every_claim_of_every_method_can_be_run(name):
    """Knobs, metrics and step counts exist."""
    for claim in discover()[name].info.claims:
        facts = facts_of(claim.track)
        assert claim.metric in facts.columns, claim
        assert claim.margin >= 0
        for text in (claim.better, claim.worse):
            assert resolve(Side.parse(text).job(claim, 0)).record.track == facts.id


def test_jobs_are_those_of_a_bench_and_stand_once():
    first = Claim("one", "cd", "teacher", "in-mode", steps=1)
    again = Claim("two", "cd", "cd(points=8)", "sliced-w2", steps=2)
    jobs = jobs_of([first, again], seeds=3)
    assert len(jobs) == 1 + 3 * 2  # the teacher, and two settings on three seeds
    assert {job.steps for job in jobs if job.target == "cd"} == {(1, 2, 4)}
    per_step = jobs_of([Claim("three", "dmd2", "dmd2(gan=false)", "in-mode", steps=4)], seeds=1)
    assert [job.steps for job in per_step] == [(4,), (4,)]
    assert len(jobs_of([first])) == 1 + facts_of("mixture2d").claim_seeds


def stored(tmp_path, values: dict[str, list[float]], claim: Claim) -> Store:
    """A store in which each side of a claim scored these values, a seed each."""
    store = Store(tmp_path)
    for text, numbers in values.items():
        for seed, value in enumerate(numbers):
            record = resolve(Side.parse(text).job(claim, seed)).record
            score = {"name": claim.metric, "identity": {"metric": claim.metric}, "value": value, "low": None, "high": None, "n": 8,
                     "higher_is_better": claim.metric != "sliced-w2", "unit": "", "note": ""}  # fmt: skip
            scores = {str(steps): [score] for steps in record.steps}
            ok = dataclasses.replace(record, status="ok", scores=scores, evaluations={str(steps): steps for steps in record.steps})
            store.add(ok)
            if text == TEACHER:
                break
    return store


def decide(tmp_path, values, metric="in-mode", margin=0.0, **claims) -> Decision:
    claim = Claim("a claim", *values, metric, margin=margin)
    found = discover()["cd"]
    method = dataclasses.replace(found, info=dataclasses.replace(found.info, claims=(claim,)))
    return decided([stored(tmp_path, values, claim)], {"cd": method}, "mixture2d")[0]


NOISE = [0.01, -0.01, 0.02, -0.02, 0.005, -0.005, 0.015, -0.015]


def test_a_clear_effect_is_reproduced_and_its_numbers_are_those_of_scipy(tmp_path):
    a, b = [0.9 + e for e in NOISE], [0.8 - e / 2 for e in NOISE]
    found = decide(tmp_path, {"cd": a, "cd(points=8)": b})
    test = stats.ttest_rel(a, b)
    assert (found.verdict, found.n) == (REPRODUCED, 8)
    assert found.p == pytest.approx(test.pvalue, rel=1e-6)
    interval = test.confidence_interval(0.95)
    assert (found.effect.low, found.effect.high) == pytest.approx((interval.low, interval.high))


def test_of_a_distance_the_smaller_is_better(tmp_path):
    found = decide(tmp_path, {"cd": [0.1 + e for e in NOISE], "cd(points=8)": [0.3] * 8}, metric="sliced-w2")
    assert found.verdict == REPRODUCED
    assert found.effect.value == pytest.approx(0.2)


def test_the_other_way_round_is_not_reproduced(tmp_path):
    assert decide(tmp_path, {"cd": [0.7 + e for e in NOISE], "cd(points=8)": [0.8] * 8}).verdict == NOT_REPRODUCED


def test_a_margin_that_is_not_reached_is_not_reproduced(tmp_path):
    values = {"cd": [0.85 + e for e in NOISE], "cd(points=8)": [0.8] * 8}
    assert decide(tmp_path / "none", values).verdict == REPRODUCED
    assert decide(tmp_path / "wide", values, margin=0.2).verdict == NOT_REPRODUCED
    assert decide(tmp_path / "at", values, margin=0.05).verdict == UNDECIDED


def test_noise_alone_is_undecided(tmp_path):
    assert decide(tmp_path, {"cd": [0.8 + e for e in NOISE], "cd(points=8)": [0.8] * 8}).verdict == UNDECIDED


def test_too_few_seeds_decide_nothing(tmp_path):
    found = decide(tmp_path, {"cd": [0.9, 0.91, 0.92], "cd(points=8)": [0.1, 0.11, 0.1]})
    assert (found.verdict, found.n, found.why) == (UNDECIDED, 3, "3 of 8 seeds")


def test_what_was_not_run_says_what_is_missing(tmp_path):
    found = decide(tmp_path, {"cd": [0.9] * 8, "cd(points=8)": []})
    assert (found.verdict, found.effect) == (NOT_RUN, None)
    assert "cd(points=8)" in found.why


def test_the_teacher_has_one_value_for_all_seeds(tmp_path):
    found = decide(tmp_path, {"cd": [0.9 + e for e in NOISE], TEACHER: [0.5] * 8})
    assert (found.verdict, found.n) == (REPRODUCED, 8)
    assert found.effect.value == pytest.approx(0.4)


def test_holm_takes_back_what_one_test_alone_would_say():
    claim = Claim("a claim", "cd", "teacher", "in-mode")
    one = Decision("cd", 1, claim, "mixture2d@1", UNDECIDED, 8, Interval(0.1, 0.01, 0.19, 8), 0.03, None)
    many = [one, *[dataclasses.replace(one, number=k, p=0.9) for k in (2, 3, 4)]]
    assert corrected([one])[0].verdict == REPRODUCED
    assert corrected(many)[0].verdict == UNDECIDED
    assert corrected(many)[0].p_adjusted == pytest.approx(0.12)


def test_methods_to_ask():
    assert list(methods_with_claims("cd")) == ["cd"]
    assert set(methods_with_claims()) == set(discover())
