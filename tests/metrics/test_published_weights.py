"""The table of published weights: where a file is looked for, what is refused, what the messages say."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest
import torch

from distillbench.errors import BadFileError, UsageError
from distillbench.metrics.published import NOT_RUN, not_run
from distillbench.metrics.published.clip import CLIPS, build_clip
from distillbench.metrics.published.hps import ARCHITECTURE, VERSIONS
from distillbench.metrics.published.inception import MODES
from distillbench.published_weights import WEIGHTS, Weights, WeightsMissing, fetch_command, find, states, weights_folder
from doc_blocks import DOCS, blocks
from published_files import entry

CONTENT = b"not really weights"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.bin"
    path.write_bytes(CONTENT)
    return path


def test_every_published_metric_has_its_weights():
    assert {mode[0] for mode in MODES.values()} | set(CLIPS) | {f"hps-{version}" for version in VERSIONS} == set(WEIGHTS)
    assert len({weights.file for weights in WEIGHTS.values()}) == len(WEIGHTS)


def test_archives_that_hold_code_are_pinned():
    archives = [MODES["clean"][0], MODES["legacy_tensorflow"][0], *(clip.name for clip in CLIPS.values() if clip.openai)]
    assert all(WEIGHTS[name].sha256 for name in archives)


def test_checksums_agree_with_what_addresses_and_names_carry():
    for clip in CLIPS.values():
        if clip.openai:
            assert WEIGHTS[clip.name].url.split("/")[-2] == WEIGHTS[clip.name].sha256
    ported = WEIGHTS["inception2015-ported"]
    assert ported.sha256 is not None
    assert Path(ported.file).stem.split("-")[-1] == ported.sha256[:8]


@pytest.mark.parametrize("name", [*CLIPS, "hps-v2.0", "hps-v2.1"])
def test_stated_sizes_are_those_of_the_networks(name):
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    with torch.device("meta"):
        network = build_clip(CLIPS[name].architecture if name in CLIPS else ARCHITECTURE)
    if name in CLIPS and CLIPS[name].openai:
        from open_clip.model import convert_weights_to_fp16

        convert_weights_to_fp16(network)
    size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    assert WEIGHTS[name].megabytes == pytest.approx(size / 1e6, rel=0.005)


def test_a_right_file_is_found_by_path_by_folder_and_by_variable(file, monkeypatch):
    weights = entry(file)
    assert find(weights, file).path == find(weights, file.parent).path == file
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(file.parent))
    assert weights_folder() == file.parent
    assert find(weights).path == file
    assert find(weights).sha256 == weights.sha256


def test_without_the_variable_it_is_the_cache_at_home(monkeypatch, tmp_path):
    monkeypatch.delenv("DISTILLBENCH_WEIGHTS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_folder() == tmp_path / ".cache" / "distillbench" / "weights"


def test_a_missing_file_is_named_with_the_command_that_fetches_it(tmp_path):
    weights = Weights("net", "net.bin", "https://example.org/net.bin", "0" * 64, 1)
    folder = tmp_path / "a folder"
    folder.mkdir()
    with pytest.raises(WeightsMissing) as caught:
        find(weights, folder)
    command = str(caught.value).split("fetch them: ")[1]
    assert shlex.split(command) == ["curl", "-L", "--create-dirs", "-o", str(folder / "net.bin"), "https://example.org/net.bin"]


def test_a_path_that_does_not_exist_is_not_replaced_by_another(file, monkeypatch):
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(file.parent))
    with pytest.raises(WeightsMissing, match="elsewhere"):
        find(entry(file), file.parent / "elsewhere.bin")


def test_a_truncated_file_is_refused_also_after_it_was_right(file):
    weights = entry(file)
    find(weights, file)
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(BadFileError, match=r"not the weights net: its sha256 is .* fetch them again: curl") as caught:
        find(weights, file)
    assert len(str(caught.value).splitlines()) == 1


def test_where_no_checksum_is_pinned_the_user_states_one(file):
    unpinned = entry(file, None)
    beside = Path(f"{file}.sha256")
    with pytest.raises(UsageError, match="no checksum of net is pinned here, so state it: sha256sum"):
        find(unpinned, file)
    beside.write_text("hello\n")
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        find(unpinned, file)
    right = entry(file).sha256
    beside.write_text(f"{right}  {file.name}\n")
    assert find(unpinned, file).sha256 == right
    beside.write_text("0" * 64)
    with pytest.raises(BadFileError, match="must be 0000000000000000"):
        find(unpinned, file)
    assert fetch_command(unpinned, file).endswith(f"sha256sum {file} > {beside}")


def test_unknown_weights_are_named_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean openclip-b32-openai"):
        find("openclip-b32-opnai")


def test_states_say_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path))
    (tmp_path / WEIGHTS["inception2015"].file).write_bytes(CONTENT)
    (tmp_path / WEIGHTS["hps-v2.1"].file).write_bytes(CONTENT)
    found = {name: (state, detail) for state, name, detail in states()}
    assert set(found) == set(WEIGHTS)
    assert found["inception2015"][0] == "broken"
    assert found["hps-v2.1"][0] == "broken"
    assert "state it" in found["hps-v2.1"][1]
    assert found["openclip-b32-openai"][0] == "missing"
    assert "curl -L" in found["openclip-b32-openai"][1]


def test_a_metric_without_weights_is_an_empty_cell_that_says_why():
    score = not_run("fid/clean-inception2015@299", 10, higher_is_better=False)
    assert (score.value, score.low, score.high, score.note) == (None, None, None, "not run: weights missing")
    assert score.note == NOT_RUN
    assert score.key != not_run("fid/legacy_pytorch-inception2015@299", 10, higher_is_better=False).key


def test_the_page_lists_every_file_and_metric():
    page = (DOCS / "metrics-published.md").read_text(encoding="utf-8")
    for weights in WEIGHTS.values():
        assert f"| `{weights.name}` | `{weights.file}` | {weights.megabytes} MB |" in page
    metrics = [f"fid/{mode}-inception2015@299" for mode in MODES] + [f"clipcos/{name}" for name in CLIPS]
    assert all(f"`{metric}`" in page for metric in [*metrics, *(f"hps/{version}-openclip-h14" for version in VERSIONS)])


def test_the_code_of_the_page_prints_what_the_page_shows(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks((DOCS / "metrics-published.md").read_text(encoding="utf-8")) if block.kind == "python"]
    exec(compile(block.code, "metrics-published.md", "exec"), {})
    assert capsys.readouterr().out == block.shown
