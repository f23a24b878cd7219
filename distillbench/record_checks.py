"""What a record must look like before it is believed, and how private strings are found and taken out."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import math
import re
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from .errors import BadFileError

Check = tuple[Callable[[Any], bool], str]

_PATH = re.compile(r"""file://\S+|(?<![\w/.~])~?/(?:[\w.@+-]+/)+[\w.@+-]*|(?<!\w)[A-Za-z]:[\\/]\w[^\s'"]*|\\\\\w[^\s'"]*""")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LABEL = re.compile(r"\w[\w.@+:-]*(\(.{1,300}\))?")
_PRIVATE_KEYS = {"user", "username", "host", "hostname", "node", "home", "cwd", "path", "folder"}
_COMMON_NAMES = {"root", "user", "runner", "ubuntu", "admin", "localhost"}  # they say nothing about anyone
SPENT = ("passes", "macs", "seconds", "processor_seconds", "updates", "cycles", "images", "peak_memory_mb")
UNITS = ("passes", "seconds", "steps")


def _is_int(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w[\w.@+:/-]{0,99}", value) is not None


def _is_hex(value: Any, length: int | None = None) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{8,64}", value) is not None and length in (None, len(value))


def _is_steps(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(step, 1) for step in value) and len(set(value)) == len(value)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_hex(inner, 64) for inner in value.values())


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).utcoffset() is not None
    except ValueError:
        return False


def _is_status(value: Any) -> bool:
    return isinstance(value, str) and (value == "ok" or re.match(r"(skipped|failed): \S", value) is not None)


def _is_budget(value: Any) -> bool:
    if value is None:
        return True
    known = isinstance(value, dict) and set(value) == {"name", "unit", "amount"}
    return known and _is_word(value["name"]) and value["unit"] in UNITS and _is_number(value["amount"]) and value["amount"] > 0


def _is_tuning(value: Any) -> bool:
    if value is None:
        return True
    return _is_dict(value) and set(value) == {"trials", "passes"} and _is_int(value["trials"], 0) and _is_amount(value["passes"])


def _is_spent(value: Any) -> bool:
    return _is_dict(value) and set(value) <= set(SPENT) and all(map(_is_amount, value.values()))


