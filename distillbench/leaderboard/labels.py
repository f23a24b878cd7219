"""What tells two rows of one label apart, and how many students were trained for a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..records import RunRecord, digest

Groups = Sequence[tuple[int, list[RunRecord]]]

# In the order in which they are tried; each is a mark that is appended to labels which would otherwise collide.
_MARKS = (
    lambda record: f"@{record.method_version}",
    lambda record: " " + (record.source_sha256 or "built-in")[:8],
    lambda record: f" {record.device_class}",
    lambda record: f" {record.dtype}",
    lambda record: f" {record.threads}t",
    lambda record: f" rules {record.rules}",
    lambda record: " for " + ",".join(map(str, record.trained_for)),
    lambda record: " config " + digest(record.config)[:6],
)


def distinct_labels(groups: Groups) -> dict[str, str]:
    """Setting -> label. Rows of one label, budget and step count that come from different settings get what tells them apart."""
    rivals: dict[tuple[object, ...], dict[str, RunRecord]] = {}
    for steps, records in groups:
        budget = records[0].budget
        place = (records[0].label, budget and budget["unit"], budget and float(budget["amount"]), steps)
        rivals.setdefault(place, {})[records[0].setting] = records[0]
    labels = {records[0].setting: records[0].label for _, records in groups}
    for settings in rivals.values():
        if len(settings) < 2:
            continue
        marks = [mark for mark in _MARKS if len({mark(record) for record in settings.values()}) > 1]
        for setting, record in settings.items():
            labels[setting] = record.label + "".join(mark(record) for mark in marks)
    return labels


def trainings(records: Sequence[RunRecord], labels: Mapping[str, str]) -> dict[str, int]:
    """Setting -> k. A method that trains a student per step count has k settings of one label and budget that share no step count."""
    families: dict[tuple[object, ...], dict[str, tuple[int, ...]]] = {}
    place_of: dict[str, tuple[object, ...]] = {}
    for record in records:
        budget = record.budget
        place_of[record.setting] = (labels[record.setting], budget and budget["unit"], budget and float(budget["amount"]))
        families.setdefault(place_of[record.setting], {})[record.setting] = tuple(sorted(record.trained_for))
    counts = {}
    for setting, place in place_of.items():
        students = set(families[place].values())
        apart = len({step for student in students for step in student}) == sum(map(len, students))
        counts[setting] = len(students) if apart else 1
    return counts
