"""A mixture of known truth: what is right scores right, and each fault moves its own score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distillbench.errors import UsageError
from distillbench.metrics import mixture

CLASSES, MODES, N = 3, 4, 12_000


def _truth() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    angles = 2 * np.pi * np.arange(CLASSES * MODES) / (CLASSES * MODES)
    radii = np.where(np.arange(CLASSES * MODES) % 2, 6.0, 10.0)
    means = (radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)).reshape(CLASSES, MODES, 2)
    roots = 0.3 * np.eye(2) + 0.1 * generator.standard_normal((CLASSES, MODES, 2, 2))
    return means, roots @ roots.swapaxes(-1, -2) + 0.02 * np.eye(2), np.tile([0.4, 0.3, 0.2, 0.1], (CLASSES, 1))


MEANS, COVARIANCES, WEIGHTS = _truth()


def draw(seed: int, weights: np.ndarray = WEIGHTS, width: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(CLASSES, size=N)
    modes = np.array([generator.choice(MODES, p=weights[label]) for label in labels])
    noise = np.einsum("nij,nj->ni", np.linalg.cholesky(COVARIANCES)[labels, modes], generator.standard_normal((N, 2)))
    return MEANS[labels, modes] + width * noise + shift, labels


def scores(samples: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    problem = (samples, labels, MEANS, COVARIANCES, WEIGHTS)
    names = ("in_mode_rate", "mode_mass_tv", "coverage", "within_mode_w2", "class_accuracy")
    return {name: getattr(mixture, name)(*problem) for name in names}


TRUTH = scores(*draw(1))


def test_truth_scores_as_truth() -> None:
    assert TRUTH["in_mode_rate"] == pytest.approx(0.99, abs=3 * np.sqrt(0.99 * 0.01 / N))
    assert TRUTH["mode_mass_tv"] < 0.02
    assert TRUTH["coverage"] == 1.0
    assert TRUTH["within_mode_w2"] < 0.08
    assert TRUTH["class_accuracy"] > 0.999


def moved(faulty: dict[str, float]) -> set[str]:
    slack = {"in_mode_rate": 0.004, "mode_mass_tv": 0.02, "coverage": 0.01, "within_mode_w2": 0.04, "class_accuracy": 0.002}
    return {name for name, value in faulty.items() if abs(value - TRUTH[name]) > slack[name]}


def test_a_dropped_mode_moves_mass_and_coverage() -> None:
    weights = np.tile([0.5, 0.3, 0.2, 0.0], (CLASSES, 1))
    faulty = scores(*draw(2, weights))
    assert moved(faulty) == {"mode_mass_tv", "coverage"}
    assert faulty["coverage"] == 0.75
    assert faulty["mode_mass_tv"] == pytest.approx(0.1, abs=0.02)


def test_wrong_proportions_move_mass_alone() -> None:
    faulty = scores(*draw(3, np.full((CLASSES, MODES), 0.25)))
    assert moved(faulty) == {"mode_mass_tv"}
    assert faulty["mode_mass_tv"] == pytest.approx(0.2, abs=0.02)


def test_a_collapse_within_modes_moves_their_shape() -> None:
    faulty = scores(*draw(4, width=0.5))
    assert moved(faulty) == {"within_mode_w2", "in_mode_rate"}
    assert faulty["in_mode_rate"] == 1.0
    assert faulty["within_mode_w2"] == pytest.approx(0.5, abs=0.03)


def test_widening_moves_shape_and_rate() -> None:
    faulty = scores(*draw(5, width=1.5))
    assert moved(faulty) == {"within_mode_w2", "in_mode_rate"}
    # Inside the 99 % ellipse of a two-dimensional Gaussian 1.5 times as wide: 1 - 0.01^(1 / 1.5^2).
    assert faulty["in_mode_rate"] == pytest.approx(1 - 0.01 ** (1 / 2.25), abs=0.01)
    assert faulty["within_mode_w2"] == pytest.approx(0.5, abs=0.04)


def test_ignored_labels_show_in_the_class() -> None:
    samples, labels = draw(6)
    wrong = (labels + 1) % CLASSES
    assert mixture.class_accuracy(samples, wrong, MEANS, COVARIANCES, WEIGHTS) < 0.001
    assert mixture.in_mode_rate(samples, wrong, MEANS, COVARIANCES, WEIGHTS) < 0.01
    shuffled = np.random.default_rng(7).permutation(labels)
    assert mixture.class_accuracy(samples, shuffled, MEANS, COVARIANCES, WEIGHTS) == pytest.approx(1 / CLASSES, abs=0.02)


def test_assignments_by_distance_and_by_posterior() -> None:
    means = np.array([[[0.0, 0.0], [4.0, 0.0]]])
    covariances = np.stack([np.eye(2), 9 * np.eye(2)])[None]
    weights = np.array([[0.999, 0.001]])
    samples, labels = np.array([[0.2, 0.0], [1.5, 0.0], [4.0, 0.0]]), np.zeros(3)
    squares = mixture.mahalanobis2(samples, labels, means, covariances, weights)
    assert squares == pytest.approx(np.array([[0.04, 3.8**2 / 9], [2.25, 2.5**2 / 9], [16.0, 0.0]]))
    assert mixture.nearest_mode(samples, labels, means, covariances, weights).tolist() == [0, 1, 1]
    # At 4 the wide mode has odds 0.001/9 against 0.999 exp(-8) = 0.00034: still the narrow one.
    assert mixture.responsible_mode(samples, labels, means, covariances, weights).tolist() == [0, 0, 0]


def test_the_class_posterior_uses_densities_and_priors() -> None:
    means = np.array([[[0.0, 0.0]], [[2.0, 0.0]]])
    covariances, weights = np.tile(np.eye(2), (2, 1, 1, 1)), np.ones((2, 1))
    samples, labels = np.array([[0.9, 0.0], [1.1, 0.0]]), [0, 1]
    assert mixture.class_accuracy(samples, labels, means, covariances, weights) == 1.0
    # The boundary moves to 1 + ln(9)/2 = 2.1 under priors 0.9 and 0.1.
    assert mixture.class_accuracy(samples, labels, means, covariances, weights, [0.9, 0.1]) == 0.5
    with pytest.raises(UsageError, match="sum to 1"):
        mixture.class_accuracy(samples, labels, means, covariances, weights, [0.9, 0.2])


def test_absent_modes_are_no_modes() -> None:
    samples, labels = draw(8)
    padded = (
        np.concatenate([MEANS, np.zeros((CLASSES, 1, 2))], 1),
        np.concatenate([COVARIANCES, 100 * np.tile(np.eye(2), (CLASSES, 1, 1, 1))], 1),
        np.concatenate([WEIGHTS, np.zeros((CLASSES, 1))], 1),
    )
    for name, value in scores(samples, labels).items():
        assert getattr(mixture, name)(samples, labels, *padded) == pytest.approx(value, rel=1e-12), name


def test_tensors_are_taken_and_wrong_shapes_named() -> None:
    samples, labels = draw(9)
    as_tensors = (torch.tensor(samples), torch.tensor(labels), torch.tensor(MEANS), torch.tensor(COVARIANCES), torch.tensor(WEIGHTS))
    assert mixture.in_mode_rate(*as_tensors) == scores(samples, labels)["in_mode_rate"]
    with pytest.raises(UsageError, match="need means"):
        mixture.in_mode_rate(samples, labels, MEANS[0], COVARIANCES, WEIGHTS)
    with pytest.raises(UsageError, match=r"labels must lie in 0\.\.2"):
        mixture.in_mode_rate(samples, labels + 1, MEANS, COVARIANCES, WEIGHTS)
    with pytest.raises(UsageError, match="shape"):
        mixture.in_mode_rate(samples, labels[:-1], MEANS, COVARIANCES, WEIGHTS)
    with pytest.raises(UsageError, match="sum to 1"):
        mixture.in_mode_rate(samples, labels, MEANS, COVARIANCES, 2 * WEIGHTS)
