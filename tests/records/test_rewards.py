"""A network that served as a reward in training scores nothing of that run."""

from __future__ import annotations

import dataclasses

import pytest

import distillbench
import method_files
from distillbench.info import MethodInfo
from distillbench.tracks import get_track


@pytest.fixture
def judged(monkeypatch):
    """mixture2d as if a network called `judge` took its `class-acc`."""
    track = type(get_track("mixture2d"))
    score = track.score

    def taken(self, x):
        found = score(self, x)
        return [dataclasses.replace(s, identity={**s.identity, "extractor": "judge"}) if s.name == "class-acc" else s for s in found]

    monkeypatch.setattr(track, "score", taken)


@pytest.mark.parametrize("rewards", [(), ("judge",), ("another",)])
def test_a_reward_is_no_judge(tmp_path, few_samples, judged, rewards):
    file = method_files.write(tmp_path / "tiny.py", ("steps=(1, 2),", f"steps=(1, 2), rewards={rewards!r},"))
    record = distillbench.run(str(file), track="mixture2d", budget="2steps", store=tmp_path / "store")
    for scores in record.scores.values():
        by_name = {score["name"]: score for score in scores}
        assert by_name["in-mode"]["value"] is not None
        if "judge" in rewards:
            assert (by_name["class-acc"]["value"], by_name["class-acc"]["low"]) == (None, None)
            assert by_name["class-acc"]["note"] == "not run: judge was a reward in training"
        else:
            assert by_name["class-acc"]["value"] is not None


def test_rewards_are_named_in_a_tuple():
    facts = {"id": "m", "version": 1, "title": "", "paper": "", "year": 2026, "family": "", "domain": ("diffusion",), "needs": (),
             "data_access": "none", "steps": (1,)}  # fmt: skip
    with pytest.raises(ValueError, match=r'm: rewards is a tuple of names, as in \("clip-shapes",\), not \'clip-shapes\''):
        MethodInfo(**facts, rewards="clip-shapes")
