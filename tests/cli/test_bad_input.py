"""Wrong input gets one or two lines on stderr, the nearest valid names, exit status 2, and no traceback."""

from __future__ import annotations

import json
import os

import pytest

import distillbench as package
import method_files
from distillbench.errors import UsageError

WRONG = {
    "method": ("run dmd22 mixture2d", "unknown method 'dmd22': did you mean dmd2"),
    "track": ("run cd mixture3d", "did you mean mixture2d"),
    "track version": ("board mixture2d@9", "did you mean mixture2d@1"),
    "bench track": ("bench digit", "did you mean digits"),
    "bench method": ("bench mixture2d --methods cd,dmd22", "did you mean dmd2"),
    "bench no method": ("bench mixture2d --methods ,", "names no method"),
    "list": ("list metric", "did you mean metrics"),
    "format": ("board mixture2d --format latx", "did you mean latex"),
    "budget": ("run cd mixture2d --budget XL", "write S, M, L or a number with a unit"),
    "bench budget": ("bench mixture2d --budget 5e6", "a number with a unit"),
    "budget of nothing": ("run cd mixture2d --budget 0steps", "must be above 0"),
    "knob": ("run cd mixture2d --set pints=3", "did you mean points"),
    "knob without value": ("run cd mixture2d --set points", "is not key=value"),
    "knob of the wrong type": ("run cd mixture2d --set points=many", "takes a whole number, not 'many'"),
    "knob with a fraction": ("run cd mixture2d --set points=20.5", "takes a whole number, not '20.5'"),
    "switch": ("run dmd2 mixture2d --set gan=perhaps", "takes true or false, not 'perhaps'"),
    "knob too low": ("run cd mixture2d --set points=1", "it goes from 2 to 4096"),
    "knob too high": ("run cd mixture2d --set target_ema=1.5", "it goes from 0 to 0.999"),
    "knob nan": ("run cd mixture2d --set lr=nan", "takes a finite number"),
    "knob inf": ("run cd mixture2d --set lr=inf", "takes a finite number"),
    "knob choice": ("run cd mixture2d --set solver=huen", "did you mean heun"),
    "knobs together": ("run cd mixture2d --set points=10 --set skip=20", "leaps over the whole grid"),
    "knob that build refuses": ("run cd mixture2d --set w_range=5,15", "outside w_range"),
    "steps 0": ("run cd mixture2d --steps 0", "step counts start at 1"),
    "steps text": ("run cd mixture2d --steps one", "not a list of whole numbers"),
    "steps empty": ("run cd mixture2d --steps=", "not a list of whole numbers"),
    "steps not offered": ("run cd mixture2d --steps 3", "made for 1, 2, 4, 8 steps, not 3"),
    "jobs 0": ("bench mixture2d --jobs 0", "'--jobs'"),
    "seeds 0": ("bench mixture2d --seeds 0", "'--seeds'"),
    "seed -1": ("run cd mixture2d --seed -1", "'--seed'"),
    "seed text": ("run cd mixture2d --seed first", "'--seed'"),
    "command": ("bnch mixture2d", "bench"),
    "option": ("bench mixture2d --job 1", "--jobs"),
    "no track": ("run cd", "Missing argument 'TRACK'"),
    "run": ("show 0123", "no run '0123'"),
    "zoo": ("zoo train mixture", "did you mean mixture2d"),
    "check": ("check cdd", "did you mean cd"),
    "file": ("run nothing.py mixture2d", "no file 'nothing.py'"),
}


@pytest.mark.parametrize(("words", "told"), WRONG.values(), ids=WRONG.keys())
def test_wrong_words(distillbench, words, told):
    status, out, err = distillbench(*words.split())
    assert (status, out) == (2, "")
    assert told in err
    assert 1 <= len(err.splitlines()) <= 2
    assert "Traceback" not in err