def score_key(identity: dict[str, Any]) -> str:
    """The same 16 digits as `metrics.score.Score.key`, here without its imports; a test holds the two together."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_score(score: Any) -> bool:
    names = {"name", "identity", "value", "low", "high", "n", "higher_is_better", "unit", "note"}
    if not isinstance(score, dict) or set(score) - {"key"} != names or not isinstance(score["identity"], dict):
        return False
    numbers = all(score[name] is None or _is_number(score[name]) for name in ("value", "low", "high"))
    words = _is_word(score["name"]) and all(isinstance(score[name], str) for name in ("unit", "note"))
    explained = score["value"] is not None or bool(score["note"])
    key = score.get("key")
    right_key = key is None or key == score_key(score["identity"])
    direction = score["higher_is_better"] is None or isinstance(score["higher_is_better"], bool)
    return numbers and words and explained and right_key and direction and _is_int(score["n"], 0)


def _is_scores(value: Any) -> bool:
    def names_once(scores: Any) -> bool:
        return isinstance(scores, list) and all(map(_is_score, scores)) and len({score["name"] for score in scores}) == len(scores)

    return isinstance(value, dict) and all(re.fullmatch(r"[1-9]\d*", key) for key in value) and all(map(names_once, value.values()))


def _is_environment(value: Any) -> bool:
    flat = isinstance(value, dict) and all(inner is None or isinstance(inner, (str, int, float)) for inner in value.values())
    return flat and not _PRIVATE_KEYS & {key.lower() for key in value}


def _is_ratio(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and set(value) == {"value", "low", "high"} and all(map(_is_amount, value.values())))


_ID: Check = (lambda value: _is_hex(value, 16), "16 hex digits")
_WORD: Check = (_is_word, "a name")
_COUNT: Check = (lambda value: _is_int(value, 1), "a whole number above 0")
_MAYBE_COUNT: Check = (lambda value: value is None or _is_int(value, 1), "a whole number above 0 or null")
_DICT: Check = (_is_dict, "an object")
_TIME: Check = (_is_time, "a time with its zone")
_ENVIRONMENT: Check = (_is_environment, "an object of texts and numbers, without user, host or path")
_AMOUNT: Check = (_is_amount, "a number, 0 or above")

RUN_CHECKS: dict[str, Check] = {
    "kind": (lambda value: value in ("run", "reference", "released"), '"run", "reference" or "released"'),
    "id": _ID,
    "track": (lambda value: _is_word(value) and re.fullmatch(r".+@\d+", value) is not None, "name@version"),
    "method": _WORD,
    "method_version": (lambda value: _is_int(value, 0), "a whole number"),
    "label": (lambda value: isinstance(value, str) and _LABEL.fullmatch(value) is not None, "a method's name with changed knobs"),
    "source_sha256": (lambda value: value is None or _is_hex(value, 64), "a sha256 or null"),
    "provenance": (_is_hashes, "an object of sha256"),
    "rules": _COUNT,
    "config": _DICT,
    "overrides": _DICT,
    "budget": (_is_budget, "null or name, unit (passes, seconds, steps) and an amount above 0"),
    "spent": (_is_spent, "amounts of " + ", ".join(SPENT)),
    "seed": (lambda value: _is_int(value, 0), "a whole number, 0 or above"),
    "threads": _COUNT,
    "dtype": _WORD,
    "device_class": _WORD,
    "steps": (lambda value: _is_steps(value) and bool(value), "a list of different whole numbers above 0"),
    "trained_for": (_is_steps, "a list of different whole numbers above 0"),
    "data_access": (lambda value: isinstance(value, str) and len(value) < 60, "a short text"),
    "family": (lambda value: isinstance(value, str) and len(value) < 60, "a short text"),
    "parameters": _MAYBE_COUNT,
    "tuning": (_is_tuning, "null or trials and passes"),
    "scores": (_is_scores, "lists of complete, finite scores by step count (a missing value needs a note)"),
    "evaluations": (lambda value: _is_dict(value) and all(_is_int(inner, 0) for inner in value.values()), "whole numbers by step count"),
    "status": (_is_status, '"ok", "skipped: why" or "failed: why"'),
    "environment": _ENVIRONMENT,
    "checksums": (_is_hashes, "an object of sha256"),
    "created": _TIME,
}  # fmt: skip

FILE_CHECKS: dict[str, Check] = {"files": (lambda value: bool(value) and _is_hashes(value), "an object of sha256")}

LATENCY_CHECKS: dict[str, Check] = {
    "kind": (lambda value: value == "latency", '"latency"'),
    "id": _ID,
    "track": RUN_CHECKS["track"],
    "subject": (lambda value: value == "teacher" or _is_hex(value, 16), 'a run\'s id or "teacher"'),
    "steps": _COUNT,
    "batch": _COUNT,
    "seconds": (lambda value: isinstance(value, list) and bool(value) and all(map(_is_amount, value)), "a list of seconds"),
    "median": _AMOUNT,
    "p10": _AMOUNT,
    "p90": _AMOUNT,
    "ratio": (_is_ratio, "null or value, low and high"),
    "reference_steps": _MAYBE_COUNT,
    "flagged": (lambda value: isinstance(value, bool), "true or false"),
    "threads": _COUNT,
    "dtype": _WORD,
    "device_class": _WORD,
    "created": _TIME,
    "environment": _ENVIRONMENT,
}


_STAGE_FIELDS: dict[str, Check] = {
    "label": (lambda value: isinstance(value, str) and 0 < len(value) <= 300, "a text"),
    "compiled": (lambda value: isinstance(value, bool), "true or false"),
    "compile_seconds": (lambda value: value is None or _is_amount(value), "a number, 0 or above, or null"),
    "peak_memory_mb": _AMOUNT,
    "evaluations": _COUNT,
    "seconds": (lambda value: _is_dict(value) and bool(value) and all(map(LATENCY_CHECKS["seconds"][0], value.values())),
                "a list of seconds a stage"),
    "macs": (lambda value: _is_dict(value) and all(map(_is_macs, value.values())), "matmul and elementwise a stage"),
}  # fmt: skip


def _is_macs(value: Any) -> bool:
    return _is_dict(value) and set(value) == {"matmul", "elementwise"} and all(_is_int(inner, 0) for inner in value.values())


def check_latency(data: object, where: str) -> dict[str, Any]:
    """As `check_fields`, with or without `stages` (older records have none)."""
    if not isinstance(data, dict) or "stages" not in data:
        return check_fields(data, LATENCY_CHECKS, where)
    checked = check_fields(data, LATENCY_CHECKS | {"stages": _DICT}, where)
    _check_stages(checked, where)
    return checked


def _check_stages(data: dict[str, Any], where: str) -> None:
    """Complete, of the same stages throughout, and summing to the record's seconds round by round."""
    stages = check_fields(data["stages"], _STAGE_FIELDS, f"{where}, stages")
    if set(stages["macs"]) != set(stages["seconds"]):
        raise BadFileError(f"{where}: its stages have seconds and multiply-adds of different stages")
    if (stages["compile_seconds"] is not None) != stages["compiled"]:
        raise BadFileError(f"{where}: compile_seconds belong to what was compiled, and to nothing else")
    if any(len(spent) != len(data["seconds"]) for spent in stages["seconds"].values()):
        raise BadFileError(f"{where}: its stages were not measured in the same rounds as the whole")
    for whole, *parts in zip(data["seconds"], *stages["seconds"].values(), strict=True):
        if abs(whole - sum(parts)) > 1e-6 * whole:
            raise BadFileError(f"{where}: the seconds of its stages do not sum to those of the whole")


