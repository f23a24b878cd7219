"""Entry points, files and objects -> methods. Reads a method's `info` from its source, so that listing imports no torch."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError, unknown
from .info import Claim, MethodInfo, Search

if TYPE_CHECKING:
    from .api import Method

GROUP = "distillbench.methods"
_CARDS: dict[str, Any] = {"MethodInfo": MethodInfo, "Claim": Claim, "Search": Search}  # what may stand in an info


@dataclass(frozen=True)
class Found:
    """A method that was found: its card, where it is written, and how to load it. module is None for a lone file."""

    info: MethodInfo
    path: Path
    class_name: str
    module: str | None = None

    def load(self) -> type[Method]:
        """Import the class (this runs the method's file, and imports torch). Raises `UsageError` if that fails."""
        from .api import Method

        try:
            module = importlib.import_module(self.module) if self.module else _import_file(self.path, self.source_sha256)
        except (Exception, SystemExit) as error:
            if os.environ.get("DISTILLBENCH_DEBUG"):
                raise
            text = " ".join(str(error).split())[:300]
            raise UsageError(f"{self.path.name} fails on import: {type(error).__name__}: {text}") from error
        found = getattr(module, self.class_name, None)
        if not (inspect.isclass(found) and issubclass(found, Method)):
            raise UsageError(f"{self.path.name}: {self.class_name} is no distillbench.api.Method; let it inherit from Method")
        return found

    @property
    def source_sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def sources(self) -> dict[str, str]:
        """File name -> sha256 of the method's file and, for an installed method, of the files beside it that it may extend."""
        files = sorted(self.path.parent.glob("*.py")) if self.module else [self.path]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.stem != "__init__"}


@lru_cache
def harness_sha256() -> str:
    """One sha256 over all sources of the harness."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.relative_to(Path(__file__).parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def discover() -> dict[str, Found]:
    """Every installed method by id."""
    found: dict[str, Found] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        module, _, class_name = entry.value.partition(":")
        path = _source_of(module, entry.name)
        info = _one_info(path, class_name)
        if info.id in found and found[info.id].path != path:
            raise UsageError(f"two installed methods are called {info.id!r}: {found[info.id].path.name} and {path.name}; rename one")
        found[info.id] = Found(info, path, class_name, module)
    return found


@lru_cache
def _source_of(module: str, name: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise UsageError(f"the entry point {name!r} of group {GROUP} names {module!r}, which cannot be found; reinstall that package")
    return Path(spec.origin)


def find(target: Any) -> Found:
    """A method by id, by file (`path.py` or `path.py:Class`), or by class (which is found again in the file that defines it)."""
    if inspect.isclass(target):
        installed = [found for found in discover().values() if (found.module, found.class_name) == (target.__module__, target.__qualname__)]
        return installed[0] if installed else find(f"{_file_of(target)}:{target.__qualname__}")
    text = str(target)
    head, _, class_name = text.rpartition(":") if ".py:" in text else (text, "", "")
    if head.endswith(".py"):
        path = Path(head)
        if not path.is_file():
            raise UsageError(f"no file {head!r}; name a method's id, or a file path.py or path.py:Class")
        chosen = class_name or _only_class(path)
        return Found(_one_info(path, chosen), path, chosen)
    methods = discover()
    if text not in methods:
        raise unknown("method", text, methods)
    return methods[text]


def target_of(method: Any) -> str:
    """The text by which a worker process finds the same method again: an id, or `path.py:Class`."""
    if isinstance(method, str):
        return method
    found = find(method)
    return found.info.id if found.module else f"{found.path}:{found.class_name}"


def _file_of(target: type) -> str:
    try:
        path = inspect.getfile(target)
    except (TypeError, OSError):
        path = ""
    if not path.endswith(".py"):
        raise UsageError(f"{target.__qualname__} is not written in a file, so no worker and no later run could find it; put it in one")
    return path


def _only_class(path: Path) -> str:
    names = list(_classes(path))
    if len(names) != 1:
        what = "no method (a class with `info = MethodInfo(...)`)" if not names else f"{len(names)} methods ({', '.join(names)})"
        raise UsageError(
            f"{path.name} holds {what}; " + ("write one, or see docs/contract.md" if not names else f"say which: {path.name}:{names[0]}")
        )
    return names[0]


def _classes(path: Path) -> dict[str, ast.Call]:
    """The classes of a file that state an `info = MethodInfo(...)`."""
    try:
        return _classes_in(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read ({error.strerror})") from None
    except SyntaxError as error:
        raise UsageError(f"{path.name} is no valid Python: {error.msg} (line {error.lineno})") from None
    except (ValueError, RecursionError, MemoryError) as error:  # not UTF-8, null bytes, nested beyond reason
        raise UsageError(f"{path.name} is no valid Python: {error}") from None


@lru_cache
def _classes_in(source: str) -> dict[str, ast.Call]:
    tree = ast.parse(source)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                targets = item.targets if isinstance(item, ast.Assign) else [item.target] if isinstance(item, ast.AnnAssign) else []
                value = getattr(item, "value", None)
                if any(isinstance(t, ast.Name) and t.id == "info" for t in targets) and isinstance(value, ast.Call):
                    found[node.name] = value
    return found


def _one_info(path: Path, class_name: str) -> MethodInfo:
    classes = _classes(path)
    if class_name not in classes:
        raise unknown(f"method class in {path.name}", class_name, classes)
    try:
        info = _literal(classes[class_name])
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path.name}: the info of {class_name} is wrong: {error}") from None
    if not isinstance(info, MethodInfo):
        raise UsageError(f"{path.name}: the info of {class_name} is no MethodInfo(...)")
    if not isinstance(info.id, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", info.id) or info.id in ("all", "teacher", "truth"):
        raise UsageError(f"{path.name}: the id of {class_name} is {info.id!r}; write a short name of letters, digits, _ . -")
    if not isinstance(info.steps, tuple) or not info.steps or any(type(n) is not int or n < 1 for n in info.steps):
        raise UsageError(f"{path.name}: steps of {class_name} is {info.steps!r}; write a tuple of step counts such as (1, 2, 4)")
    return info


def _literal(node: ast.expr) -> Any:
    """A literal in which MethodInfo(...), Claim(...) and Search(...) may stand."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CARDS:
        kind = _CARDS[node.func.id]
        if any(keyword.arg is None for keyword in node.keywords):
            raise ValueError("** is not read here; write its fields as literals")
        return kind(*[_literal(a) for a in node.args], **{str(k.arg): _literal(k.value) for k in node.keywords})
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)[:60]!r} (line {node.lineno}) is no literal; write strings, numbers and tuples out") from None


@lru_cache
def _import_file(path: Path, source_sha256: str) -> Any:
    """The module of a lone file: run once a process, and again when its text has changed."""
    name = f"distillbench_file_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{source_sha256[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path.name} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
