"""Scores a pipeline that others trained: sampled on a track's prompts and seeds, scored as that track's students are. docs/score.md.

Images are never all in memory. They are made `track.chunk` at a time, and what the scores need of a chunk is kept in the store, so that
a stopped scoring goes on with the next chunk:

    runs/<id>/looked-<steps>/<first sample>.safetensors
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import NonFiniteError, UsageError
from .jobs import STEPS, label_of
from .metrics.extractors import extractor_identity
from .metrics.feature_cache import write_whole
from .networks.files import sha256_file
from .records import RunRecord, digest, environment, now, run_id
from .runner import SCORING, Report, keep_pictures
from .store import Store
from .teachers.diffusers import SETTINGS, DiffusersTeacher, located, open_pipeline
from .teachers.pipeline_lora import WEIGHTS
from .teachers.pipeline_sampling import read_scheduler, scheduler_named, set_times
from .tracks import get_track
from .tracks.facts import facts_of
from .tracks.given import GivenTrack, teacher_sha256
from .tracks.text_to_image import PipelineTrack, together

RELEASED = "released"
# A track's short name -> the track of it whose teacher has that pipeline's format.
FAMILIES = {"shapes": {"StableDiffusionPipeline": "shapes-sd", "SanaPipeline": "shapes-sana", "SanaSprintPipeline": "shapes-sana"}}
PREVIEW = "preview"  # beside what was looked at in a chunk: pictures of some of its samples


@dataclass(frozen=True)
class Released:
    """A pipeline and how it is sampled. record: without a result yet.  scheduler: None for the pipeline's own.

    cut: how many of the track's prompts are longer than its text encoder takes.
    """

    pipeline: DiffusersTeacher
    track: PipelineTrack
    guidance: float
    scheduler: str | None
    record: RunRecord
    cut: int

    @property
    def note(self) -> str:
        """What every score says of captions that were cut."""
        of = len(self.track.prompts())
        return f"{self.cut} of {of} captions are longer than the text encoder takes and were cut" if self.cut else ""


def open_released(
    where: str | Path, track: str, *, revision: str | None = None, lora: str | Path | None = None, steps: Iterable[int] = STEPS,
    guidance: float | None = None, scheduler: str | None = None, data: str | None = None, device: str = "cpu",
) -> Released:  # fmt: skip
    """Open a pipeline (folder, or hub id with a revision) for a track, and check that they fit. `track`: its name, or that of a family.

    guidance: None for what the folder states, else none.  scheduler: one of diffusers, with the settings of the pipeline's own.
    data: a path, for a track that ships none.
    Raises UsageError, a line each, for what is no pipeline, a LoRA for another base, a track without prompts or of another image size.
    """
    steps = list(dict.fromkeys(steps))
    folder, name = located(where, revision)
    pipeline = open_pipeline(folder, lora=lora)
    chosen = _track_of(track, type(pipeline.pipeline).__name__, data)
    _check_fit(name, pipeline, chosen)
    own = pipeline.pipeline.scheduler
    if scheduler == type(own).__name__:
        scheduler = None
    _check_scheduler(pipeline, scheduler, steps)
    options = {"guidance": guidance, "scheduler": scheduler, "lora": None if lora is None else Path(lora).name}
    scale = _scale(pipeline, guidance)
    shas = {"pipeline": teacher_sha256(folder)} | ({} if lora is None else {"lora": lora_sha256(Path(lora))})
    record = _record(
        chosen, label_of(plain_name(name), {key: value for key, value in options.items() if value is not None}), shas, steps,
        {"guidance": scale, "scheduler": scheduler or type(own).__name__}, device,
    )  # fmt: skip
    cut = len(pipeline.too_long(chosen.prompts()))
    return Released(pipeline.to(device), chosen, scale, scheduler, record, cut)


def score_released(released: Released, store: Store, say: Report | None = None) -> RunRecord:
    """Sample and score at each step count, and keep the record; one that is in the store already is returned as it is."""
    record, track = released.record, released.track
    known = store.get(record.id)
    if known is not None and known.ok:
        return known
    torch.set_num_threads(record.threads)
    scores: dict[str, list[dict[str, Any]]] = {}
    evaluations: dict[str, int] = {}
    shares = [steps + SCORING for steps in record.steps]
    for number, steps in enumerate(record.steps):

        def told(done: float, *, number: int = number, steps: int = steps) -> None:
            if say is not None:
                share = (sum(shares[:number]) + done * shares[number]) / sum(shares)
                say(min(share, 0.99), f"{steps} step{'s' if steps > 1 else ''}")

        looked, evaluations[str(steps)] = _looked(released, steps, store, told)
        found = track.ordered(track.scores_of(looked))
        scores[str(steps)] = [dataclasses.replace(score, note=score.note or released.note).to_json() for score in found]
    parameters = sum(p.numel() for p in released.pipeline.denoiser.parameters())
    result = dataclasses.replace(record, status="ok", scores=scores, evaluations=evaluations, parameters=parameters).scrubbed()
    store.add(result)
    return result


# ---------------------------------------------------------------------- samples


def _looked(released: Released, steps: int, store: Store, told: Callable[[float], None]) -> tuple[dict[str, Tensor], int]:
    """What the track's scores need of all samples, chunk by chunk, and the evaluations spent on each sample."""
    track, record = released.track, released.record
    n = len(track.evaluation_seeds())
    prompts = track.evaluation_prompts() or [""] * n  # a track may have none
    shown = set(torch.linspace(0, n - 1, min(track.preview, n)).long().tolist())
    folder = store.run_folder(record.id) / f"looked-{steps}"
    seen = sorted(
        track.look(torch.zeros(1, 3, *track.image_size, dtype=torch.uint8), [0])
    )  # other scores can be taken once weights are there
    parts: list[dict[str, Tensor]] = []
    evaluations = 0
    for start in range(0, n, track.chunk):
        rows = range(start, min(start + track.chunk, n))
        path = folder / f"{start:08d}.safetensors"
        key = digest([record.id, steps, rows.start, rows.stop, extractor_identity(track.extractor), seen])
        found = _read(path, key)
        if found is None:
            found = _sampled(released, steps, rows, prompts[rows.start : rows.stop], [row for row in rows if row in shown])
            _write(path, key, *found)
        parts.append(found[0])
        evaluations = found[1]
        told(rows.stop / n)
    pictures = together([{PREVIEW: part.pop(PREVIEW)} for part in parts])[PREVIEW]
    store.student_folder(record.id).mkdir(parents=True, exist_ok=True)
    told_by = [prompts[row] for row in sorted(shown)] if any(prompts) else None
    keep_pictures(store.student_folder(record.id), steps, pictures, torch.zeros(len(pictures)), told_by)
    return together(parts), evaluations


