"""One job from start to record: build, train, save the student, score it. Whatever goes wrong becomes a row that says so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .api import Conditions, Context, Samples, Student
from .budget import Budget
from .errors import BadFileError, ContractError, DistillbenchError, NonFiniteError, NotApplicable, UsageError
from .jobs import TEACHER, TRUTH, Job, Resolved, resolve
from .logs import EventLog
from .networks.files import sha256_file
from .records import RunRecord
from .store import Store
from .tracks import get_track
from .tracks.base import Track
from .training.loop import Interrupted, Loop, Progress
from .training.meter import Tracer, networks_of, pass_cost
from .training.state import built

SCORING = 8  # the scoring of a reference's step count as so many of its evaluations: for its progress only, between what tracks need
Report = Callable[[float, str], None]  # fraction of the job in [0, 1], what is going on


def execute(job: Job, store: Store, report: Report | None = None, log: str | None = None) -> RunRecord:
    """Run a job and store its record; a job that is already done is returned as it is. log: one of `logs.LOGS`.

    A method's failure becomes a record with status "failed: why". `Interrupted` passes through, and so does the `UsageError` of a wrong
    name or knob, also one that `build` finds.
    """
    resolved = resolve(job)
    known = store.get(resolved.record.id)
    if known is not None and (known.ok or known.status.startswith("skipped")):
        return known
    torch.set_num_threads(job.threads)
    say = report or (lambda fraction, what: None)
    try:
        record = _reference(resolved, store, say) if job.is_reference else _run(resolved, store, say, log)
    except (Interrupted, KeyboardInterrupt, UsageError):
        raise
    except NotApplicable as error:
        record = dataclasses.replace(resolved.record, status=f"skipped: {error}")
    except Exception as error:
        record = dataclasses.replace(resolved.record, status=f"failed: {_one_line(error, resolved)}")
        if os.environ.get("DISTILLBENCH_DEBUG"):
            traceback.print_exc()
    record = record.scrubbed()
    try:
        store.add(record)
    except BadFileError as error:  # the method's results hold something that no record may
        record = dataclasses.replace(resolved.record, status=f"failed: {error}").scrubbed()
        store.add(record)
    return record


def _one_line(error: Exception, resolved: Resolved) -> str:
    """The reason, with the last line of the method's own file that led to it."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, DistillbenchError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if resolved.found is not None and Path(frame.filename).name == resolved.found.path.name]
    where = (own or frames)[-1]
    return f"{type(error).__name__}: {text or 'no message'} ({Path(where.filename).name}:{where.lineno})"


def _run(resolved: Resolved, store: Store, say: Report, log: str | None) -> RunRecord:
    job, record = resolved.job, resolved.record
    track = get_track(job.track, job.teacher, job.data)
    assert resolved.found is not None
    missing = track.missing(resolved.found.info)
    if missing:
        return dataclasses.replace(record, status=f"skipped: {missing}")
    reset_peak_memory(job.device)
    method, context = build(resolved, track, store.run_folder(record.id))
    events = EventLog(log, store, record)
    try:
        return _trained(resolved, store, say, track, method, context, events)
    except UsageError as error:  # after build nobody types anything any more: it is the method's mistake
        raise ContractError(str(error)) from error
    finally:
        events.close()


