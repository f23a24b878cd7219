"""Shared toys: a tiny teacher, endless data, and methods small enough to read."""

from __future__ import annotations

import pytest
import torch

from toys import ToySource, toy_teacher

torch.set_num_threads(1)


@pytest.fixture
def teacher():
    return toy_teacher()


@pytest.fixture
def source():
    return ToySource()