@torch.no_grad()
def _sampled(released: Released, steps: int, rows: range, prompts: list[str], shown: list[int]) -> tuple[dict[str, Tensor], int]:
    """Sample the rows of the evaluation, look at the images and let them go."""
    pipeline, track = released.pipeline, released.track
    seeds = track.evaluation_seeds()
    samples = pipeline.sample(
        pipeline.conditions(prompts), [seeds[row] for row in rows], steps, guidance_scale=released.guidance, scheduler=released.scheduler
    )
    pipeline.forget()
    if not torch.isfinite(samples.x).all():
        raise NonFiniteError(f"the samples of {released.record.label} at {steps} steps are not finite")
    images = pipeline.decode(samples.x).cpu()
    pictures = (2 * images[[row - rows.start for row in shown]] - 1).half()
    return {**track.look(track.as_scored(images), rows), PREVIEW: pictures}, samples.evaluations


def _read(path: Path, key: str) -> tuple[dict[str, Tensor], int] | None:
    """A chunk that was looked at before; None where there is none, or one that is damaged or of something else, which is made again."""
    with suppress(OSError, SafetensorError, ValueError, KeyError), safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about["key"] == key:
            return {name: file.get_tensor(name) for name in file.keys()}, int(about["evaluations"])  # noqa: SIM118
    return None


def _write(path: Path, key: str, looked: dict[str, Tensor], evaluations: int) -> None:
    content = save({name: value.contiguous() for name, value in looked.items()}, {"key": key, "evaluations": str(evaluations)})
    try:
        write_whole(path, content)
    except OSError as error:
        raise UsageError(f"cannot write to {path.parent} ({error.strerror or error}); name another store with --store") from None


# ---------------------------------------------------------------------- what is scored


