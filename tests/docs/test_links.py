"""Relative links of the pages lead to files and headings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "leaderboards").glob("*.md")),
         ROOT / "methods/README.md"]  # fmt: skip
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link: lower case, spaces as hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        found = (page.parent / target) if target else page
        assert found.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {link}, which has no such heading"


def test_the_pages_of_the_documentation_are_linked_from_the_readme():
    linked = {Path(link).as_posix() for link in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")} <= linked
