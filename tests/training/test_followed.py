"""A training that is scored on its way is the same training, and is scored where it was asked to be."""

from __future__ import annotations

import torch

from distillbench.budget import Budget
from distillbench.tracks import get_track
from distillbench.training.followed import followed
from distillbench_methods.diff_instruct import DiffInstruct

BUDGET = Budget("toy", 12, "steps")


def weights(method) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in method.student.parameters()])


def test_looking_changes_nothing() -> None:
    track = get_track("mixture2d")
    watched, looks = followed(DiffInstruct, DiffInstruct.Config(), track, BUDGET, (0, 0.5, 1))
    alone, last = followed(DiffInstruct, DiffInstruct.Config(), track, BUDGET, ())
    assert torch.equal(weights(watched), weights(alone))
    assert looks[-1] == last[-1]
    assert looks[0].passes == 0
    assert looks[1].passes == looks[2].passes / 2
    assert looks[0].scores != looks[1].scores != looks[2].scores
    assert {"sliced-w2", "coverage"} <= looks[0].scores.keys()


def test_a_start_can_be_prepared() -> None:
    def zero(method) -> None:
        for network in (method.student, method.average):
            for parameter in network.parameters():
                parameter.data.zero_()

    track = get_track("mixture2d")
    _, looks = followed(DiffInstruct, DiffInstruct.Config(), track, BUDGET, (0,), prepare=zero)
    _, plain = followed(DiffInstruct, DiffInstruct.Config(), track, BUDGET, (0,))
    assert len(looks) == 2
    assert looks[0].scores["sliced-w2"] != plain[0].scores["sliced-w2"]
