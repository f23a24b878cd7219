"""What reflow is for, shown by a short training: straighter paths, a lower transport cost, the same law of each class."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from distillbench.budget import Budget
from distillbench.config import make_config
from distillbench.data.mixture import MixtureSource, standard_mixture
from distillbench.diffusion import heun, time_grid
from distillbench.diffusion.schedules import Flow
from distillbench.parts.rectified_flow import straightness, transport_cost
from distillbench.randomness import generator_for
from distillbench.tracks import get_track
from distillbench.training.short import short_run
from distillbench_methods.instaflow import InstaFlow

SOURCE = MixtureSource(standard_mixture())


@cache
def reflowed() -> tuple[InstaFlow, dict[str, Tensor]]:
    """A short reflow of the track's teacher, with points: noise, the teacher's ends, the 2-flow's ends, and data."""
    track = get_track("mixture2d")
    config = make_config(InstaFlow.Config, "instaflow", {"distill": False, "lr": 1e-3, "pair_share": 0.2, "decay": "cosine"})
    method = short_run(InstaFlow, config, track, (1, 2, 4), budget=Budget("test", 250, "steps")).method
    assert isinstance(method, InstaFlow)
    data, conditions = SOURCE.draw(1024, generator_for(0, "data", 0))
    other, _ = SOURCE.mixture.sample(1024, generator_for(1, "data", 0), conditions.field("label"))
    noise = torch.randn(1024, 2, generator=generator_for(0, "noise", 0))
    with torch.no_grad():
        ends = {name: heun(d, noise, conditions, time_grid(Flow(), 40))
                for name, d in (("first", method.teacher), ("second", method.flow_average))}  # fmt: skip
    bends = {f"{name} bend": straightness(d, noise, conditions, steps=40)
             for name, d in (("first", method.teacher), ("second", method.flow_average))}  # fmt: skip
    return method, {"noise": noise, "data": data, "other": other.float(), "label": conditions.field("label"), **ends, **bends}


def test_reflow_straightens_a_trained_flow() -> None:
    _, points = reflowed()
    assert points["second bend"] < 0.2 * points["first bend"]


def test_reflow_lowers_the_transport_cost_and_keeps_the_marginal_of_each_class() -> None:
    _, points = reflowed()
    independent, first, second = (transport_cost(points["noise"], points[name]) for name in ("data", "first", "second"))
    assert second < 1.02 * first < 0.7 * independent
    far = class_distance(points, "noise")
    assert class_distance(points, "second") < 0.03 * far
    assert class_distance(points, "other") < 0.03 * far  # what the sizes of the samples allow


def class_distance(points: dict[str, Tensor], name: str) -> float:
    """The energy distance to the data within a class, 2 E|a - b| - E|a - a'| - E|b - b'|, averaged over the classes."""
    distances = []
    for label in range(SOURCE.mixture.classes):
        a, b = (points[key][points["label"] == label] for key in (name, "data"))
        within = sum(torch.cdist(y, y).sum() / (len(y) * (len(y) - 1)) for y in (a, b))
        distances.append(abs(float(2 * torch.cdist(a, b).mean() - within)))
    return sum(distances) / len(distances)
