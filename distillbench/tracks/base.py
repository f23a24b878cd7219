"""What a track is: a teacher, data, conditions, an evaluation and budgets, under one versioned name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..api import Samples, Source, Student
from ..conditions import Conditions
from ..diffusion.solvers import SOLVERS, time_grid
from ..info import MethodInfo
from ..metrics.score import Score
from ..randomness import sample_noise
from .facts import TrackFacts

if TYPE_CHECKING:
    from ..diffusion.denoiser import Denoiser


class Track(ABC):
    """One row of the table of tracks. A change that moves a number bumps the version in `facts.id`."""

    facts: ClassVar[TrackFacts]
    domain: ClassVar[str] = "diffusion"
    provides: ClassVar[frozenset[str]]  # of `info.NEEDS`, what the data and conditions offer; the network adds its capabilities
    shape: ClassVar[tuple[int, ...]]  # of one sample
    batch_size: ClassVar[int]  # of a training turn that names none
    evaluations: ClassVar[int]  # samples that a score is made of
    guidance: ClassVar[float] = 1.0  # scale under which the teacher is sampled and compared
    preview: ClassVar[int] = 100  # samples kept of each row for pictures
    at_once: ClassVar[int] = 1024  # samples generated at a time
    reference_steps: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 50)

    @property
    def id(self) -> str:
        return self.facts.id

    def checksums(self) -> dict[str, str]:
        """Of the user's files that determine a result, name -> sha256; a track that ships its own has none."""
        return {}

    @abstractmethod
    def teacher(self) -> Denoiser:
        """The shipped teacher: frozen, marked external, loaded once a process."""

    @abstractmethod
    def source(self) -> Source:
        """Training examples and conditions."""

    @abstractmethod
    def catalog(self) -> Conditions:
        """Every distinct condition once."""

    @abstractmethod
    def evaluation(self) -> tuple[Conditions, Sequence[int]]:
        """The conditions and seeds that every method and the teacher are scored on; `evaluations` of them."""

    @abstractmethod
    def score(self, x: Tensor) -> list[Score]:
        """Scores of samples (evaluations, *shape) made from `evaluation()`, in the order of `facts.columns`."""

    @abstractmethod
    def floor(self) -> list[Score]:
        """The same scores for fresh samples of the truth (or held-out real data) at the same n: what a perfect student gets."""

    @abstractmethod
    def truth(self) -> Tensor:
        """The samples of truth that `floor` scores, for pictures: (n, *shape), in the order of `evaluation()`."""

    @torch.no_grad()
    def sample_teacher(self, conditions: Conditions, seeds: Sequence[int], steps: int) -> Samples:
        """The teacher's samples in `steps` steps of the track's solver: one for each condition, from the noise that students get."""
        teacher = self.teacher()
        times = time_grid(teacher.path, steps)
        device = next(iter(teacher.network.state_dict().values())).device
        x = sample_noise(seeds, self.shape).to(device) * teacher.path.start(float(times[0]))
        x = SOLVERS[self.facts.solver](teacher, x, conditions.to(device), times, guidance_scale=self.guidance)
        return Samples(x, steps * teacher.evaluations(self.guidance))

    def pictures(self, x: Tensor) -> Tensor:
        """What people look at of samples: points (n, 2), or images (n, 1 or 3, h, w) in [-1, 1]."""
        return x

    def export(self, student: Student, folder: Path) -> None:  # noqa: B027
        """Write the student once more as others load it, where the track's teacher has such a form; by default it has none."""

    def missing(self, info: MethodInfo) -> str | None:
        """Why this method cannot run here ("needs text"), or None."""
        if self.domain not in info.domain:
            return f"is for {' and '.join(info.domain)}, this track is {self.domain}"
        have = self.provides | self.teacher().network.capabilities
        lacking = [need for need in info.needs if need not in have]
        return "needs " + " and ".join(lacking) if lacking else None
