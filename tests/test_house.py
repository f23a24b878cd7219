"""The house: imports run one way, the harness knows no method, and what is published is what the pages show."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from distillbench.leaderboard import render
from distillbench.listing import board_of
from distillbench.methods_table import table
from distillbench.publish import brief, with_block
from distillbench.published import published_store
from distillbench.tracks.facts import FACTS

ROOT = Path(__file__).parent.parent
LAYERS = (
    {"errors", "info", "uncharged", "randomness", "conditions", "budget", "api", "record_checks", "records", "config", "discovery",
     "diffusion", "networks", "statistics", "torchvision_repair", "published_weights"},
    {"parts", "teachers", "data", "metrics"},
    {"tracks", "training"},
    {"store", "jobs", "published"},
    {"claims", "leaderboard"},
    {"runner", "latency", "latency_stages", "latency_subjects",
     "pool", "bench", "execution", "display", "remaining", "logs", "closing", "pictures", "listing", "report",
     "publish", "doctor", "conformance", "methods_table", "gate", "tuning", "testing", "scaffold", "submission", "packing",
     "agreement", "verification", "scoring", "scoring_images"},
    {"cli_options", "commands", "cli"},
)  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path: Path, package: tuple[str, ...]) -> set[str]:
    """Full names of the modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found |= {name} if node.module else {f"{name}.{alias.name}" for alias in node.names}
    return found


def harness_files() -> list[Path]:
    return sorted(path for path in (ROOT / "distillbench").rglob("*.py") if path.parent != ROOT / "distillbench" or path.stem != "__init__")


def test_every_module_has_its_layer():
    assert {path.relative_to(ROOT / "distillbench").parts[0].removesuffix(".py") for path in harness_files()} == set(RANK)


def test_imports_run_one_way():
    wrong = []
    for path in harness_files():
        parts = path.relative_to(ROOT).with_suffix("").parts
        for name in imports(path, parts[:-1]):
            pieces = name.split(".")
            if pieces[0] == "distillbench" and len(pieces) > 1 and pieces[1] in RANK and RANK[pieces[1]] > RANK[parts[1]]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_harness_never_imports_a_method():
    for path in harness_files():
        assert not any(name.startswith("distillbench_methods") for name in imports(path, ("distillbench",))), path


def test_methods_import_the_contract_and_parts_only():
    allowed = ("api", "diffusion", "networks", "parts", "errors")
    for path in (ROOT / "methods/distillbench_methods").glob("*.py"):
        for name in imports(path, ("distillbench_methods",)):
            if name.startswith("distillbench."):
                assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("track", list(FACTS))
def test_published_records_are_trusted_and_the_pages_show_them(track):
    store = published_store(track)
    board = board_of(track, store)
    assert not store.problems
    methods = {"shapes-sd": {"dmd2", "swiftbrush", "cd", "instaflow"}, "shapes-sana": {"scm", "sana_sprint", "progressive"}}
    assert {row.method for row in board.rows} >= methods.get(track, {"cd", "dmd2"}) | {"teacher", "truth"}
    for ending, form in (("md", "markdown"), ("tex", "latex"), ("csv", "csv")):
        assert (store.folder / f"table.{ending}").read_text() == render(board, form), f"table.{ending} is stale: make publish"
    readme = (ROOT / "README.md").read_text()
    assert with_block(readme, f"board {track}", brief(board)) == readme, "the README's table is stale: make publish"


def test_the_table_of_methods_is_current():
    assert (ROOT / "methods/README.md").read_text() == table() + "\n", "methods/README.md is stale: make methods-table"
