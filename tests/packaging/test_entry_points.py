"""docs/sample-repository, as a stranger would install it: built, found by its entry point, and held by its own CI."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distillbench.scaffold import method_text

SAMPLE = Path(__file__).parents[2] / "docs/sample-repository"
WORKFLOW = (SAMPLE / ".github/workflows/method.yml").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the sample; its package is built from it into the folder `installed` beside it, and its source is taken from the path."""
    folder = tmp_path_factory.mktemp("stranger") / "repository"
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns(".*cache", "__pycache__", ".distillbench"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(folder.parent / "installed"), str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def shell(command: str, repository: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DISTILLBENCH", "PYTEST"))}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))
    environment |= {"PYTHONPATH": str(repository.parent / "installed"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(["bash", "-c", command], cwd=repository, env=environment, capture_output=True, text=True)


def said(command: str, repository: Path, **variables: str) -> str:
    done = shell(command, repository, **variables)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_it_is_listed_beside_the_built_in_methods(repository):
    rows = {row["id"] for row in json.loads(said("distillbench list methods --json", repository))}
    assert {"cd", "dmd2", "endpoint"} <= rows
    assert "endpoint" not in {row["id"] for row in json.loads(said("env -u PYTHONPATH distillbench list methods --json", repository))}


def test_it_runs_by_its_id_and_keeps_its_version(repository):
    said("distillbench run endpoint mixture2d --budget 20steps --store ../runs", repository)
    (file,) = (repository.parent / "runs/records").glob("*.json")
    record = json.loads(file.read_text())
    assert (record["method"], record["method_version"], record["source_sha256"], record["status"]) == ("endpoint", 1, None, "ok")
    assert "endpoint.py" in record["provenance"]


def test_a_new_method_may_not_take_its_id(repository):
    refused = shell("distillbench new endpoint.py", repository)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "an installed method is called 'endpoint' already" in refused.stderr
    assert not (repository / "endpoint.py").exists()


def test_the_steps_of_its_ci_pass(repository):
    """Everything the workflow runs, at a small budget, apart from the installation and what GitHub's own actions do."""
    steps = re.findall(r"^ +run: (?!\|)(.+)$", WORKFLOW, re.MULTILINE)
    assert [step.split()[:3] for step in steps] == [
        ["distillbench", "check", "endpoint"], ["python", "-m", "pytest"],
        ["distillbench", "gate", "src/endpoint_distillation/endpoint.py"],
    ]  # fmt: skip
    check, tests, gate = steps
    store = {"DISTILLBENCH_STORE": ".distillbench", "SEEDS": "3"}
    assert "FAIL" not in said(check, repository, **store)
    assert "1 passed" in said(f"{tests} -p no:cacheprovider", repository, **store)
    assert "--budget S --seeds 5" in gate
    small = gate.replace("--budget S --seeds 5", "--budget 2e5passes --seeds 3")  # what the tests have trained
    assert said(small, repository, **store).startswith(("BETTER: endpoint against cd", "NOT WORSE: endpoint against cd"))


def test_its_regression_test_fails_on_a_regression(repository):
    """A student that learns the opposite, which conforms and trains like the real one, in the installed file that the test names."""
    file = repository.parent / "installed/endpoint_distillation/endpoint.py"
    good = file.read_text()
    bad = good.replace("(ends - torch.cat([x] * POINTS))", "(ends + torch.cat([x] * POINTS))")
    assert bad != good
    file.write_text(bad)
    try:
        done = shell("python -m pytest -p no:cacheprovider", repository, DISTILLBENCH_STORE=".distillbench", SEEDS="3")
    finally:
        file.write_text(good)
    assert done.returncode == 1
    assert "AssertionError: WORSE: endpoint against cd" in done.stdout


def test_its_method_is_what_new_writes_with_the_changes_of_the_guide():
    file = SAMPLE / "src/endpoint_distillation/endpoint.py"
    text = file.read_text(encoding="utf-8")
    (year,) = re.findall(r"year=(\d+)", text)
    expected = method_text(file, "endpoint", year=int(year)).replace("knob(1e-3,", "knob(4e-3,").replace(".square()", ".abs()")
    assert text == expected
