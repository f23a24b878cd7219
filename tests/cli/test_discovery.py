"""Methods are found by id, by file and by class, and read without being run."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import method_files
from distillbench import discovery
from distillbench.api import Method
from distillbench.errors import UsageError
from distillbench.info import Claim, MethodInfo


def test_installed_methods_are_found_and_are_what_their_source_says():
    found = discovery.discover()
    assert {"cd", "dmd2"} <= set(found)
    for name, one in found.items():
        method = one.load()
        assert issubclass(method, Method)
        assert method.info == one.info
        assert method.info.id == name


def test_by_file_by_class_name_and_by_class(tmp_path):
    file = method_files.write(tmp_path / "tiny.py")
    found = discovery.find(str(file))
    assert (found.info.id, found.class_name, found.module) == ("tiny", "Tiny", None)
    assert discovery.find(f"{file}:Tiny") == discovery.find(file) == found
    loaded = found.load()
    assert loaded.info == found.info
    assert discovery.find(loaded) == found
    dmd2 = discovery.find("dmd2")
    assert discovery.find(dmd2.load()) == dmd2


def test_the_card_is_read_without_running_the_file(tmp_path):
    ran = tmp_path / "ran"
    text = f"open({str(ran)!r}, 'w')\n" + method_files.TINY.replace(
        'data_access="conditions"',
        'data_access="conditions", deviations=("none" " yet",), claims=(Claim("a", "b", "c", "d", margin=-0.5),)',
    ).replace("import Ema", "import Claim, Ema")
    file = tmp_path / "tiny.py"
    file.write_text(text)
    info = discovery.find(str(file)).info
    assert isinstance(info, MethodInfo)
    assert (info.deviations, info.claims) == (("none yet",), (Claim("a", "b", "c", "d", margin=-0.5),))
    assert not ran.exists()
    assert discovery.find(str(file)).load().info == info
    assert ran.exists()


def test_a_file_is_run_once_and_again_when_it_was_edited(tmp_path):
    file = method_files.write(tmp_path / "tiny.py")
    first = discovery.find(str(file))
    assert first.load() is discovery.find(str(file)).load()
    method_files.write(file, method_files.named("edited"))
    second = discovery.find(str(file))
    assert (second.info.id, second.load().info.id) == ("edited", "edited")
    assert second.source_sha256 != discovery.hashlib.sha256(method_files.TINY.encode()).hexdigest()


def installed(monkeypatch, tmp_path, *names: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    entries = [EntryPoint(name, f"{name}:Tiny", discovery.GROUP) for name in names]
    monkeypatch.setattr(discovery, "entry_points", lambda group: entries)


def test_a_strangers_package_is_found(monkeypatch, tmp_path):
    method_files.write(tmp_path / "from_far_away.py", method_files.named("far"))
    installed(monkeypatch, tmp_path, "from_far_away")
    assert list(discovery.discover()) == ["far"]
    assert discovery.find("far").load().__module__ == "from_far_away"


def test_two_installed_methods_of_one_id(monkeypatch, tmp_path):
    for name in ("one_tiny", "other_tiny"):
        method_files.write(tmp_path / f"{name}.py")
    installed(monkeypatch, tmp_path, "one_tiny", "other_tiny")
    with pytest.raises(UsageError, match=r"two installed methods are called 'tiny': one_tiny.py and other_tiny.py"):
        discovery.discover()


def test_an_entry_point_to_nowhere_and_one_that_fails(monkeypatch, tmp_path):
    installed(monkeypatch, tmp_path, "no_such_module")
    with pytest.raises(UsageError, match="'no_such_module', which cannot be found"):
        discovery.discover()
    (tmp_path / "breaks.py").write_text(method_files.TINY + "\nimport no_such_package\n")
    installed(monkeypatch, tmp_path, "breaks")
    with pytest.raises(UsageError, match=r"breaks.py fails on import: ModuleNotFoundError"):
        discovery.find("tiny").load()


def test_a_class_without_a_file():
    typed = type("Typed", (Method,), {"__module__": "nowhere"})
    with pytest.raises(UsageError, match="Typed is not written in a file"):
        discovery.find(typed)


def test_reading_cards_imports_no_method(tmp_path):
    code = "import sys; from distillbench.discovery import discover; discover(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "distillbench.discovery" in imported
    assert [name for name in imported if name == "torch" or name.startswith("distillbench_methods.")] == []
