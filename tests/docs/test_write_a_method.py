"""docs/write-a-method.md, typed along: every command runs, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from doc_blocks import DOCS, Block, blocks

PAGE = (DOCS / "write-a-method.md").read_text(encoding="utf-8")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # nine trainings and a board: minutes on a busy machine


def typed(block: Block, folder: Path) -> str:
    """What the block prints; stops at the first command that fails on the way, gates apart."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTILLBENCH")}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))
    environment |= {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    if block.kind == "python":
        command = [sys.executable, "-c", block.code]
    else:
        lines = [line.removeprefix("$ ") for line in block.code.splitlines() if line.startswith("$ ")]
        command = ["bash", "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def words(text: str) -> list[str]:
    """The text without its numbers, which differ in their last digits between machines."""
    return re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "", text).split()


def test_the_page_can_be_typed_along(tmp_path):
    printed = {}
    for block in blocks(PAGE):
        out = printed[block.code] = typed(block, tmp_path)
        if block.shown:
            assert words(out) == words(block.shown), f"the page shows another output of {block.code}: {out}"
    first, second = (out for code, out in printed.items() if "distillbench gate" in code)
    status = {"BETTER": "0", "NOT": "0", "WORSE:": "1", "UNDECIDED:": "3"}
    assert first.split()[-1] == status[re.match(r"BETTER|NOT|WORSE:|UNDECIDED:", first)[0]]  # whichever way it goes against cd
    assert second.startswith("BETTER: my_abs against my_method")
    assert second.split()[-1] == "0"


def test_every_block_is_run_or_shows_what_was_printed():
    assert set(re.findall(r"^```(\w+)", PAGE, re.MULTILINE)) == {"console", "python", "text"}
    assert len([block for block in blocks(PAGE) if block.shown]) == len(re.findall(r"^```text", PAGE, re.MULTILINE))