def _track_of(name: str, class_name: str, data: str | None) -> PipelineTrack:
    family = FAMILIES.get(name)
    if family is not None:
        if class_name not in family:
            raise UsageError(f"--track {name} has no track for a {class_name}; name one: {', '.join(dict.fromkeys(family.values()))}")
        name = family[class_name]
    track = get_track(facts_of(name).name, None, data)
    if not isinstance(track, PipelineTrack):
        raise UsageError(f"{track.facts.name} has no images that a pipeline could make; pipelines are scored on tracks such as shapes")
    return track


def _check_fit(name: str, pipeline: DiffusersTeacher, track: PipelineTrack) -> None:
    if pipeline.kind.text is None and "text" in track.provides:
        raise UsageError(f"{name}: a {type(pipeline.pipeline).__name__} takes no prompts, and {track.facts.name} is scored on prompts")
    h, w = pipeline.image_size
    made = tuple(track.as_scored(torch.zeros(1, 3, h, w)).shape[2:])
    if made != track.image_size:
        wanted = " x ".join(map(str, track.image_size))
        raise UsageError(f"{name} makes images of {h} x {w} pixels, and {track.facts.name} is scored on images of {wanted}")


def _check_scheduler(pipeline: DiffusersTeacher, name: str | None, steps: Iterable[int]) -> None:
    """Before anything is sampled: it is made for what this network predicts, and takes these numbers of steps."""
    own = pipeline.pipeline.scheduler
    for count in steps:
        used = scheduler_named(name or type(own).__name__, own)
        ours, other = read_scheduler(own), read_scheduler(used)
        if (type(ours.schedule), ours.prediction) != (type(other.schedule), other.prediction):
            raise UsageError(
                f"{name} would take this network to predict {other.prediction} on a {other.schedule.name} schedule, and it predicts "
                f"{ours.prediction} on {ours.schedule.name}; the pipeline's own scheduler is {type(own).__name__}"
            )
        set_times(used, count, other, None if name else pipeline.times.get(count))


def _scale(pipeline: DiffusersTeacher, guidance: float | None) -> float:
    """The guidance that is used: a scale up to 1 is none, but for a network that takes it as an input."""
    scale = pipeline.guidance if guidance is None else float(guidance)
    if not 0 <= scale < math.inf:
        raise UsageError(f"--guidance {scale:g}: a guidance scale is 0 or above, 0 and 1 for none")
    network: Any = pipeline.denoiser.network
    if network.config.guidance_input:
        return scale
    if scale > 1 and pipeline.kind.text is None:
        raise UsageError("this pipeline has no prompts, so it cannot be guided; leave --guidance out")
    return max(scale, 1.0)


def plain_name(name: str) -> str:
    """A folder's name or a hub id as the label of a record."""
    name, _, revision = name.partition("@")
    revision = revision[:8] if re.fullmatch("[0-9a-f]{40}", revision) else revision
    text = re.sub(r"[^\w.@+:-]+", "-", f"{name}@{revision}" if revision else name)
    return re.sub(r"^\W+", "", text) or "unnamed"


def lora_sha256(where: Path) -> str:
    """Of a LoRA file, by itself or in a folder, and of what is read beside it."""
    path = where / WEIGHTS if where.is_dir() else where
    beside = [path.parent / SETTINGS, path.parent / "scheduler" / "scheduler_config.json"]
    own = [sha256_file(path)]
    return digest(own + [_sha256(path.parent, [file for file in beside if file.is_file()])])


def _sha256(folder: Path, files: Iterable[Path]) -> str:
    lines = [f"{file.relative_to(folder).as_posix()} {sha256_file(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _record(track: PipelineTrack, label: str, shas: dict[str, str], steps: list[int], config: dict[str, Any], device: str) -> RunRecord:
    draft = RunRecord(
        id="", track=track.facts.id, method=RELEASED, method_version=1, label=label, config=config, budget=None, seed=0, threads=1,
        dtype="float32", device_class=device.partition(":")[0], steps=steps, trained_for=[], data_access="not known", family=RELEASED,
        status="failed: not finished", created=now(), kind=RELEASED, environment=environment(), checksums=shas,
        source_sha256=shas["pipeline"] if len(shas) == 1 else digest(shas),
        files=track.data_checksums() if isinstance(track, GivenTrack) else {},
    )  # fmt: skip
    return dataclasses.replace(draft, id=run_id(**draft.determinants()))