def check_fields(data: object, checks: dict[str, Check], where: str) -> dict[str, Any]:
    """`data` again if it is an object with exactly these fields, each of its kind; else `BadFileError`."""
    if not isinstance(data, dict):
        raise BadFileError(f"{where}: not a record, a record is a JSON object")
    missing, foreign = sorted(set(checks) - set(data)), sorted(set(data) - set(checks))
    if missing:
        raise BadFileError(f"{where}: not a record of this version, it has no {', '.join(missing[:4])}")
    if foreign:
        raise BadFileError(f"{where}: not a record of this version, unknown {', '.join(repr(name)[:40] for name in foreign[:4])}")
    for name, (is_right, expected) in checks.items():
        if not is_right(data[name]):
            raise BadFileError(f"{where}: {name} should be {expected}, not {repr(data[name])[:60]}")
    return data


def check_run(data: dict[str, Any], where: str) -> None:
    """What fields of a run record owe to one another."""
    steps = {str(step) for step in data["steps"]}
    if (set(data["scores"]) | set(data["evaluations"])) - steps:
        raise BadFileError(f"{where}: has scores or evaluations for other step counts than its steps {data['steps']}")
    if data["status"] == "ok" and (set(data["scores"]) != steps or set(data["evaluations"]) != steps):
        raise BadFileError(f"{where}: says ok but lacks scores or evaluations for some of its steps {data['steps']}")
    if data["kind"] == "run" and data["budget"] is None:
        raise BadFileError(f"{where}: a run has a budget")
    if data["kind"] == "released" and (data["budget"] is not None or data["trained_for"] or data["spent"]):
        raise BadFileError(f"{where}: a released model was not trained here, so it has no budget, step counts trained for or costs")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def check_private(data: dict[str, Any], where: str) -> None:
    """`BadFileError` if any text holds an absolute path or a control character (which could repaint a terminal)."""
    for text in _texts(data):
        if _CONTROL.search(text):
            raise BadFileError(f"{where}: holds control characters in a text")
        found = _PATH.search(text)
        if found:
            raise BadFileError(f"{where}: holds an absolute path ({found[0][:40]!r}); records name no path, user or host")


def _short_path(match: re.Match[str]) -> str:
    """The file's name, with a hash of where it was, so that two files of one name stay two."""
    path = match[0]
    name = re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "path"
    return f"{name}#{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def scrub(value: Any) -> Any:
    """Plain data with every absolute path replaced by the file's name and a short hash. Scrubbing twice changes nothing."""
    if isinstance(value, str):
        return _CONTROL.sub(" ", _PATH.sub(_short_path, value))
    if isinstance(value, dict):
        return {scrub(key): scrub(inner) for key, inner in value.items()}
    return [scrub(inner) for inner in value] if isinstance(value, list) else value


def scrub_words(value: Any) -> Any:
    """Free text (or a flat object of it) without this machine's user and host name."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        names.add(getpass.getuser())
    names = {name for name in names if len(name) >= 3 and name.lower() not in _COMMON_NAMES}
    if isinstance(value, dict):
        return {key: scrub_words(inner) for key, inner in value.items()}
    if not isinstance(value, str) or not names:
        return value
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    return re.sub(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", "(private)", value)
