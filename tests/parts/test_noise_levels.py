"""Levels of noise: the paper's check values, their law, and that every path meets the same ratio."""

from __future__ import annotations

import math

import pytest
import torch

from distillbench.diffusion.schedules import EDM, Flow, Trig, VPLinear
from distillbench.parts.noise_levels import karras_level, lognormal_level, time_at


@pytest.mark.parametrize(("u", "level"), [(0.0, 0.002), (0.2, 0.0851), (0.5, 2.5152), (0.8, 24.408), (1.0, 80.0)])
def test_the_karras_law_has_the_papers_values(u, level):
    assert karras_level(torch.tensor([u])).item() == pytest.approx(level, rel=1e-3)


def test_the_logarithm_of_a_lognormal_level_is_normal():
    level = lognormal_level(torch.randn(100_000, generator=torch.Generator().manual_seed(0))).log()
    assert level.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert level.std().item() == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize("path", [Flow(), Flow(3.0), Trig(), VPLinear(), EDM()], ids=lambda p: p.name)
@pytest.mark.parametrize("data_std", [0.5, 1.0])
def test_every_path_meets_the_level_at_its_time(path, data_std):
    level = torch.tensor([0.01, 0.3, 2.5, 24.0], dtype=torch.float64)
    alpha, sigma = path.levels(time_at(path, level, data_std=data_std))
    torch.testing.assert_close(sigma / alpha, level * data_std / 0.5, rtol=1e-9, atol=0)


def test_a_level_that_no_path_reaches_is_its_end():
    assert time_at(EDM(), 1e9).item() == 1.0
    assert time_at(Flow(), math.inf).item() == 1.0
