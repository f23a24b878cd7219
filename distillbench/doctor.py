"""What this machine has, and what is missing for what."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from .errors import BadFileError, DistillbenchError
from .store import store_folder

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
    for name, packages in EXTRAS.items():
        absent = [package for package in packages if _version(package) is None]
        if absent:
            yield "missing", f"extra {name}", f"{', '.join(absent)}; pip install 'distillbench[{name}]' if you need it"
        else:
            yield "ok", f"extra {name}", ", ".join(f"{package} {_version(package)}" for package in packages)
    if _version("torchvision") is not None:
        yield _torchvision()
    yield from _zoo()
    yield _data()
    yield _store()
    yield from _methods()


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
        import_module("torchvision")
    except Exception as error:
        return (
            "broken",
            "torchvision",
            f"{type(error).__name__}: {str(error)[:80]}; uninstall it, or install the build that belongs to your torch",
        )
    return "ok", "torchvision", str(_version("torchvision"))


def _zoo() -> Iterator[Finding]:
    from .networks.files import sha256_file
    from .teachers.cards import read_card
    from .teachers.zoo import ZOO

    for name, entry in ZOO.items():
        try:
            card = read_card(entry.folder)
            good = sha256_file(entry.folder / "network.safetensors") == card["sha256"]
        except (BadFileError, OSError) as error:
            yield "broken", f"zoo {name}", str(error)
            continue
        detail = "checksum holds" if good else f"checksum differs from its card; reinstall, or distillbench zoo train {name}"
        yield ("ok" if good else "broken"), f"zoo {name}", detail


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
