"""Each test of a `network` runs on one of every family."""

from __future__ import annotations

import pytest

from distillbench.networks import Backbone, build
from small_networks import CONFIGS, awake


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


@pytest.fixture
def network(name: str) -> Backbone:
    return awake(build(CONFIGS[name]))