def _trained(resolved: Resolved, store: Store, say: Report, track: Track, method: Any, context: Context, events: EventLog) -> RunRecord:
    """Train, save and score a built method."""
    job, record = resolved.job, resolved.record
    assert record.budget is not None

    def report(progress: Progress) -> None:
        say(0.95 * progress.fraction, _told(progress))
        events.training(progress.fraction, vars(progress.spent), loop.position.losses)

    loop = Loop(
        method, context, track.source(), Budget(record.budget["name"], record.budget["amount"], record.budget["unit"]),
        unit=pass_cost(track.teacher(), track.shape, track.catalog()), batch_size=track.batch_size, run=record.id,
        folder=store.run_folder(record.id), precision=job.dtype, turn_limit=float(os.environ.get("DISTILLBENCH_TURN_LIMIT", "600")),
        report=report, warn=lambda line: say(0.0, line),
    )  # fmt: skip
    spent = loop.train()
    events.training(1.0, vars(spent), loop.position.losses)
    student = method.distilled()
    folder = _save_student(student, track, store.student_folder(record.id))
    scores, evaluations = {}, {}
    for number, steps in enumerate(job.steps):
        say(0.95 + 0.05 * number / len(job.steps), f"scoring {steps} steps")
        samples = sample_student(student, track, steps, device=job.device)
        _keep_preview(folder, steps, samples.x, track)
        scores[str(steps)] = [score.unless_rewarded(method.info.rewards).to_json() for score in track.score(samples.x)]
        evaluations[str(steps)] = samples.evaluations
    used = {**dataclasses.asdict(spent), "peak_memory_mb": peak_memory(job.device)}
    (folder / "losses.json").write_text(json.dumps(loop.position.losses))
    result = dataclasses.replace(
        record, status="ok", scores=scores, evaluations=evaluations, spent=used, parameters=_parameters(student, job.steps),
        checksums={"student": checksum(folder)},
    )  # fmt: skip
    events.finished(result)
    return result


def build(resolved: Resolved, track: Track, folder: Path | None) -> tuple[Any, Context]:
    """The method, built, and what it was built from."""
    job = resolved.job
    context = Context(
        teacher=track.teacher().to(job.device), shape=track.shape, steps=tuple(resolved.record.trained_for), seed=job.seed,
        device=job.device, batch_size=track.batch_size, guidance=track.guidance, catalog=track.catalog(), folder=folder,
    )  # fmt: skip
    return built(resolved.method_class(resolved.config), context), context


def _told(progress: Progress) -> str:
    return f"{progress.stage}, {progress.spent.passes:.2g} passes"


# ---------------------------------------------------------------------- samples


def sample_student(student: Student, track: Track, steps: int, *, device: str = "cpu") -> Samples:
    """The evaluation samples of a student, checked: shape, finiteness, and the evaluations that it says it spends."""
    conditions, seeds = track.evaluation()
    parts, claimed = [], 0
    with Watch(student) as watch:
        for start in range(0, len(conditions), track.at_once):
            part = slice(start, min(start + track.at_once, len(conditions)))
            samples = student.generate(conditions[part].to(device), steps=steps, seeds=list(seeds[part]))
            wanted = (part.stop - part.start, *track.shape)
            if tuple(samples.x.shape) != wanted:
                raise ContractError(f"the student returned samples of shape {tuple(samples.x.shape)} at {steps} steps, not {wanted}")
            parts.append(samples.x.float().cpu())
            claimed = samples.evaluations
    x = torch.cat(parts)
    if not torch.isfinite(x).all():
        raise NonFiniteError(f"the student's samples at {steps} steps are not finite")
    if watch.rows > claimed * len(conditions):
        raise ContractError(f"the student says {claimed} evaluations at {steps} steps and spends {watch.rows / len(conditions):g}")
    return Samples(x, claimed)


class Watch:
    """Counts the examples that pass through a student's networks while it is active."""

    def __init__(self, student: Student):
        held = [value for value in vars(student).values() if isinstance(value, nn.Module)]
        self.tracer = Tracer()
        self.tracer.watch(networks_of(held))
        self._recording = self.tracer.recording()

    def __enter__(self) -> Watch:
        self._recording.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._recording.__exit__(None, None, None)
        self.tracer.close()

    @property
    def rows(self) -> int:
        """Of all calls: the first dimension of the first tensor among a call's arguments."""
        return sum(_rows(entry[3:]) for entry in self.tracer.entries)


def _rows(described: tuple) -> int:
    for what in described:
        named = what[1] if isinstance(what, tuple) and isinstance(what[0], str) else what  # keyword arguments come as (name, value)
        if isinstance(named, tuple) and named and isinstance(named[0], torch.Size):
            return named[0][0] if named[0] else 1
    return 0


