"""The folder as a whole: complete, self-contained, the same every time, and safe to write."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from distillbench.commands.report import report as command
from distillbench.errors import UsageError
from distillbench.jobs import Job, resolve
from distillbench.report.build import build, collect
from distillbench.report.runs import command_of
from distillbench.store import Store
from distillbench.tracks.facts import FACTS


class Page(HTMLParser):
    """Links, ids and the text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.links += [value for name in ("href", "src", "srcset") if (value := found.get(name)) and not value.startswith("data:")]
        self.ids += [found["id"]] if found.get("id") else []
        self.images += [found] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def index(report: Path) -> Page:
    return Page(report / "index.html")


def test_every_link_of_every_page_leads_somewhere(report: Path):
    for path in report.rglob("*.html"):
        page = Page(path)
        for link in page.links:
            target, _, place = link.partition("#")
            assert not re.match(r"\w+:|//", link), f"{path.name} needs the network: {link}"
            assert not target or (path.parent / target).is_file(), f"{path.name}: {link}"
            if place:
                assert place in (page if not target else Page(path.parent / target)).ids, f"{path.name}: {link}"
        assert len(page.ids) == len(set(page.ids)), path.name


def test_nothing_is_loaded_from_elsewhere(report: Path):
    for path in [*report.rglob("*.css"), *report.rglob("*.js"), *report.rglob("*.html")]:
        assert not re.search(r"https?://|@import|fetch\(|XMLHttp", path.read_text(encoding="utf-8")), path.name
    for path in report.rglob("*.svg"):
        assert set(re.findall(r'(?:href|src)="(?!#|data:)([^"]*)"', path.read_text(encoding="utf-8"))) == set(), path.name


def test_every_record_has_a_page_and_every_row_leads_to_its_seeds(report: Path, store: Store, index: Page):
    pages = {path.stem for path in (report / "runs").glob("*.html")}
    assert pages == {record.id for record in store.records()}
    assert {f"runs/{run_id}.html" for run_id in pages} == {link for link in index.links if link.startswith("runs/")}


def test_pictures_have_words(report: Path):
    for path in report.rglob("*.html"):
        assert all(image.get("alt") for image in Page(path).images), path.name


def test_what_records_say_is_escaped(report: Path, index: Page):
    assert "<script>alert" not in (report / "index.html").read_text()
    assert "<script>alert(1)</script> & so on" in index.text
    assert "The <GAN> term helps" in index.text


def test_the_index_says_what_it_must(index: Page):
    for words in ("95 % paired intervals", "needs taps", "✓ reproduced", "✗ not reproduced", "? undecided", "– not run",
                  "no run of cd with seeds 3 to 7", "one student for all panels", "< 0.0001", "[+0.02, +0.042]"):  # fmt: skip
        assert words in index.text, words
    assert "on a track that is not in the report" not in index.text


def test_changed_knobs_have_tables_of_their_own(report: Path):
    main, _, rest = (report / "index.html").read_text().partition("Methods with changed knobs")
    assert "dmd2(gan=false)</th>" not in main
    assert "dmd2(gan=false)</th>" in rest


def test_a_run_page_tells_all(report: Path, store: Store):
    record = next(one for one in store.records() if one.overrides and one.seed == 0)
    page = Page(report / "runs" / f"{record.id}.html")
    for words in ("--set gan=false", "● gan", "(changed)", "distillbench run dmd2", record.id, "ab" * 32, "cd" * 32, "python", "3.11.9",
                  "student: loss", "4,000,000 passes", "412", "made up"):  # fmt: skip
        assert words in page.text, words
    assert [link for link in page.links if link.endswith(".png")]
    other = next(one for one in store.records() if one.kind == "run" and one.seed == 1)
    assert Page(report / "runs" / f"{other.id}.html").text.count("Not kept") == 2


