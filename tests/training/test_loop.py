"""The loop: what moves, how often, by which rate, and what happens when something goes wrong."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distillbench.api import Ema, OptimizerConfig, Stage, Turn
from distillbench.budget import Budget, parse_budget
from distillbench.errors import BadFileError, ContractError, NonFiniteError, UsageError
from distillbench.training import checkpoint
from distillbench.training.loop import Interrupted
from distillbench.training.optimizers import rate_factor
from distillbench.training.state import tensors_of
from toys import Toy, toy_loop

HERE = Path(__file__).parent.parent


def bits(loop) -> dict:
    return {name: tensor.clone() for name, tensor in tensors_of(loop.method).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_counts_and_progress(tmp_path):
    loop = toy_loop(folder=tmp_path)
    spent = loop.train()
    assert spent.cycles == 20
    counts = loop.position.counts
    assert (counts["pairs"], counts["regress"], counts["fool"], counts["judge"]) == (10, 10, 10, 20)
    assert loop.method.seen == 160
    assert len(loop.method.pairs) == 10
    assert spent.updates == 40
    assert {entry["turn"] for entry in loop.position.losses} == {"regress", "fool", "judge"}


def test_only_the_networks_of_a_turn_move():
    class Check(Toy):
        def fool(self, batch):
            assert all(p.requires_grad for p in self.student.parameters())
            assert not any(p.requires_grad for p in [*self.critic.parameters(), *self.teacher.parameters(), *self.average.parameters()])
            return super().fool(batch)

        def judge(self, batch):
            assert not any(p.requires_grad for p in self.student.parameters())
            assert all(p.requires_grad for p in self.critic.parameters())
            return super().judge(batch)

    loop = toy_loop(Check)
    before = copy.deepcopy(loop.method.teacher.state_dict())
    loop.train()
    assert same(before, loop.method.teacher.state_dict())


def test_accumulation_gives_the_gradient_of_the_mean():
    """With one batch in four parts, the update is that of the mean of the four losses."""

    class One(Toy):
        def stages(self):
            optimizer = {"student": OptimizerConfig(lr=1.0, name="sgd", betas=(0.0, 0.0))}
            return [Stage("one", 1.0, [Turn("one", self.one, {"student": self.student}, 1, optimizer, accumulate=self.config.accumulate)])]

        def one(self, batch):
            self.sizes.append(batch.size)
            weight = next(self.student.parameters())
            return (weight * batch.randn(1)).sum()

    loop = toy_loop(One, config=Toy.Config(accumulate=4), budget=Budget("one", 1, "steps"))
    loop.method.__class__.sizes = []
    before = next(loop.method.student.parameters()).clone()
    loop.train()
    from distillbench.randomness import generator_for

    mean = sum(torch.randn(1, generator=generator_for(0, "turn/one", part)) for part in range(4)) / 4
    assert torch.allclose(before - next(loop.method.student.parameters()), mean.expand_as(before), atol=1e-6)
    assert set(loop.method.sizes) == {4}


def test_average_has_the_half_life_that_it_says():
    class Mean(Toy):
        def stages(self):
            optimizer = {"student": OptimizerConfig(lr=1.0, name="sgd", betas=(0.0, 0.0))}
            turn = Turn("one", self.one, {"student": self.student}, 1, optimizer)
            return [Stage("one", 1.0, [turn], ema={"average": Ema("student", 5.0)})]

        def one(self, batch):
            return next(self.student.parameters()).sum() * 0.0 + sum(p.sum() for p in self.student.parameters()) * (batch.count == 0)

    loop = toy_loop(Mean, budget=Budget("b", 11, "steps"))
    start = next(loop.method.average.parameters()).clone()
    loop.train()
    moved = (next(loop.method.average.parameters()) - start).mean().item()  # the student jumped by -1 at its first update
    assert moved == pytest.approx(-(1 - 0.5 ** (11 / 5)), abs=1e-5)


def test_rates_are_functions_of_progress():
    config = OptimizerConfig(lr=1.0, warmup=0.1, decay="linear", decay_from=0.5)
    assert [rate_factor(config, p) for p in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 0.5, 0.0])
    assert rate_factor(OptimizerConfig(lr=1.0, decay="cosine"), 0.5) == pytest.approx(0.5)


def test_repeat_of_one_turn_leaves_the_noise_of_the_other_alone():
    class Seen(Toy):
        repeats = 1

        def stages(self):
            stages = super().stages()
            fool, judge = stages[1].turns
            return [Stage("game", 1.0, [fool, Turn(judge.name, judge.loss, judge.updates, self.repeats, judge.optimizer)])]

        def fool(self, batch):
            self.noise.append(batch.randn(1).item())
            return super().fool(batch)

    class More(Seen):
        repeats = 3

    heard = []
    for kind in (Seen, More):
        kind.noise = []
        toy_loop(kind, exact=True).train()
        heard.append(kind.noise)
    assert heard[0] == heard[1]


def test_bfloat16_trains():
    assert toy_loop(precision="bfloat16").train().cycles == 20


@pytest.mark.parametrize("stop", [1, 7, 10, 11, 19])
def test_resume_is_exact(stop, tmp_path):
    whole = toy_loop(folder=tmp_path / "whole", checkpoint_seconds=1e9)
    whole.train()

    class Halt(Exception):
        pass

    def halt(progress):
        if progress.spent.cycles == stop:
            raise Halt

    broken = toy_loop(folder=tmp_path / "broken", checkpoint_seconds=0.0, report=halt)
    with pytest.raises(Halt):
        broken.train()
    resumed = toy_loop(folder=tmp_path / "broken", checkpoint_seconds=0.0)
    spent = resumed.train()
    assert same(bits(whole), bits(resumed))
    assert spent.macs == whole.spent.macs
    assert resumed.position.losses == whole.position.losses
    assert len(resumed.method.pairs) == len(whole.method.pairs)


CHILD = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
from toys import toy_loop
from distillbench.budget import Budget
import torch; torch.set_num_threads(1)
loop = toy_loop(folder=Path({folder!r}), checkpoint_seconds=0.0, budget=Budget("b", 300, "steps"))
print("go", flush=True)
loop.train()
from distillbench.training.state import tensors_of
from safetensors.torch import save_file
save_file({{k: v.detach().clone() for k, v in tensors_of(loop.method).items()}}, {out!r})
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_at_random_moments(seed, tmp_path):
    """Killed in work turns, between turns and in writes, again and again: bit for bit what an unbroken run gives."""
    from safetensors.torch import load_file

    whole = toy_loop(folder=tmp_path / "whole", checkpoint_seconds=1e9, budget=Budget("b", 300, "steps"))
    whole.train()
    out = tmp_path / "out.safetensors"
    program = CHILD.format(here=str(HERE), folder=str(tmp_path / "killed"), out=str(out))
    generator = torch.Generator().manual_seed(seed)
    kills = 0
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        child.stdout.readline()
        if kills < 3:
            time.sleep(0.02 + 0.3 * float(torch.rand(1, generator=generator)))
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                kills += 1
        if child.wait() == 0:
            break
    assert kills >= 1
    assert same(bits(whole), load_file(out))


def test_ctrl_c_keeps_the_state(tmp_path):
    def interrupt(progress):
        if progress.spent.cycles == 5:
            os.kill(os.getpid(), signal.SIGINT)

    loop = toy_loop(folder=tmp_path, report=interrupt)
    with pytest.raises(Interrupted, match="goes on from here"):
        loop.train()
    resumed = toy_loop(folder=tmp_path)
    resumed.train()
    whole = toy_loop(folder=tmp_path / "whole")
    whole.train()
    assert same(bits(whole), bits(resumed))


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign", "pickle"])
def test_a_bad_checkpoint_is_set_aside_and_never_trusted(damage, tmp_path):
    toy_loop(folder=tmp_path).train()
    path = tmp_path / "checkpoint.safetensors"
    raw = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        raw[-20] ^= 1
        path.write_bytes(raw)
    elif damage == "pickle":
        torch.save({"a": torch.zeros(2)}, path)
    told = []
    options = {"run": "another"} if damage == "foreign" else {}
    loop = toy_loop(folder=tmp_path, warn=told.append, **options)
    loop.train()
    assert len(told) == 1
    assert "set aside as checkpoint.safetensors.bad-1" in told[0]
    assert (tmp_path / "checkpoint.safetensors.bad-1").exists()
    assert loop.spent.cycles == 20


def test_a_checkpoint_of_another_shape_changes_nothing(tmp_path):
    loop = toy_loop()
    before = bits(loop)
    from distillbench.training.state import restore

    wrong = {name: tensor.clone() for name, tensor in before.items()}
    wrong[list(wrong)[-1]] = torch.zeros(3, 3, 3)
    wrong[next(iter(wrong))] += 1
    with pytest.raises(BadFileError, match="does not fit"):
        restore(loop.method, wrong, {})
    assert same(before, bits(loop))


def test_a_nan_stops_the_run_with_its_name():
    class Nan(Toy):
        def fool(self, batch):
            return super().fool(batch) * (float("nan") if batch.count == 3 else 1.0)

    with pytest.raises(NonFiniteError, match=r"loss of turn 'fool' is nan at its execution 4"):
        toy_loop(Nan).train()


def test_a_turn_that_never_ends_is_stopped():
    class Stuck(Toy):
        def judge(self, batch):
            while True:
                time.sleep(0.01)

    with pytest.raises(ContractError, match=r"turn 'judge' did not finish within 0.3 s"):
        toy_loop(Stuck, turn_limit=0.3).train()


def test_mistakes_in_stages_are_named():
    class Shares(Toy):
        def stages(self):
            return super().stages()[:1]

    class NoOptimizer(Toy):
        def stages(self):
            return [Stage("s", 1.0, [Turn("t", self.fool, {"student": self.student})])]

    class Hidden(Toy):
        def build(self, context):
            super().build(context)
            self.nodes = [self.student]

    class NoLoss(Toy):
        def fool(self, batch):
            return None

    class Idle(Toy):
        def stages(self):
            return [Stage("idle", 1.0, [Turn("idle", lambda batch: None)])]

    told = {Shares: "sum to 1", NoOptimizer: "one optimizer for each", Hidden: "ModuleList", NoLoss: "returned no loss", Idle: "no network"}
    for kind, message in told.items():
        with pytest.raises(ContractError, match=message):
            toy_loop(kind).train()


def test_checkpoints_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.write(path, {"a": torch.ones(2)}, {"run": "r"})
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        checkpoint.write(path, {"a": torch.zeros(2)}, {"run": "r"})
    tensors, _ = checkpoint.read(path, "r")
    assert torch.equal(tensors["a"], torch.ones(2))


def test_shares_that_sum_to_a_little_more_than_one_do_not_buy_a_cycle():
    shares = (0.07, 1 - 0.14 - 0.29, 0.07, 0.29)
    assert sum(shares) > 1

    class Shared(Toy):
        def stages(self):
            first = super().stages()[0]
            return [dataclasses.replace(first, name=f"part {k}", share=share) for k, share in enumerate(shares)]

    loop = toy_loop(Shared, budget=Budget("twenty", 20, "steps"))
    assert loop.train().cycles == 20


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("S", 4e6, "passes"), ("5e6passes", 5e6, "passes"), ("60s", 60, "seconds"), ("2000steps", 2000, "steps"), ("2min", 120, "seconds")],
)
def test_budgets_are_read(text, amount, unit):
    budget = parse_budget(text, {"S": 4e6})
    assert (budget.amount, budget.unit) == (amount, unit)


@pytest.mark.parametrize("text", ["", "XL", "60", "-5s", "0steps", "5parsecs", "1e999s", "nan passes", "1.2.3s"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(UsageError):
        parse_budget(text, {"S": 4e6})


def test_processor_seconds_add_up_over_resumes(tmp_path, monkeypatch):
    """By a clock that advances with each reading of it: a resumed run goes on from what its checkpoint says, an old one from the wall's."""
    readings = iter(range(100, 10**6))
    monkeypatch.setattr(time, "process_time", lambda: float(next(readings)))

    def halt(progress):
        if progress.spent.cycles == 7:
            raise ZeroDivisionError

    broken = toy_loop(folder=tmp_path, checkpoint_seconds=0.0, report=halt)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    kept = checkpoint.read(tmp_path / "checkpoint.safetensors", "run")[1]["position"]["spent"]
    assert 0 < kept["processor_seconds"] < broken.spent.processor_seconds
    resumed = toy_loop(folder=tmp_path, checkpoint_seconds=0.0)
    resumed._resume()
    assert resumed.spent.processor_seconds == kept["processor_seconds"]
    before = next(readings)
    total = resumed.train().processor_seconds
    assert total == kept["processor_seconds"] + next(readings) - before - 2


def test_a_checkpoint_without_processor_seconds_goes_on_from_the_clocks(tmp_path):
    toy_loop(folder=tmp_path).train()
    path = tmp_path / "checkpoint.safetensors"
    tensors, meta = checkpoint.read(path, "run")
    del meta["position"]["spent"]["processor_seconds"]
    checkpoint.write(path, tensors, meta)
    resumed = toy_loop(folder=tmp_path)
    resumed._resume()
    assert resumed.spent.processor_seconds == resumed.spent.seconds > 0
