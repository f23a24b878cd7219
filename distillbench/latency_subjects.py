"""What `distillbench latency` measures: the teacher, the students that are in the store, and a pipeline given to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .discovery import find
from .errors import UsageError
from .latency_stages import Timed, timed_pipeline, timed_student, timed_teacher
from .scoring import open_released
from .store import Store
from .tracks import get_track
from .tracks.text_to_image import PipelineTrack

LARGEST = "largest"


def parse_batches(text: str) -> tuple[int | None, ...]:
    """`1,largest` -> (1, None)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part == LARGEST or (part.isdecimal() and int(part) > 0) for part in parts):
        raise UsageError(f"--batch {text!r}: give batch sizes such as 1,16 or the word {LARGEST}, separated by commas")
    return tuple(dict.fromkeys(None if part == LARGEST else int(part) for part in parts))


def check_device(device: str) -> None:
    """Raises UsageError for a device that this machine or this program does not have."""
    import torch

    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r}: latency is measured on cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no GPU that torch can use here; leave --device out to measure on the processor")


def pipeline_track(name: str, teacher: str | None = None, data: str | None = None) -> PipelineTrack:
    """The track of that name, as `get_track` makes it; raises UsageError where its teacher is no pipeline and so has no stages."""
    track = get_track(name, teacher, data)
    if not isinstance(track, PipelineTrack):
        raise UsageError(f"{track.facts.name} has no pipeline to take apart; `distillbench bench {track.facts.name}` measures its latency")
    return track


def subjects_of(
    track: PipelineTrack, store: Store, note: Callable[[str], None], *, pipeline: str | None = None, revision: str | None = None,
    lora: str | None = None, guidance: float | None = None, steps: Sequence[int] = (1, 2, 4), data: str | None = None,
) -> list[Timed]:  # fmt: skip
    """The teacher at its fewest and most steps, students of seed 0 at theirs, the pipeline at `steps`. note: gets what is left out.

    The pipeline is the subject that `score` makes of it with the same steps and guidance, so that its latency finds its scores.
    """
    if pipeline is None and (revision, lora, guidance) != (None, None, None):
        raise UsageError("--revision, --lora and --guidance say how --pipeline is opened; name one")
    counts = sorted({min(track.reference_steps), max(track.reference_steps)})
    subjects = [timed_teacher(track, count) for count in counts] + _students(track, store, note)
    if pipeline is not None:
        released = open_released(pipeline, track.facts.name, revision=revision, lora=lora, steps=steps, guidance=guidance, data=data)
        record = released.record
        subjects += [
            timed_pipeline(released.pipeline, count, subject=record.id, label=record.label, guidance=released.guidance) for count in steps
        ]
    return subjects


def _students(track: PipelineTrack, store: Store, note: Callable[[str], None]) -> list[Timed]:
    found = []
    for record in store.records(track.id):
        if not (record.ok and record.kind == "run" and record.seed == 0 and store.student_folder(record.id).is_dir()):
            continue
        try:
            student = find(record.method).load().student_type.load(store.student_folder(record.id))
        except Exception as error:  # a damaged folder, a class that cannot load, a stranger's method: the others are measured
            note(f"not measured: {record.label} ({type(error).__name__}: {error})")
            continue
        found += [timed_student(track, student, steps, subject=record.id, label=record.label) for steps in record.steps]
    return found
