"""What this machine has, and what is missing for what."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import BadFileError, DistillbenchError, UsageError
from .store import store_folder
from .teachers.zoo import ZOO
from .torchvision_repair import repair_torchvision
from .tracks.facts import EXTERNAL, VALIDATES, facts_of

EXTRAS = {
    "images": ("diffusers", "transformers", "accelerate", "peft"),
    "published": ("clean-fid", "torchmetrics", "open-clip-torch", "torch-fidelity"),
    "dev": ("pytest", "ruff", "mypy"),
}

Finding = tuple[str, str, str]  # "ok", "missing" or "broken"; what; detail


def findings() -> Iterator[Finding]:
    """Everything worth knowing before a run, one line each."""
    yield "ok", "python", f"{platform.python_version()}, {os.cpu_count()} processors"
    yield _torch()
    for name in EXTRAS:
        yield _extra(name, f"pip install 'distillbench[{name}]' if you need it")
    if _version("torchvision") is not None:
        yield _torchvision()
    yield from _zoo()
    yield _data()
    yield _store()
    yield from _methods()


def track_findings(track: str, teacher: str | None = None, data: str | None = None) -> Iterator[Finding]:
    """What TRACK needs, one line each, with the command that gets what is missing. teacher, data: paths, where it ships none."""
    facts = facts_of(track)
    yield "ok", "track", f"{facts.id}: {facts.title}"
    yield _torch()
    for extra in {"images": ("images",), "published": ("images", "published")}.get(facts.extra, ()):
        yield _extra(extra, f"pip install 'distillbench[{extra}]'")
    if _version("torchvision") is not None and facts.extra == "published":
        yield _torchvision()
    if facts.name not in EXTERNAL:
        if teacher or data:
            raise UsageError(f"{facts.name} ships its teacher and data: leave --teacher and --data out")
        yield from _shipped_with(facts.name.removesuffix(VALIDATES))
        if facts.name.startswith("digits"):
            yield _data()
        return
    if _version("diffusers") is None:
        yield "missing", "files", "teacher, data and weights are looked at once the extras are there"
        return
    yield from _given(facts.name, teacher, data)


def _given(name: str, teacher: str | None, data: str | None) -> Iterator[Finding]:
    """Teacher, data, weights and memory of a track of the user's own files. Nothing is loaded."""
    from .tracks import get_track
    from .tracks.given import GivenTrack
    from .tracks.published import PublishedTrack

    track = get_track(name, teacher, data)
    assert isinstance(track, GivenTrack)
    if teacher is None and name in ZOO:
        yield from _shipped_with(name)
    elif teacher is None:
        yield "missing", "teacher", f"--teacher PATH: {track.teacher_help}"
    else:
        try:
            yield "ok", "teacher", f"a {track.teacher_class()}, its own files are looked at when it is opened"
        except (UsageError, BadFileError) as error:
            yield "broken", "teacher", str(error)
    if data is None:
        yield "missing", "data", f"--data PATH: {track.data_help}"
    else:
        try:
            checksums = track.data_checksums()
            yield "ok", "data", ", ".join(f"{what} {sha256[:16]}..." for what, sha256 in checksums.items())
        except (UsageError, BadFileError) as error:
            yield "broken", "data", str(error)
    if isinstance(track, PublishedTrack):
        from .published_weights import states

        needed = {measure.weights for measure in track.definition.measures}
        yield from ((state, f"weights {what}", detail) for state, what, detail in states() if what in needed)
        yield _memory(track.definition.parameters)


def _memory(parameters: float) -> Finding:
    """Of the first GPU, against float32 weights of the teacher and of one student with its gradients and two moments."""
    import torch

    sampling, training = 4 * parameters / 1e9, (4 + 16) * parameters / 1e9
    need = f"float32 weights take {sampling:.1f} GB to sample and {training:.1f} GB to train one student, activations come on top"
    if not torch.cuda.is_available():
        return "missing", "GPU", f"none here, and a CPU takes very long at full size; {need}"
    have = torch.cuda.get_device_properties(0).total_memory / 1e9
    return ("ok" if have > training else "missing"), "GPU", f"{torch.cuda.get_device_name(0)} with {have:.0f} GB; {need}"


def _extra(name: str, remedy: str) -> Finding:
    packages = EXTRAS[name]
    absent = [package for package in packages if _version(package) is None]
    if absent:
        return "missing", f"extra {name}", f"{', '.join(absent)}; {remedy}"
    return "ok", f"extra {name}", ", ".join(f"{package} {_version(package)}" for package in packages)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Finding:
    try:
        torch = import_module("torch")
    except Exception as error:
        return "broken", "torch", f"{type(error).__name__}: {error}; reinstall torch"
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU (none is needed)"
    return "ok", "torch", f"{torch.__version__}, {cuda}"


def _torchvision() -> Finding:
    try:
        repaired = repair_torchvision()
    except UsageError as error:
        return "broken", "torchvision", str(error)
    return "ok", "torchvision", f"{_version('torchvision')}{', repaired: its compiled part does not load' if repaired else ''}"


def _shipped_with(track: str) -> Iterator[Finding]:
    """The networks of the zoo whose name begins with the track's."""
    return (finding for finding in _zoo() if finding[1].removeprefix("zoo ").startswith(track))


def _zoo() -> Iterator[Finding]:
    from .teachers.cards import read_card

    for name, entry in ZOO.items():
        try:
            card = read_card(entry.folder)
            good = _checksum(entry.folder) == card["sha256"]
        except (BadFileError, OSError) as error:
            yield "broken", f"zoo {name}", str(error)
            continue
        detail = "checksum holds" if good else f"checksum differs from its card; reinstall, or distillbench zoo train {name}"
        yield ("ok" if good else "broken"), f"zoo {name}", detail


def _checksum(folder: Path) -> str:
    """Of a shipped network: of its pipeline folder, or of its only file of weights."""
    from .networks.files import sha256_file
    from .teachers.shapes_pipelines import PIPELINE, pipeline_sha256

    if (folder / PIPELINE).is_dir():
        return pipeline_sha256(folder / PIPELINE)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BadFileError(f"{folder}: has no weights; install distillbench again, or make it with `zoo train {folder.name}`")
    return sha256_file(weights[0])


def _data() -> Finding:
    from .data.digits import load_digits

    try:
        return "ok", "data digits", f"checksum holds, {len(load_digits('train'))} images to train on"
    except BadFileError as error:
        return "broken", "data digits", str(error)


def _store() -> Finding:
    folder = store_folder()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())  # what would have to be written to make it
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return "broken", "store", f"{folder} cannot be written ({error.strerror}); name another with --store or DISTILLBENCH_STORE"
    return "ok", "store", f"{folder} can be written"


def _methods() -> Iterator[Finding]:
    from .discovery import discover

    try:
        yield "ok", "methods", ", ".join(discover())
    except DistillbenchError as error:
        yield "broken", "methods", str(error)
