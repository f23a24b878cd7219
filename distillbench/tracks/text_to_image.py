"""What tracks have in common whose teacher is a diffusers pipeline: samples are latents, conditions embedded prompts, scores see images."""

from __future__ import annotations

import hashlib
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..api import Samples, Student
from ..conditions import Conditions
from ..errors import UsageError
from ..metrics.extractors import Extractor, embedded_extractor, to_uint8
from ..metrics.images import Reference, image_scores, see, seen_features
from ..metrics.score import Score
from .base import Track

if TYPE_CHECKING:
    from ..diffusion.denoiser import Denoiser
    from ..teachers.diffusers import DiffusersTeacher

CHUNK = 250  # images decoded at a time
PER_PROMPT = 4  # samples of each evaluation prompt, unless a track says otherwise
AS_IMAGES = "decoded, clipped to [0, 1], rounded to uint8"


class PipelineTrack(Track):
    """A track around `opened()`. Evaluation samples come prompt by prompt, `per_prompt` of each.

    Images are never all in memory: they are decoded `chunk` at a time, looked at and dropped.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"text", "real data"})
    first_seed: ClassVar[int] = 1_000_000
    per_prompt: ClassVar[int] = PER_PROMPT
    chunk: ClassVar[int] = CHUNK

    @abstractmethod
    def opened(self) -> DiffusersTeacher:
        """The pipeline, opened once a process."""

    @abstractmethod
    def prompts(self) -> list[str]:
        """The evaluation prompts, each once."""

    @abstractmethod
    def reference_images(self) -> Tensor:
        """Real images uint8 (m, 3, h, w) that samples are held against."""

    def teacher(self) -> Denoiser:
        return self.opened().denoiser

    def catalog(self) -> Conditions:
        """The empty prompt alone: prompts cannot be listed, and all cost the same."""
        return self.opened().conditions([""])

    @cached_property
    def _evaluation(self) -> Conditions:
        return self.opened().conditions(self.evaluation_prompts())

    def evaluation(self) -> tuple[Conditions, Sequence[int]]:
        return self._evaluation, self.evaluation_seeds()

    def evaluation_prompts(self) -> list[str]:
        """The prompt of each evaluation sample."""
        return [prompt for prompt in self.prompts() for _ in range(self.per_prompt)]

    def evaluation_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.per_prompt * len(self.prompts()))

    def prompts_sha256(self) -> str:
        return hashlib.sha256("\n".join(self.prompts()).encode()).hexdigest()

    def decode(self, x: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1] of latents."""
        return torch.cat([self.opened().decode(part).cpu() for part in x.split(self.chunk)])

    def sample_teacher(self, conditions: Conditions, seeds: Sequence[int], steps: int) -> Samples:
        """By diffusers' own scheduler, as the pipeline names it."""
        return self.opened().sample(conditions, seeds, steps, guidance_scale=self.guidance)

    def pictures(self, x: Tensor) -> Tensor:
        return 2 * self.decode(x) - 1

    def export(self, student: Student, folder: Path) -> None:
        """A pipeline folder for each step count that plain diffusers loads: `pipeline-<steps>`; where diffusers has no way to say how the
        student samples, `pipeline-<steps>.txt` with the reason instead: no ground to lose a student that is trained."""
        from ..teachers.pipelines_export import export_pipeline

        for steps in student.steps:
            beside = folder / f"pipeline-{steps}"
            try:
                export_pipeline(self.opened(), student, steps, beside)
            except UsageError as error:
                shutil.rmtree(beside, ignore_errors=True)
                beside.with_suffix(".txt").write_text(f"no pipeline for {steps} steps: {error}\n", encoding="utf-8")

    # ------------------------------------------------------------------ scores

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the images that are scored."""
        return self.opened().image_size

    @cached_property
    def extractor(self) -> Extractor:
        return embedded_extractor(self.image_size)

    @cached_property
    def _reference(self) -> Reference:
        images = self.reference_images()
        sha256 = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        return Reference(see(images, self.extractor).features, sha256)

    def _teacher_reference(self) -> Reference | None:
        """Features of the teacher's own samples, where the track ships them."""
        return None

    def score(self, x: Tensor) -> list[Score]:
        parts = zip(x.split(self.chunk), torch.arange(len(x)).split(self.chunk), strict=True)
        return self.ordered(self.scores_of(together([self.look(self.as_scored(self.decode(part)), rows.tolist()) for part, rows in parts])))

    def score_images(self, images: Tensor, *, how: str = AS_IMAGES) -> list[Score]:
        """The scores of images uint8 (evaluations, 3, h, w) in the order of `facts.columns`. how: how they became uint8."""
        return self.ordered(self.all_scores(images, how))

    def all_scores(self, images: Tensor, how: str) -> list[Score]:
        """Every score this track can take."""
        return self.scores_of(self.look(images, range(len(images))), how)

    def ordered(self, scores: Sequence[Score]) -> list[Score]:
        """Those of a board, in its order."""
        found = {score.name: score for score in scores}
        return [found[name] for name in self.facts.columns]

    def as_scored(self, images: Tensor) -> Tensor:
        """Decoded images (k, 3, h, w) in [0, 1] as the scores see them: uint8 (k, 3, *image_size). A track that resizes does it here."""
        return to_uint8(images)

    def look(self, images: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        """All that the scores need of images uint8 (k, 3, h, w), those at `rows` of the evaluation: tensors (k, ...), on the CPU.

        A track with further scores adds what they need, and takes them in `scores_of`.
        """
        return {"features": self.extractor(images)}

    def scores_of(self, looked: Mapping[str, Tensor], how: str = AS_IMAGES) -> list[Score]:
        """Every score this track can take, from what `look` saw of all images in the order of `evaluation()`."""
        features = looked["features"]
        return image_scores(
            seen_features(features, torch.arange(len(features)) // self.per_prompt), self._reference, self.extractor, image_steps=(how,),
            teacher=self._teacher_reference(), prompts_sha256=self.prompts_sha256(), seeds=self.evaluation_seeds(),
        )  # fmt: skip


def together(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `look` saw of consecutive parts as if it had seen all at once."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
