"""The repair of torchvision, each case in a process of its own: an install that cannot load, a healthy one, none, a hopeless one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str, *first_on_path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*first_on_path, ROOT)))}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def stand_in(folder: Path, body: str) -> Path:
    package = folder / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(body)
    return folder


NEEDS_OPERATORS = """
import torch

torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: dets)
"""


def test_an_install_without_operators_is_repaired(tmp_path):
    path = stand_in(tmp_path, NEEDS_OPERATORS)
    code = "from distillbench.torchvision_repair import repair_torchvision as r; print(r(), r()); import torchvision"
    assert run(code, path).split() == ["True", "True"]


def test_a_healthy_install_is_left_alone(tmp_path):
    path = stand_in(tmp_path, "loads = []\n")
    code = (
        "from distillbench.torchvision_repair import repair_torchvision as r, _kept; print(r(), r(), len(_kept)); import sys; "
        "print('torch' in sys.modules)"
    )
    assert run(code, path).split() == ["False", "False", "0", "False"]


def test_a_missing_install_stays_missing():
    code = (
        "import importlib.util as u, sys; find = u.find_spec; u.find_spec = lambda n, p=None: None if n == 'torchvision' else find(n, p)\n"
        "from distillbench.torchvision_repair import repair_torchvision as r\n"
        "print(r(), 'torchvision' in sys.modules, 'torch' in sys.modules)"
    )
    assert run(code).split() == ["False", "False", "False"]


HOPELESS = ("raise RuntimeError('built for CUDA 11')", "raise OSError('libx.so: not found\\nmore')", "import no_such_module_at_all")


@pytest.mark.parametrize("body", HOPELESS)
def test_a_hopeless_install_is_one_line(tmp_path, body):
    code = (
        "from distillbench.torchvision_repair import repair_torchvision as r; from distillbench.errors import UsageError\n"
        "try: r()\nexcept UsageError as e: print(e)"
    )
    lines = run(code, stand_in(tmp_path, body)).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("the installed torchvision cannot be imported (")
    assert "uninstall it, or install the build that belongs to your torch" in lines[0]


def test_image_packages_import_after_it():
    modules = ("open_clip", "cleanfid.features", "diffusers.models", "torchmetrics", "torch_fidelity", "timm")
    installed = [name for name in modules if importlib.util.find_spec(name.split(".")[0])]
    if not installed:
        pytest.skip("none of the packages that want torchvision is installed")
    run(f"from distillbench.torchvision_repair import repair_torchvision as r; r(); import {', '.join(installed)}")