def test_pdfs_embed_their_fonts_and_hold_no_date(report: Path):
    found = list((report / "figures").glob("*.pdf"))
    assert {path.stem for path in found} == {f"{track}-{name}" for track in ("mixture2d", "digits")
                                             for name in ("passes", "passes-narrow", "latency", "latency-narrow", "samples")}  # fmt: skip
    for path in found:
        data = path.read_bytes()
        assert b"/FontFile2" in data, path.name
        assert b"/Type3" not in data, path.name
        assert b"CreationDate" not in data, path.name


def test_equal_records_give_equal_files(filled, tmp_path: Path):
    tracks = collect(filled(tmp_path / "store", ("digits",), seeds=2), published=False)
    for name in ("a", "b"):
        build(tracks, tmp_path / name)
    one, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()} for name in "ab"
    )
    assert one.keys() == other.keys()
    assert [path for path in one if one[path] != other[path]] == []


@pytest.fixture
def references(store: Store, tmp_path: Path) -> Store:
    """A store without any run: quick to report, since there is nothing to draw."""
    part = Store(tmp_path / "references")
    for record in store.records():
        if record.kind == "reference":
            part.add(record)
    return part


def test_a_foreign_folder_is_left_alone_and_an_old_report_replaced(references: Store, tmp_path: Path):
    store, tracks = references, collect(references, published=False)
    with pytest.raises(UsageError, match="not empty and holds no report"):
        build(tracks, store.folder)
    assert len(store.records()) > 0
    out = tmp_path / "out"
    build(tracks, out)
    (out / "runs" / "stale.html").write_text("old")
    build(tracks, out)
    assert not (out / "runs" / "stale.html").exists()


def test_references_alone_make_a_report(references: Store, tmp_path: Path):
    page = Page(build(collect(references, published=False), tmp_path / "out"))
    assert "Nothing can be concluded: no method was scored on in-mode under this budget." in page.text
    assert not [link for link in page.links if link.startswith("figures")]


def test_runs_without_references_make_a_report(filled, tmp_path: Path):
    part = Store(tmp_path / "runs")
    for record in filled(tmp_path / "all", ("mixture2d",), seeds=1).records():
        if record.kind == "run":
            part.add(record)
    page = Page(build(collect(part, published=False), tmp_path / "out"))
    assert "the teacher with" not in page.text
    assert "nothing is decided" in page.text


def test_an_empty_store_says_what_to_run(tmp_path: Path):
    with pytest.raises(UsageError, match=r"holds no records; run `distillbench bench mixture2d` first, or add --published"):
        collect(Store(tmp_path / "none"), published=False)


def test_the_command_writes_into_the_store_and_says_where(references: Store):
    store = references
    result = CliRunner().invoke(command, ["--store", str(store.folder)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "digits@1: figures" in result.stderr
    assert result.stdout.splitlines()[0] == str(store.folder / "report/index.html")
    assert (store.folder / "report/index.html").as_uri() in result.stdout
    assert not store.problems


def test_the_published_records_make_a_report(tmp_path: Path):
    tracks = collect(Store(tmp_path / "none"), published=True)
    assert {track.facts.name for track in tracks} == set(FACTS)
    assert all(track.published == track.records.keys() for track in tracks)


def test_no_torch_is_loaded():
    code = "import sys, distillbench.commands.report, distillbench.report.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("settings", [{}, {"lr": "0.00123", "betas": "0.8,0.95"}, {"metric": "l2", "clip": "2.5"}])
@pytest.mark.parametrize("budget", ["S", "1234567passes", "90s", "17steps"])
def test_the_command_line_gives_the_same_run_again(settings: dict[str, str], budget: str):
    record = resolve(Job("cd", "mixture2d", budget, 3, (1, 4), settings)).record
    words = shlex.split(command_of(record))
    assert words[:4] == ["distillbench", "run", "cd", "mixture2d"]
    options = list(zip(words[4::2], words[5::2], strict=True))
    found = dict(options)
    again = Job("cd", "mixture2d", found["--budget"], int(found["--seed"]), tuple(map(int, found["--steps"].split(","))),
                dict(value.split("=", 1) for name, value in options if name == "--set"))  # fmt: skip
    assert resolve(again).record.id == record.id
