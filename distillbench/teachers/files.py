"""A teacher on disk: network.safetensors and network.json, and card.json with where it came from, how to read it and what it scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..api import external
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import from_config
from ..errors import BadFileError, DistillbenchError
from ..networks.files import load_network, save_network, sha256_file
from .cards import CARD, read_card

WEIGHTS = "network.safetensors"


def save_teacher(denoiser: Denoiser, folder: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Write the network and its card into `folder`; returns the card, completed by how to read the network and its checksum."""
    save_network(denoiser.network, folder)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes files that other users of an installed package cannot read
    whole = {
        **card,
        "schedule": denoiser.schedule.to_config(),
        "prediction": denoiser.prediction,
        "parameters": sum(parameter.numel() for parameter in denoiser.network.parameters()),
        "sha256": sha256_file(folder / WEIGHTS),
    }
    (folder / CARD).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return whole


def open_teacher(folder: Path) -> Denoiser:
    """The teacher in `folder`, frozen and marked external. Raises BadFileError if a file is missing, damaged or not the card's."""
    card = read_card(folder)
    weights = folder / WEIGHTS
    if not weights.is_file() or sha256_file(weights) != card["sha256"]:
        raise BadFileError(f"{weights}: missing or not what its card states; install distillbench again, or make it with `zoo train`")
    network = load_network(folder)
    try:
        denoiser = Denoiser(network, from_config(card["schedule"]), card["prediction"])
    except (KeyError, TypeError, DistillbenchError) as error:
        raise BadFileError(f"{folder / CARD}: does not say how the network is read ({error}); install distillbench again") from None
    external(network)
    external(denoiser)
    return denoiser