@torch.no_grad()
def sample_teacher(track: Track, steps: int, *, device: str = "cpu", conditions: Conditions | None = None,
                   seeds: Sequence[int] | None = None) -> Samples:  # fmt: skip
    """The teacher's samples with the track's solver, from the noise and conditions that every student gets."""
    track.teacher().to(device)
    if conditions is None or seeds is None:
        conditions, seeds = track.evaluation()
    parts, evaluations = [], 0
    for start in range(0, len(conditions), track.at_once):
        part = slice(start, min(start + track.at_once, len(conditions)))
        samples = track.sample_teacher(conditions[part].to(device), list(seeds[part]), steps)
        parts.append(samples.x.float().cpu())
        evaluations = samples.evaluations
    return Samples(torch.cat(parts), evaluations)


def _reference(resolved: Resolved, store: Store, say: Report) -> RunRecord:
    job, record = resolved.job, resolved.record
    track = get_track(job.track, job.teacher, job.data)
    folder = store.student_folder(record.id)
    folder.mkdir(parents=True, exist_ok=True)
    scores, evaluations = {}, {}
    shares = [steps + SCORING for steps in job.steps]
    for number, steps in enumerate(job.steps):
        doing = f"{job.target} at {steps} evaluations" if job.target == TEACHER else "truth against truth"
        say(sum(shares[:number]) / sum(shares), doing)
        if job.target == TRUTH:
            scores[str(steps)], evaluations[str(steps)] = [score.to_json() for score in track.floor()], 0
            _keep_preview(folder, steps, track.truth(), track)
            continue
        samples = sample_teacher(track, steps, device=job.device)
        _keep_preview(folder, steps, samples.x, track)
        scores[str(steps)] = [score.to_json() for score in track.score(samples.x)]
        evaluations[str(steps)] = samples.evaluations
    parameters = sum(p.numel() for p in track.teacher().parameters()) if job.target == TEACHER else None
    return dataclasses.replace(record, status="ok", scores=scores, evaluations=evaluations, parameters=parameters)


def _keep_preview(folder: Path, steps: int, x: Tensor, track: Track) -> None:
    """Some of the samples, evenly over the conditions, for pictures; nothing where a track has none of its truth."""
    if not len(x):
        return
    rows = torch.linspace(0, len(x) - 1, min(track.preview, len(x))).long()
    conditions, _ = track.evaluation()
    shown = conditions[rows]
    labels = shown.field("label") if "label" in shown else torch.zeros(len(rows))
    keep_pictures(folder, steps, track.pictures(x[rows]), labels, shown.field("prompt") if "prompt" in shown else None)


def keep_pictures(folder: Path, steps: int, pictures: Tensor, labels: Tensor, prompts: Sequence[str] | None) -> None:
    """What `pictures.preview` reads: pictures as `Track.pictures` gives them, their labels (n,), and their prompts if they have any."""
    said = None if prompts is None else {"prompts": json.dumps(list(prompts))}
    kept = {"x": pictures.half().contiguous(), "label": labels.short()}
    save_file(kept, folder / f"preview-{steps}.safetensors", metadata=said)


# ---------------------------------------------------------------------- files and memory


def _save_student(student: Student, track: Track, folder: Path) -> Path:
    """Whole or not at all; an older attempt at the same run is replaced."""
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    student.save(beside)
    track.export(student, beside)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    return folder


def checksum(folder: Path) -> str:
    """sha256 of a saved student's weights; of several files, of their checksums in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    weights = [file for file in files if not file.name.startswith("preview-")]
    if len(weights) == 1:
        return sha256_file(weights[0])
    return hashlib.sha256("".join(sha256_file(file) for file in weights).encode()).hexdigest()


def _parameters(student: Student, steps: Sequence[int]) -> int | None:
    """Of the networks that one sample passes through, at the step count that takes the most."""
    return max(sum(p.numel() for p in {id(p): p for m in student.networks(n) for p in m.parameters()}.values()) for n in steps) or None


def reset_peak_memory(device: str) -> None:
    """Begin a new peak."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # elsewhere than on Linux the figure is the process's own peak
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> float:
    """Megabytes at the peak: of the accelerator, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
