"""Cards: what a shipped file is, where it came from, and its checksum. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import BadFileError

CARD = "card.json"


def read_card(folder: Path) -> dict[str, Any]:
    """The card in `folder`. Raises BadFileError where it is missing or not a card."""
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror}); install distillbench again, or make it with `zoo train`") from None
    except (ValueError, RecursionError):
        raise BadFileError(f"{path}: not a json file; install distillbench again, or make it with `zoo train`") from None
    if not isinstance(card, dict) or not isinstance(card.get("sha256"), str):
        raise BadFileError(f"{path}: not the card of a teacher; install distillbench again, or make it with `zoo train`")
    return card
