"""What every built-in method must show: conformance, an exact meter, and the same student whatever kills its training."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distillbench.budget import Budget
from distillbench.conformance import Kit, check_method
from distillbench.discovery import discover, find
from distillbench.tracks import get_track
from distillbench.training.costs import Counting
from distillbench.training.short import short_run

METHODS = list(discover())
STEPS = 60  # cycles of the training that is killed
KILLS = 3

pytestmark = pytest.mark.slow


def kit(name: str) -> Kit:
    found = find(name)
    return Kit(found, found.load(), get_track("mixture2d"))


@pytest.mark.parametrize("name", METHODS)
def test_conformance(name):
    results = list(check_method(name, tracks=("mixture2d",)))
    assert {result.name: result.detail for result in results if not result.passed} == {}
    assert len([result for result in results if not result.skipped]) > 9


@pytest.mark.parametrize("name", METHODS)
def test_the_meter_charges_what_was_spent(name):
    held = kit(name)
    for steps in [(n,) for n in held.info.steps[:3]] if held.info.per_step else [held.trained_for]:
        spent = []
        for exact in (False, True):
            run = short_run(held.method_class, held.config, held.track, steps, budget=Budget("test", 20, "steps"), exact=exact)
            spent.append(run.loop.spent.macs)
            assert run.loop.spent.cycles == 20
        assert spent[0] == spent[1] > 0


@pytest.mark.parametrize("track", ["mixture2d", "digits"])
@pytest.mark.parametrize("name", METHODS)
def test_the_count_agrees_with_pytorchs_where_that_sees_the_work(name, track):
    """Matrix products of a whole short training, attention unfused; the counter of PyTorch takes two operations per multiply-add."""
    found = find(name)
    held = Kit(found, found.load(), get_track(track))
    budget = Budget("test", 5 if track == "mixture2d" else 1, "steps")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as theirs, Counting() as ours:
        short_run(held.method_class, held.config, held.track, held.trained_for, budget=budget)
    assert ours.macs.matmul == pytest.approx(theirs.get_total_flops() / 2, rel=0.01)
    assert ours.macs.elementwise > 0


# Forks before it has run any network: each child trains on in `folder` and may be killed by itself, in a thread, after a delay.
TRAINING = textwrap.dedent("""
    import json, os, signal, sys, threading, time
    from pathlib import Path

    import torch

    torch.set_num_threads(1)
    from distillbench.budget import Budget
    from distillbench.training.short import short_run
    from distillbench.runner import sample_student
    from test_every_method import STEPS, kit

    name, folder, delays = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    held = kit(name)


    def train(place, delay):
        if delay is not None:
            threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
        start = time.perf_counter()
        short = short_run(held.method_class, held.config, held.track, held.trained_for, folder=place, budget=Budget("test", STEPS, "steps"))
        seconds = time.perf_counter() - start
        student = short.method.distilled()
        student.save(place / "student")
        scores = {n: [s.to_json() for s in held.track.score(sample_student(student, held.track, n).x)] for n in student.steps[:2]}
        (place / "result.json").write_text(json.dumps({"scores": scores, "macs": short.spent.macs, "seconds": seconds}))


    def child(place, delay):
        place.mkdir(exist_ok=True)
        pid = os.fork()
        if pid == 0:
            try:
                train(place, delay)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


    assert child(folder / "whole", None) == 0
    seconds = json.loads((folder / "whole" / "result.json").read_text())["seconds"]
    codes = [child(folder / "broken", share * seconds) for share in delays]
    assert child(folder / "broken", None) == 0
    print(json.dumps(codes))
""")


@pytest.mark.parametrize("name", METHODS)
def test_killed_at_any_moment_it_ends_with_the_same_student(name, tmp_path):
    shares = [random.SystemRandom().uniform(0.05, 0.6) for _ in range(KILLS)]  # of the time that the whole training takes
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, str(script), name, str(tmp_path), json.dumps(shares)], env=environment, capture_output=True,
                          text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert -9 in codes, "no kill came before the end of the training"
    whole, broken = (json.loads((tmp_path / part / "result.json").read_text()) for part in ("whole", "broken"))
    assert (whole["scores"], whole["macs"]) == (broken["scores"], broken["macs"]), f"killed after {shares} of the training"
    files = [{path.name: path.read_bytes() for path in (tmp_path / part / "student").iterdir()} for part in ("whole", "broken")]
    assert files[0] == files[1], f"killed after {shares} of the training"
