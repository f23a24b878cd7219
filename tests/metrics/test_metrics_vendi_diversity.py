from __future__ import annotations

import numpy as np
import pytest

from distillbench.errors import UsageError
from distillbench.metrics.diversity import group_diversity, nearest_distance
from distillbench.metrics.vendi import vendi


def test_vendi_counts_different_samples() -> None:
    assert vendi(3 * np.eye(12)) == pytest.approx(12, rel=1e-12)
    assert vendi(np.repeat(np.eye(5), 7, axis=0)) == pytest.approx(5, rel=1e-12)
    assert vendi(np.ones((9, 4))) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(20, 50), (50, 20)])
def test_vendi_equals_the_entropy_of_the_similarity_matrix(n: int, d: int) -> None:
    rows = np.random.default_rng(0).standard_normal((n, d))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / n)
    values = values[values > 1e-12]
    assert vendi(rows) == pytest.approx(np.exp(-np.sum(values * np.log(values))), rel=1e-9)


def test_vendi_refuses_a_zero_row() -> None:
    with pytest.raises(UsageError, match="1 feature rows"):
        vendi(np.array([[0.0, 0.0], [1.0, 0.0]]))


def test_group_diversity_is_the_mean_over_groups_of_pairs() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    groups = np.array([7, 7, 7, 2, 2])
    assert group_diversity(rows, groups) == pytest.approx((2 / 3 + 0) / 2)
    assert group_diversity(rows, groups, distance="euclidean") == pytest.approx((2 * np.sqrt(2) / 3 + 0) / 2)
    assert group_diversity(5 * rows, groups) == pytest.approx(group_diversity(rows, groups))


def test_group_diversity_needs_pairs() -> None:
    with pytest.raises(UsageError, match="group 1 has one sample"):
        group_diversity(np.eye(3), [0, 0, 1])
    with pytest.raises(UsageError, match="no direction"):
        group_diversity(np.zeros((4, 2)), [0, 0, 1, 1])


@pytest.mark.parametrize("block", [3, 1024])
def test_nearest_distance_by_hand(block: int) -> None:
    reference = np.array([[0.0, 0.0], [10.0, 0.0], [10.0, 1.0]])
    samples = np.array([[0.0, 3.0], [10.0, -4.0], [10.0, 1.5], [0.0, 0.0]])
    found = nearest_distance(samples, reference, block=block)
    # Nearest: row 0 at 3 (own neighbour at 10), row 1 at 4 (own at 1), row 2 at 0.5 (own at 1), row 0 at 0.
    assert found == pytest.approx((1.75, 0.0, 0.75))


def test_copies_stand_out_from_fresh_samples() -> None:
    generator = np.random.default_rng(1)
    training, fresh = generator.uniform(size=(4000, 2)), generator.uniform(size=(4000, 2))
    # The chance that a point is the nearest of its nearest, in the plane: 6 pi / (8 pi + 3 sqrt 3) (Pickard 1982).
    assert nearest_distance(fresh, training).copied == pytest.approx(6 * np.pi / (8 * np.pi + 3 * np.sqrt(3)), abs=0.03)
    copied = nearest_distance(training + 1e-6, training)
    assert copied.copied > 0.999
    assert copied.median == pytest.approx(np.sqrt(2) * 1e-6, rel=1e-4)
