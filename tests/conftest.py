"""Shared toys: a tiny teacher, endless data, methods small enough to read; the command line, called inside this process."""

from __future__ import annotations

import sys
from collections import namedtuple

import pytest
import torch

from distillbench import cli, tracks
from distillbench.torchvision_repair import repair_torchvision
from distillbench.tracks import mixture2d
from toys import ToySource, toy_teacher

torch.set_num_threads(1)
repair_torchvision()  # before any test module imports a package that wants torchvision

Call = namedtuple("Call", "status out err")


@pytest.fixture
def fresh_tracks():
    """Tracks are made once a process; this test makes its own, and leaves none behind."""
    tracks._made.cache_clear()
    yield
    tracks._made.cache_clear()


@pytest.fixture
def distillbench(monkeypatch, capsys, tmp_path):
    """distillbench("list", "tracks") -> status, out, err. The store is a folder of the test's own, and so is the working directory."""
    monkeypatch.setenv("DISTILLBENCH_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)

    def call(*args: object) -> Call:
        monkeypatch.setattr(sys, "argv", ["distillbench", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        return Call(leaving.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def few_samples(monkeypatch):
    """mixture2d on 512 samples instead of 8,192, for what runs in this process."""

    def forget():
        mixture2d._metrics.cache_clear()
        mixture2d._teacher_samples.cache_clear()

    forget()
    with monkeypatch.context() as patch:
        patch.setattr(mixture2d, "PER_CLASS", 64)
        patch.setattr(mixture2d, "N", 64 * mixture2d.CLASSES)
        patch.setattr(mixture2d.Mixture2D, "evaluations", 64 * mixture2d.CLASSES)
        yield
    forget()


@pytest.fixture
def teacher():
    return toy_teacher()


@pytest.fixture
def source():
    return ToySource()
