"""docs/concepts.md: each example is run on the published records, and prints what the page says.

After publishing: `PYTHONPATH=tests python tests/docs/test_concepts.py` writes the outputs into the page again.
"""

from __future__ import annotations

import contextlib
import io

import pytest

from doc_blocks import DOCS, Block, blocks

PAGE = DOCS / "concepts.md"
EXAMPLES = [block for block in blocks(PAGE.read_text(encoding="utf-8")) if block.kind == "python"]


def printed(block: Block) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.code, PAGE.name, "exec"), {})
    return out.getvalue()


def test_every_idea_has_one_example():
    ideas = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    assert [len([block for block in blocks(idea) if block.kind == "python"]) for idea in ideas] == [1] * 5


@pytest.mark.parametrize("example", EXAMPLES, ids=["budget", "identity", "seeds", "boards", "claims"])
def test_an_example_prints_what_the_page_says(example):
    assert printed(example) == example.shown, f"{PAGE.name} is stale: PYTHONPATH=tests python tests/docs/test_concepts.py"
    assert example.shown


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for example in reversed([block for block in blocks(text) if block.kind == "python"]):
        start, end = example.span
        text = text[:start] + printed(example) + text[end:]
    PAGE.write_text(text, encoding="utf-8")
