"""The store of pairs: what was appended is drawn, together and from its own round, also after a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distillbench.api import Batch, Conditions
from distillbench.errors import BadFileError, ContractError
from distillbench.parts.pairs import PairStore
from distillbench.randomness import generator_for
from distillbench.training.costs import Counting

SOURCE: Any = None


def batch(size: int, count: int = 0) -> Batch:
    return Batch(size=size, count=count, progress=0.0, source=SOURCE, generator=generator_for(0, "t", count))


def labels(values: Tensor) -> Conditions:
    return Conditions({"label": values % 4}, {"label": 4})


def fill(store: PairStore, first: int, n: int, round: int = 0) -> None:
    """Pairs numbered from `first`: noise i, sample 10 i, label i mod 4."""
    i = torch.arange(first, first + n)
    noise = i[:, None].double().expand(n, 2)
    store.append(noise, 10 * noise, labels(i), round=round)


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> PairStore:
    return PairStore(tmp_path / "pairs" if request.param == "folder" else None, rounds=2)


def test_a_noise_its_sample_and_its_condition_stay_together(store: PairStore) -> None:
    fill(store, 0, 5)
    fill(store, 5, 3)
    noise, x, conditions = store.draw(batch(400))
    assert noise.shape == x.shape == (400, 2)
    assert torch.equal(x, 10 * noise)
    assert torch.equal(conditions.field("label"), noise[:, 0].long() % 4)
    assert conditions.null().field("label").tolist() == [4] * 400
    assert sorted(set(noise[:, 0].tolist())) == list(range(8))


def test_pairs_are_drawn_uniformly_from_all_shards(store: PairStore) -> None:
    fill(store, 0, 1)
    fill(store, 1, 9)
    often = torch.bincount(store.draw(batch(20_000))[0][:, 0].long(), minlength=10)
    assert ((often - 2000).abs() < 5 * 42.5).all()  # five standard deviations of a binomial count


def test_rounds_are_kept_apart_and_pairs_may_come_between_draws(store: PairStore) -> None:
    fill(store, 0, 4)
    assert store.draw(batch(50))[0].max() <= 3
    fill(store, 100, 4, round=1)
    fill(store, 4, 4)
    assert (store.count(0), store.count(1)) == (8, 4)
    assert store.draw(batch(50), round=1)[0].min() >= 100
    assert set(store.draw(batch(200))[0][:, 0].tolist()) == set(map(float, range(8)))


def test_a_resumed_store_draws_what_the_unbroken_one_does(tmp_path: Path) -> None:
    whole, broken = PairStore(tmp_path / "whole"), PairStore(tmp_path / "broken")
    for each in (whole, broken):
        fill(each, 0, 3)
        fill(each, 3, 3)
    saved = broken.state_dict()
    fill(broken, 900, 3)  # after the checkpoint; its turn runs again and writes something else here, so that it would show
    broken.draw(batch(4))
    resumed = PairStore(tmp_path / "broken")
    for each in (resumed, broken):  # in a new process, and in the same object
        each.load_state_dict(saved)
        assert each.count() == 6
        fill(each, 6, 3)
        for count in range(3):
            mine, theirs = (s.draw(batch(64, count)) for s in (each, whole_with_nine(whole)))
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])
            assert torch.equal(mine[2].field("label"), theirs[2].field("label"))


def whole_with_nine(store: PairStore) -> PairStore:
    if store.count() == 6:
        fill(store, 6, 3)
    return store


def test_conditions_without_fields_are_kept_too(store: PairStore) -> None:
    store.append(torch.zeros(3, 2), torch.ones(3, 2), Conditions.none(3))
    assert len(store.draw(batch(7))[2]) == 7


def test_drawing_costs_no_budget(store: PairStore) -> None:
    fill(store, 0, 4)
    with Counting() as counting:
        store.draw(batch(64))
    assert counting.macs.total == 0


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    store = PairStore(None)
    with pytest.raises(ContractError, match="holds no pairs yet"):
        store.draw(batch(2))
    with pytest.raises(ContractError, match="2 noises, 3 samples and 2 conditions"):
        store.append(torch.zeros(2, 2), torch.zeros(3, 2), Conditions.none(2))
    with pytest.raises(ContractError, match="'prompt' is a list"):
        store.append(torch.zeros(1, 2), torch.zeros(1, 2), Conditions({"prompt": ["a"]}))
    store.load_state_dict({"rounds": [[2, 8]]})
    with pytest.raises(ContractError, match="gone with their process"):
        store.draw(batch(2))
    kept = PairStore(tmp_path)
    fill(kept, 0, 4)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"")
    kept.load_state_dict(kept.state_dict())
    with pytest.raises(BadFileError, match="cannot be read"):
        kept.draw(batch(2))
