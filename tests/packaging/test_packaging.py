"""The wheel: what it holds, and that it works from outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(CHECKOUT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a clean environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    found = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [sys.executable, "-m", "pip", "--python", str(found), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return found


def run(python: Path, *words: str, cwd: Path) -> str:
    """A command of the installed package. What it depends on is borrowed from this environment, the checkout is not."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DISTILLBENCH"))}
    environment["PYTHONPATH"] = sysconfig.get_paths()["purelib"]  # its .pth files, and so the checkout, are not followed from there
    done = subprocess.run([str(python.parent / words[0]), *words[1:]], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_top_level_names(wheel):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    version = wheel.name.split("-")[1]
    assert tops == {"distillbench", "distillbench_methods", f"distillbench-{version}.dist-info"}


def test_everything_that_is_no_code_is_inside(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"distillbench_methods/recipes/{path.name}" for path in (CHECKOUT / "methods/distillbench_methods/recipes").glob("*.toml")}
    for folder in ("distillbench/teachers/weights", "distillbench/data/files"):
        wanted |= {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / folder).rglob("*") if path.is_file()}
    published = CHECKOUT / "leaderboards"
    wanted |= {f"distillbench/published/{path.relative_to(published).as_posix()}" for path in published.rglob("*.json")}
    assert "distillbench/teachers/weights/mixture2d/network.safetensors" in wanted
    assert "distillbench/data/files/digits.npz" in wanted
    assert wanted - inside == set()
    assert not [name for name in inside if name.startswith(("tests", "benchmarks")) or "__pycache__" in name]


def test_methods_are_listed_from_outside_the_checkout(python, tmp_path):
    from distillbench.discovery import discover

    rows = json.loads(run(python, "distillbench", "list", "methods", "--json", cwd=tmp_path))
    assert {row["id"] for row in rows} == set(discover())


def test_the_installed_package_is_the_one_that_runs_and_finds_its_files(python, tmp_path):
    code = (
        "import distillbench, distillbench_methods, sys; from distillbench.discovery import discover;"
        "from distillbench.teachers.zoo import ZOO; from distillbench.published import published_folder;"
        "found = [distillbench.__file__, distillbench_methods.__file__, *(str(m.path) for m in discover().values())];"
        "found += [str(entry.folder) for entry in ZOO.values()]; print([f for f in found if not f.startswith(sys.prefix)]);"
        "print('torch' in sys.modules)"
    )
    assert run(python, "python", "-c", code, cwd=tmp_path) == "[]\nFalse\n"
    assert "mixture2d" in run(python, "distillbench", "zoo", "list", cwd=tmp_path)
