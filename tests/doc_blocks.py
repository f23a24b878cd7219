"""The fenced blocks of a page: what is run, and what the page says it prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """kind: the word after the fence.  shown: the text block that follows, "" if there is none.  span: of `shown` in the page."""

    kind: str
    code: str
    shown: str = ""
    span: tuple[int, int] = (0, 0)


def blocks(page: str) -> list[Block]:
    """Every block that is code, in order, with the output that the page shows right below it."""
    found, matches = [], list(FENCE.finditer(page))
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        if match[1] == "text":
            continue
        below = following is not None and following[1] == "text" and not page[match.end() : following.start()].strip()
        found.append(Block(match[1], match[2], *((following[2], following.span(2)) if below else ())))
    return found
