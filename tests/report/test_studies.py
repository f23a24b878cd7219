"""Studies: what is written is read, a file that is none is named, and the report shows the figure with its caption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from distillbench.errors import BadFileError
from distillbench.report import look, studies
from distillbench.report.build import build, collect
from distillbench.report.studies import Dot, Study, StudyPanel

from .conftest import fill


def made(name: str = "toy", low: float = 0.2) -> Study:
    lines = {label: (Dot(0, 1.0, low, 1.8), Dot(1e6, 0.1, low - 0.2, 0.2), Dot(4e6, 0.05, 0.04, 0.06)) for label in ("cd", "another one")}
    panels = tuple(StudyPanel(f"{start} start", "sliced-w2", False, lines) for start in ("common", "other"))
    return Study(name, "Toys", "What toys do.", "mixture2d@1", 3, "make toys", "0", 2, panels)


def test_a_study_survives_its_file(tmp_path: Path) -> None:
    for name in ("b", "a"):
        made(name).write(tmp_path / "studies")
    assert studies.studies_in(tmp_path) == [made("a"), made("b")]
    assert studies.studies_in(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', '{"panels": [{"lines": {"a": [{"x": 1}]}}]}'])
def test_a_file_that_is_no_study_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadFileError, match=r"x\.json is no study"):
        studies.read(tmp_path / "x.json")


def test_a_figure_has_a_panel_for_each_of_the_studys_and_one_legend() -> None:
    styles = look.styles(["cd"])
    with look.drawing():
        wide, narrow = (studies.draw(made(), styles, narrow=narrow) for narrow in (False, True))
        for figure in (wide, narrow):
            assert [axis.get_title() for axis in figure.axes] == ["common start", "other start"]
            assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cd", "another one"]
            assert all(axis.get_yscale() == "log" for axis in figure.axes)
            figure.draw_without_rendering()
    assert wide.axes[0].lines[0].get_color() == styles["cd"].colour


def test_the_report_shows_the_published_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track = next(one for one in collect(fill(tmp_path / "store", ("mixture2d",)), published=False) if one.facts.name == "mixture2d")
    assert track.studies == ()
    index = build([dataclasses.replace(track, studies=(made(),))], tmp_path / "report")
    page = index.read_text(encoding="utf-8")
    assert "What toys do." in page
    assert "make toys" in page
    for ending in (".svg", "-dark.svg", "-narrow.svg", ".pdf"):
        assert (tmp_path / "report" / "figures" / f"mixture2d-toy{ending}").stat().st_size > 1000


def test_one_that_stopped_half_way_is_no_study(tmp_path: Path) -> None:
    path = made().write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"panels": None}))
    with pytest.raises(BadFileError):
        studies.read(path)
