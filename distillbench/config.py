"""A method's knobs: from its defaults, a track's recipe and the command line, each checked and each remembered."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError, unknown


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Tuned values of one method on one track, with the trials they took and the passes these cost."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    trials: int = 0
    passes: float = 0.0


def load_recipe(folder: Path, track: str, method: str) -> Recipe:
    """The section `[method]` of `recipes/<track>.toml` beside the method's file; empty if there is none."""
    path = folder / "recipes" / f"{track}.toml"
    if not path.exists():
        return Recipe()
    try:
        entry = tomllib.loads(path.read_text(encoding="utf-8")).get(method, {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} is no valid TOML: {error}") from None
    tuning = entry.get("tuning", {})
    return Recipe(entry.get("values", {}), int(tuning.get("trials", 0)), float(tuning.get("passes", 0.0)))


def parse_settings(settings: typing.Iterable[str]) -> dict[str, str]:
    """`["key=value", ...]` as a mapping."""
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {setting!r} is not key=value")
        parsed[key.strip()] = value.strip()
    return parsed


def as_text(value: Any) -> str:
    """A knob's value as `--set` would give it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def make_config(config_class: type, method: str, *layers: Mapping[str, Any]) -> Any:
    """The method's Config with the layers put over its defaults; text is read as the knob's type, and ranges are held."""
    if not dataclasses.is_dataclass(config_class):
        raise UsageError(f"{method}: its Config is no dataclass; write @dataclass(frozen=True) above it")
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    values: dict[str, Any] = {}
    for layer in layers:
        for name, raw in layer.items():
            if name not in fields:
                raise unknown(f"knob of {method}", name, fields)
            values[name] = _check(method, fields[name], _read(method, name, raw, hints[name]))
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:  # what its __post_init__ refuses, or a knob without a default
        raise UsageError(f"{method}: {error}") from None


_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _read(method: str, name: str, raw: Any, hint: Any) -> Any:
    """`raw` (text from the command line, or a TOML value) as the type `hint`."""
    wanted = _WANTED.get(hint, str(hint))
    try:
        if hint is bool:
            table = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
            return raw if isinstance(raw, bool) else table[str(raw).lower()]
        if isinstance(raw, bool):
            raise ValueError
        if hint is int:
            if float(raw) != int(float(raw)):
                raise ValueError
            return int(float(raw))
        if hint in (float, str):
            return hint(raw)
        if typing.get_origin(hint) is tuple:
            wanted = "comma-separated values"
            items = [part.strip() for part in raw.split(",") if part.strip()] if isinstance(raw, str) else list(raw)
            return tuple(_read(method, name, item, typing.get_args(hint)[0]) for item in items)
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(inner) == 1:  # X | None
            return None if raw is None or str(raw).lower() == "none" else _read(method, name, raw, inner[0])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UsageError(f"knob {name} of {method} takes {wanted}, not {raw!r}") from None
    raise UsageError(f"knob {name} of {method} cannot be set from text")


def _check(method: str, field: dataclasses.Field, value: Any) -> Any:
    meta = field.metadata
    low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
    if choices and value not in choices:
        raise unknown(f"value of knob {field.name} of {method}", str(value), choices)
    for item in value if isinstance(value, tuple) else (value,):
        number = isinstance(item, (int, float)) and not isinstance(item, bool)
        if not number:
            continue
        if not math.isfinite(item):
            raise UsageError(f"knob {field.name} of {method} is {item}; it takes a finite number")
        if (low is not None and item < low) or (high is not None and item > high):
            span = f"from {low}" if high is None else f"up to {high}" if low is None else f"from {low} to {high}"
            raise UsageError(f"knob {field.name} of {method} is {item}; it goes {span}")
    return value
