"""The track `mixture2d@1`: a class-conditional Gaussian mixture in the plane whose truth is known; seconds on one core."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..api import Source
from ..conditions import Conditions
from ..data.mixture import CLASSES, Mixture, MixtureSource, standard_mixture
from ..diffusion import Denoiser, ddim, time_grid
from ..errors import UsageError
from ..metrics.arrays import Array, as_float64
from ..metrics.mixture import class_accuracy, coverage, in_mode_rate, mode_mass_tv, within_mode_w2
from ..metrics.score import Score, canonical_json, identity
from ..metrics.wasserstein import sliced_w2
from ..randomness import generator_for, sample_noise
from ..teachers.zoo import load_teacher, zoo_card
from .base import Track
from .facts import FACTS, TrackFacts

PER_CLASS = 1024
N = PER_CLASS * CLASSES
FIRST_SEED = 1_000_000
TEACHER_SEED = 2_000_000  # of the teacher's own samples: other noise than the students', so that fidelity is one of distributions
TEACHER_STEPS = 50
DIRECTIONS = 64
BLOCKS = 16  # class-balanced parts of the samples, from whose scatter most intervals come
RESAMPLES = 16  # of the bootstrap of coverage


class _Metric(NamedTuple):
    """value(samples): of samples (CLASSES, n, 2), sorted by the class asked for; n is PER_CLASS, or that of a block."""

    value: Callable[[Array], float]
    estimator: str
    higher_is_better: bool
    reference: dict[str, Any]


class Mixture2D(Track):
    """8,192 samples, 1,024 of each class, against the mixture itself; `sliced-w2` against one fixed sample of it.

    Intervals are value +- 1.96 s. The scores scatter as 1 / sqrt(n), so s is the standard deviation over 16 class-balanced blocks of
    512 samples, divided by 4; `coverage`, which does not, is bootstrapped within classes.
    """

    facts: ClassVar[TrackFacts] = FACTS["mixture2d"]
    provides: ClassVar[frozenset[str]] = frozenset({"labels", "real data"})
    shape: ClassVar[tuple[int, ...]] = (2,)
    batch_size: ClassVar[int] = 256
    evaluations: ClassVar[int] = N
    preview: ClassVar[int] = 2048

    def teacher(self) -> Denoiser:
        return _teacher()

    def source(self) -> Source:
        return MixtureSource(_mixture())

    def catalog(self) -> Conditions:
        return _mixture().conditions(torch.arange(CLASSES))

    def evaluation(self) -> tuple[Conditions, Sequence[int]]:
        return _mixture().conditions(_asked()), range(FIRST_SEED, FIRST_SEED + N)

    def score(self, x: Tensor) -> list[Score]:
        if tuple(x.shape) != (N, 2):
            raise UsageError(f"mixture2d is scored on samples of shape {(N, 2)}, made from evaluation(), not {tuple(x.shape)}")
        samples = as_float64(x, "samples").reshape(CLASSES, PER_CLASS, 2)
        return [_score(name, metric, samples) for name, metric in _metrics().items()]

    def floor(self) -> list[Score]:
        return self.score(self.truth())

    def truth(self) -> Tensor:
        return truth_sample("floor").float()


def truth_sample(purpose: str) -> Tensor:
    """A fixed sample (N, 2) of the mixture under the conditions of the evaluation, in float64; another purpose, another sample."""
    return _mixture().sample(N, generator_for(0, f"mixture2d/{purpose}", 0), _asked())[0]


@cache
def _mixture() -> Mixture:
    return standard_mixture()


@cache
def _teacher() -> Denoiser:
    return load_teacher("mixture2d")


def _asked() -> Tensor:
    """Labels (N,), sorted."""
    return torch.arange(CLASSES).repeat_interleave(PER_CLASS)


@cache
@torch.no_grad()
def _teacher_samples() -> Array:
    teacher = load_teacher("mixture2d")  # one of its own, on the processor: the track's may be anywhere
    noise = sample_noise(range(TEACHER_SEED, TEACHER_SEED + N), (2,))
    return as_float64(ddim(teacher, noise, _mixture().conditions(_asked()), time_grid(teacher.schedule, TEACHER_STEPS)))


@cache
def _metrics() -> dict[str, _Metric]:
    """The scores in the order of the board."""
    mixture = {"mixture": _mixture().sha256}
    sample = mixture | {"sample": "reference", "n": N}
    teacher = {"teacher": zoo_card("mixture2d")["sha256"], "solver": "ddim", "steps": TEACHER_STEPS, "first seed": TEACHER_SEED, "n": N}
    directions = f"{DIRECTIONS} directions, seed 0"
    return {
        "in-mode": _Metric(_by_class(in_mode_rate), "share within the 99 % ellipse of a mode of the class", True, mixture),
        "sliced-w2": _Metric(sliced_to(as_float64(truth_sample("reference"))), f"sliced W2, {directions}", False, sample),
        "mode-tv": _Metric(_by_class(mode_mass_tv), "total variation of mode masses by posterior, mean over classes", False, mixture),
        "within-w2": _Metric(_by_class(within_mode_w2), "sliced W2 to N(0, 1) of whitened modes, 32 directions, seed 0", False, mixture),
        "coverage": _Metric(_by_class(coverage), "share of modes with a quarter of their mass in their ellipse", True, mixture),
        "class-acc": _Metric(_class_accuracy, "agreement with the exact posterior under equal priors", True, mixture),
        "fidelity-w2": _Metric(sliced_to(_teacher_samples()), f"sliced W2, {directions}", False, teacher),
    }


def _score(name: str, metric: _Metric, samples: Array) -> Score:
    what = identity(
        f"{name}/mixture2d",
        estimator=metric.estimator,
        n_generated=N,
        n_reference=metric.reference.get("n"),
        reference_sha256=hashlib.sha256(canonical_json(metric.reference).encode()).hexdigest(),
        prompts_sha256=hashlib.sha256(_asked().numpy().astype("<i8").tobytes()).hexdigest(),
        seeds=range(FIRST_SEED, FIRST_SEED + N),
    )
    score = Score(name, what, metric.value(samples), None, None, N, metric.higher_is_better)
    return score.with_interval(_resampled(metric, samples) if name == "coverage" else _scatter(metric, samples))


def _scatter(metric: _Metric, samples: Array) -> float:
    blocks = [metric.value(block) for block in np.split(samples, BLOCKS, axis=1)]
    return float(np.std(blocks, ddof=1)) / BLOCKS**0.5


def _resampled(metric: _Metric, samples: Array) -> float:
    generator = np.random.default_rng(0)
    drawn = (generator.integers(PER_CLASS, size=(CLASSES, PER_CLASS, 1)) for _ in range(RESAMPLES))
    return float(np.std([metric.value(np.take_along_axis(samples, rows, axis=1)) for rows in drawn], ddof=1))


def _by_class(metric: Callable[..., float]) -> Callable[[Array], float]:
    """The mean over the classes. They have equally many samples and modes, so it is the score itself, for an eighth of the work."""
    modes = [tuple(value[c : c + 1] for value in _parameters()) for c in range(CLASSES)]

    def value(samples: Array) -> float:
        zeros = np.zeros(samples.shape[1])
        return float(np.mean([metric(own, zeros, *parameters) for own, parameters in zip(samples, modes, strict=True)]))

    return value


def _class_accuracy(samples: Array) -> float:
    return class_accuracy(samples.reshape(-1, 2), np.repeat(np.arange(CLASSES), samples.shape[1]), *_parameters())


def sliced_to(reference: Array) -> Callable[[Array], float]:
    """Against as many points of the reference (N, 2), equally many of each class."""
    by_class = reference.reshape(CLASSES, PER_CLASS, 2)

    def value(samples: Array) -> float:
        points = by_class[:, : samples.shape[1]]
        return sliced_w2(samples.reshape(-1, 2), points.reshape(-1, 2), projections=DIRECTIONS, seed=0)

    return value


def _parameters() -> tuple[Array, Array, Array]:
    mixture = _mixture()
    return mixture.means.numpy(), mixture.covariances.numpy(), mixture.weights.numpy()
