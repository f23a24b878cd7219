"""Networks on disk: weights as safetensors, architecture as json, nothing that could run code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import BadFileError, UsageError
from .backbone import Backbone

FORMAT = 1


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_network(network: Backbone, folder: Path | str, name: str = "network") -> None:
    """Write `name.safetensors` and `name.json` (architecture and the checksum of the weights) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    save_file({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}, weights)
    card = {"format": FORMAT, "network": network.to_config(), "sha256": sha256_file(weights)}
    (folder / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_network(folder: Path | str, name: str = "network") -> Backbone:
    """The network that `save_network` wrote, bit for bit, on the CPU.

    Raises BadFileError where a file is missing, truncated or foreign, or the weights do not fit the architecture.
    """
    card_path, weights_path = Path(folder) / f"{name}.json", Path(folder) / f"{name}.safetensors"
    card = _read_card(card_path)
    if not weights_path.is_file():
        raise BadFileError(f"{weights_path}: no such file; a network is a .json and a .safetensors file side by side")
    if sha256_file(weights_path) != card.get("sha256"):
        raise BadFileError(f"{weights_path}: checksum differs from the one in {card_path.name}; the file is truncated or not its own")
    # The shapes are compared before any memory is taken, so that a hostile architecture costs nothing.
    _check_fit(_built(card["network"], card_path, "meta"), weights_path)
    network = _built(card["network"], card_path, "cpu")
    state = _read_weights(weights_path)
    network.to(next(iter(state.values())).dtype)
    network.load_state_dict(state)
    return network


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror}); give the folder of a saved network") from None
    except (ValueError, RecursionError):
        raise BadFileError(f"{path}: not a json file; it is truncated or was not written by save_network") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT or not isinstance(card.get("network"), dict):
        raise BadFileError(f"{path}: not the description of a network (format {FORMAT}); save the network again")
    return card


def _built(config: dict[str, Any], path: Path, device: str) -> Backbone:
    from . import build

    try:
        with torch.device(device):
            return build(config)
    except UsageError as error:
        raise BadFileError(f"{path}: {error}") from None
    except RuntimeError:
        raise BadFileError(f"{path}: the network that it describes cannot be built; check its numbers") from None


def _check_fit(network: Backbone, path: Path) -> None:
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        raise BadFileError(f"{path}: not a safetensors file; it is truncated or foreign") from None
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        raise BadFileError(
            f"{path}: weights do not fit the described network: {key} is {found.get(key, 'absent')}, expected {expected.get(key, 'absent')}"
        )


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError):
        raise BadFileError(f"{path}: not a safetensors file; it is truncated or foreign") from None
