"""Weights of published networks: which file, from where, with which checksum, and where it is looked for on this machine.

Nothing here downloads. A file that is missing is named with the command that fetches it, and one with another checksum is refused.
Three of the files are TorchScript archives, which hold code: they are opened only after their pinned checksum was found right.

Where the checksums come from: OpenAI's are in their addresses; that of `inception-2015-12-05.pt` is the one that k-diffusion pins; that of
`pt_inception-2015-12-05-6726825d.pth` begins with the digits in its name; that of bigG is the name of its file in the hub's cache.
For g/14 and HPSv2 no checksum was at hand: whoever fetches them states it in a file beside, and it becomes part of the scores' identity.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import BadFileError, UsageError, unknown

FOLDER_VARIABLE = "DISTILLBENCH_WEIGHTS"


class WeightsMissing(UsageError):
    """The weights of a published network are not on this machine; the message has the command that fetches them."""


@dataclass(frozen=True)
class Weights:
    """A file of published weights. `sha256` None: no checksum is known, so `FILE.sha256` beside it must state one. megabytes: about."""

    name: str
    file: str
    url: str
    sha256: str | None
    megabytes: int


@dataclass(frozen=True)
class Found:
    """A file whose checksum was found right."""

    path: Path
    sha256: str


_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_HUB = "https://huggingface.co"
_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"

WEIGHTS = {
    weights.name: weights
    for weights in (
        Weights(
            "inception2015",
            "inception-2015-12-05.pt",
            "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
            "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
            96,
        ),
        Weights(
            "inception2015-ported",
            "pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            96,
        ),
        Weights("openclip-b32-openai", "ViT-B-32.pt", f"{_OPENAI}/{_B32}/ViT-B-32.pt", _B32, 354),
        Weights("openclip-l14-openai", "ViT-L-14.pt", f"{_OPENAI}/{_L14}/ViT-L-14.pt", _L14, 932),
        Weights(
            "openclip-g14-laion2b-s12b-b42k",
            "open_clip-g14-laion2b-s12b-b42k.bin",
            f"{_HUB}/laion/CLIP-ViT-g-14-laion2B-s12B-b42K/resolve/main/open_clip_pytorch_model.bin",
            None,
            5467,
        ),
        Weights(
            "openclip-bigg14-laion2b-s39b-b160k",
            "open_clip-bigg14-laion2b-s39b-b160k.bin",
            f"{_HUB}/laion/CLIP-ViT-bigG-14-laion2B-39B-b160k/resolve/main/open_clip_pytorch_model.bin",
            "0d5318839ad03607c48055c45897c655a14c0276a79f6b867934ddd073760e39",
            10159,
        ),
        Weights("hps-v2.0", "HPS_v2_compressed.pt", f"{_HUB}/xswu/HPSv2/resolve/main/HPS_v2_compressed.pt", None, 3944),
        Weights("hps-v2.1", "HPS_v2.1_compressed.pt", f"{_HUB}/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt", None, 3944),
    )
}


def weights_folder() -> Path:
    """Where weights are looked for that no path names: $DISTILLBENCH_WEIGHTS, or ~/.cache/distillbench/weights."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "distillbench" / "weights"


def find(weights: Weights | str, given: Path | str | None = None) -> Found:
    """The file of these weights (an entry of `WEIGHTS`, or its name), checked. `given`: the file, or a folder that holds it.

    Looked for at `given`, then in `weights_folder()`; a `given` path that does not exist is an error, not a reason to look elsewhere.
    Raises WeightsMissing where there is none, BadFileError where it has another checksum, UsageError where none is stated.
    """
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            raise unknown("weights", weights, WEIGHTS)
        weights = WEIGHTS[weights]
    path = _path(weights, given)
    if not path.is_file():
        raise WeightsMissing(f"{path}: the weights {weights.name} are not there; fetch them: {fetch_command(weights, path)}")
    expected = weights.sha256 or _stated(weights, path)
    status = path.stat()
    actual = _digest(path, status.st_size, status.st_mtime_ns)
    if actual != expected:
        raise BadFileError(
            f"{path}: not the weights {weights.name}: its sha256 is {actual[:16]}... and must be {expected[:16]}... "
            f"(truncated or foreign); fetch them again: {fetch_command(weights, path)}"
        )
    return Found(path, actual)


def fetch_command(weights: Weights, path: Path | None = None) -> str:
    """The shell command that fetches these weights to `path` (default: into `weights_folder()`)."""
    path = path or weights_folder() / weights.file
    where = shlex.quote(str(path))
    command = f"curl -L --create-dirs -o {where} {weights.url}"
    return command if weights.sha256 else f"{command} && sha256sum {where} > {shlex.quote(f'{path}.sha256')}"


def states() -> Iterator[tuple[str, str, str]]:
    """For each entry of `WEIGHTS`: "ok", "missing" or "broken"; its name; where it is, or what to do."""
    for weights in WEIGHTS.values():
        try:
            yield "ok", weights.name, f"{find(weights).path}, checksum holds"
        except WeightsMissing:
            yield "missing", weights.name, f"about {weights.megabytes} MB; if you need it: {fetch_command(weights)}"
        except (BadFileError, UsageError) as error:
            yield "broken", weights.name, str(error)


def _path(weights: Weights, given: Path | str | None) -> Path:
    if given is None:
        return weights_folder() / weights.file
    given = Path(given).expanduser()
    return given / weights.file if given.is_dir() else given


def _stated(weights: Weights, path: Path) -> str:
    """The checksum that `FILE.sha256` states, in the format of sha256sum."""
    beside = Path(f"{path}.sha256")
    remedy = (
        f"no checksum of {weights.name} is pinned here, so state it: sha256sum {shlex.quote(str(path))} > {shlex.quote(str(beside))}, "
        f"after comparing it with the one that the page of {weights.url} shows"
    )
    try:
        words = beside.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{beside}: no such file, or not a text; {remedy}") from None
    if not words or not re.fullmatch("[0-9a-f]{64}", words[0]):
        raise UsageError(f"{beside}: does not begin with a sha256 of 64 hexadecimal digits; {remedy}")
    return words[0]


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Once for a file as it is: large ones take a minute."""
    from .networks.files import sha256_file

    try:
        return sha256_file(path)
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror})") from None