BROKEN = {
    "no method": ("x = 1\n", "holds no method"),
    "empty": ("", "holds no method"),
    "two methods": (method_files.TINY + method_files.TINY.replace("class Tiny", "class Other"), "holds 2 methods (Tiny, Other)"),
    "syntax error": ("class Tiny(:\n", "is no valid Python"),
    "null bytes": ("x = '\0'\n", "is no valid Python"),
    "fails on import": ("raise RuntimeError('no licence')\n" + method_files.TINY, "fails on import: RuntimeError: no licence"),
    "missing import": ("import no_such_package\n" + method_files.TINY, "No module named 'no_such_package'"),
    "leaves on import": ("import sys; sys.exit(0)\n" + method_files.TINY, "fails on import: SystemExit"),
    "not a Method": (method_files.TINY.replace("class Tiny(Method)", "class Tiny"), "let it inherit from Method"),
    "computed info": (method_files.TINY.replace("steps=(1, 2)", "steps=tuple(range(1, 3))"), "'tuple(range(1, 3))'"),
    "half a card": (method_files.TINY.replace('title="A tiny method",', ""), "missing 1 required positional argument: 'title'"),
    "unknown need": (method_files.TINY.replace('needs=("labels",)', 'needs=("label",)'), "unknown need 'label'"),
    "steps no tuple": (method_files.TINY.replace("steps=(1, 2)", "steps=1"), "write a tuple of step counts"),
    "id with spaces": (method_files.TINY.replace('id="tiny"', 'id="my method"'), "the id of Tiny"),
    "plain Config": (method_files.TINY.replace("    @dataclass(frozen=True)\n", ""), "Config is no dataclass"),
}


@pytest.mark.parametrize(("text", "told"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("command", ["run", "bench"])
def test_broken_files(distillbench, tmp_path, command, text, told):
    (tmp_path / "mine.py").write_text(text)
    words = ["run", "mine.py", "mixture2d"] if command == "run" else ["bench", "mixture2d", "--methods", "mine.py"]
    status, out, err = distillbench(*words, *(["--steps", "1"] if command == "run" else []))
    assert (status, out) == (2, "")
    assert told in err
    assert "mine.py" in err or "tiny" in err
    assert 1 <= len(err.splitlines()) <= 2


def test_a_class_is_named_after_a_colon(distillbench, tmp_path):
    (tmp_path / "two.py").write_text(method_files.TINY + method_files.TINY.replace("class Tiny", "class Other"))
    status, out, _ = distillbench("bench", "mixture2d", "--methods", "two.py:Other", "--plan")
    assert status == 0
    assert [job["target"] for job in json.loads(out)] == ["teacher", "truth", "two.py:Other"]
    wrong = distillbench("run", "two.py:Tiney", "mixture2d")
    assert (wrong.status, "did you mean Tiny" in wrong.err) == (2, True)


def test_a_store_that_is_a_file(distillbench, tmp_path):
    (tmp_path / "file").write_text("")
    for words in ("board mixture2d", "bench mixture2d", "run cd mixture2d", "show 01"):
        status, out, err = distillbench(*words.split(), "--store", "file")
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert "the store file is a file" in err


@pytest.mark.parametrize("words", ["run {tiny} mixture2d --steps 1 --budget 1steps", "bench mixture2d --methods {tiny} --budget 1steps"])
def test_a_store_that_cannot_be_written_is_refused_before_training(distillbench, tmp_path, words):
    (tmp_path / "file").write_text("")
    tiny = method_files.write(tmp_path / "tiny.py", method_files.in_loss("raise RuntimeError('trained')"))
    status, out, err = distillbench(*words.format(tiny=tiny).split(), "--store", "file/store")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "the store file/store cannot be written" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_without_permission(distillbench, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    status, _, err = distillbench("run", "cd", "mixture2d", "--store", "closed/store")
    assert (status, "cannot be written" in err) == (2, True)


def test_a_damaged_record_is_named_and_set_aside(distillbench, tmp_path):
    folder = tmp_path / "store" / "records"
    folder.mkdir(parents=True)
    (folder / "0123456789abcdef.json").write_text('{"half": ')
    status, out, err = distillbench("board", "mixture2d")
    assert status == 0
    assert "0123456789abcdef.json" in err
    assert "set aside" in err
    assert "no runs yet" in out
    assert (tmp_path / "store" / "set-aside" / "0123456789abcdef.json").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "cdd"},
        {"track": "mixture"},
        {"budget": "XL"},
        {"steps": (0,)},
        {"steps": ()},
        {"settings": {"lr": float("nan")}},
        {"seed": -1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_python_raises_usage_error(tmp_path, wrong):
    with pytest.raises(UsageError):
        package.run(**{"method": "cd", "track": "mixture2d", "store": tmp_path / "store", **wrong})
