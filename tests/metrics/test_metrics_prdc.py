from __future__ import annotations

import numpy as np
import pytest

from distillbench.errors import UsageError
from distillbench.metrics.prdc import prdc


def brute(generated: np.ndarray, reference: np.ndarray, k: int, dense_k: int) -> tuple[float, float, float, float]:
    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.sqrt(np.sum((x - y) ** 2)))

    def radius(rows: np.ndarray, i: int, neighbours: int) -> float:
        return sorted(distance(rows[i], rows[j]) for j in range(len(rows)) if j != i)[neighbours - 1]

    n, m = len(generated), len(reference)
    gap = [[distance(r, g) for g in generated] for r in reference]
    own, narrow, wide = (
        [radius(generated, i, k) for i in range(n)],
        [radius(reference, j, k) for j in range(m)],
        [radius(reference, j, dense_k) for j in range(m)],
    )
    precision = sum(any(gap[j][i] <= narrow[j] for j in range(m)) for i in range(n)) / n
    recall = sum(any(gap[j][i] <= own[i] for i in range(n)) for j in range(m)) / m
    density = sum(gap[j][i] < wide[j] for i in range(n) for j in range(m)) / (dense_k * n)
    covered = sum(any(gap[j][i] < wide[j] for i in range(n)) for j in range(m)) / m
    return precision, recall, density, covered


@pytest.mark.parametrize("block", [7, 50, 1024])
@pytest.mark.parametrize(("k", "dense_k"), [(3, 5), (5, 2), (1, 1)])
def test_equals_brute_force(block: int, k: int, dense_k: int) -> None:
    generator = np.random.default_rng(0)
    generated, reference = 0.8 * generator.standard_normal((50, 4)) + 0.6, generator.standard_normal((43, 4))
    assert prdc(generated, reference, neighbours=k, density_neighbours=dense_k, block=block) == pytest.approx(
        brute(generated, reference, k, dense_k), abs=1e-12
    )


def test_a_collapse_keeps_precision_and_loses_recall() -> None:
    generator = np.random.default_rng(1)
    reference = np.concatenate([generator.standard_normal((200, 3)) - 9, generator.standard_normal((200, 3)) + 9])
    fresh = np.concatenate([generator.standard_normal((200, 3)) - 9, generator.standard_normal((200, 3)) + 9])
    one_mode = generator.standard_normal((400, 3)) + 9
    good, dropped, far = prdc(fresh, reference), prdc(one_mode, reference), prdc(reference + 100, reference)
    assert min(good.precision, good.recall, good.coverage) > 0.8
    assert dropped.precision > 0.8
    assert dropped.recall < 0.55
    assert dropped.coverage < 0.55
    assert far == (0.0, 0.0, 0.0, 0.0)


def test_density_expects_one() -> None:
    generator = np.random.default_rng(2)
    values = [prdc(generator.standard_normal((300, 2)), generator.standard_normal((300, 2))).density for _ in range(20)]
    assert np.mean(values) == pytest.approx(1.0, abs=3 * np.std(values) / np.sqrt(20))


def test_copies_of_one_sample_recall_nothing() -> None:
    reference = np.random.default_rng(3).standard_normal((30, 2))
    assert prdc(np.tile(reference[:1], (30, 1)), reference).recall <= 1 / 30


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="too few for 5"):
        prdc(np.eye(9), np.eye(9)[:5])
