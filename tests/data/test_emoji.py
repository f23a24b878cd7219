"""The reader of the emoji package, on a small stand-in of the same layout."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch

from distillbench.data import emoji
from distillbench.errors import BadFileError, UsageError
from given_files import emoji_files, expect_emoji, picture, write_archive, write_files


@pytest.fixture
def files(monkeypatch):
    files = emoji_files()
    expect_emoji(monkeypatch, files)
    yield files
    emoji.load_emoji.cache_clear()


def test_archive_and_folder_hold_the_same(files, tmp_path):
    packed = emoji.load_emoji(write_archive(files, tmp_path / "package.tgz"))
    write_files(files, tmp_path / "node_modules" / emoji.PACKAGE.name)
    for folder in (tmp_path, tmp_path / "node_modules" / emoji.PACKAGE.name):
        loose = emoji.load_emoji(folder)
        assert torch.equal(loose.images, packed.images)
        assert (loose.captions, loose.categories, loose.sha256) == (packed.captions, packed.categories, packed.sha256)
        assert torch.equal(loose.labels, packed.labels)
        assert torch.equal(loose.held_out, packed.held_out)


def test_what_is_read(files, tmp_path):
    found = emoji.load_emoji(write_files(files, tmp_path))
    assert (len(found), found.images.shape, found.images.dtype) == (24, (24, 3, 64, 64), torch.uint8)
    assert found.captions[:3] == ("red ball 0", "blue flag 0", "box 0")
    assert found.categories == ("Flags", "Objects")
    assert found.labels.tolist() == [0, 1] * 12
    np.testing.assert_array_equal(found.images[5].permute(1, 2, 0).numpy(), np.asarray(picture(5, 64, 64)))
    assert found.images[0, :, 0, 0].tolist() == [255, 255, 255]  # what was clear is white
    assert found.card["images"] == 24
    assert found.card["categories"] == {"Flags": 12, "Objects": 12}
    assert "Apache-2.0" in found.card["licence"]


def test_the_split_hangs_on_each_drawing_alone(files, tmp_path, monkeypatch):
    found = emoji.load_emoji(write_files(files, tmp_path / "all"))
    train, held_out = found.split(False), found.split(True)
    assert 0 < len(held_out) < len(train)
    assert sorted(train.captions + held_out.captions) == sorted(found.captions)
    for side in (train, held_out):
        row = found.captions.index(side.captions[-1])
        assert torch.equal(side.images[-1], found.images[row])
        assert side.labels[-1] == found.labels[row]
    files["img/google/64/0002.png"] = files["img/google/64/0009.png"]  # two alike stay together, the others where they were
    expect_emoji(monkeypatch, files)
    other = emoji.load_emoji(write_files(files, tmp_path / "alike"))
    assert other.held_out[2] == other.held_out[9] == found.held_out[9]
    assert torch.equal(other.held_out[3:], found.held_out[3:])


def _without(files, name):
    return {key: value for key, value in files.items() if key != name}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f: {**f, "package.json": b'{"name": "emoji-datasource-apple", "version": "16.0.0"}'}, UsageError, "emoji-datasource-apple"),
        (lambda f: {**f, "package.json": b'{"name": "emoji-datasource-google", "version": "15.0.0"}'}, UsageError, "15.0.0"),
        (lambda f: _without(f, "package.json"), UsageError, "package.json is missing"),
        (lambda f: {**f, "emoji.json": b"[{]"}, BadFileError, "not a json file"),
        (lambda f: {**f, "emoji.json": b'{"a": 1}'}, BadFileError, "not a list of emoji"),
        (lambda f: {**f, "emoji.json": b"[]"}, BadFileError, "lists 0 drawings, not 24"),
        (lambda f: _without(f, "img/google/64/0003.png"), UsageError, "0003.png is missing"),
        (lambda f: {**f, "img/google/64/0003.png": f["img/google/64/0004.png"]}, BadFileError, "not the files of"),
    ],
)
def test_another_package_or_a_damaged_one_is_refused_in_one_line(files, tmp_path, change, error, words):
    where = write_files(change(files), tmp_path / "package")
    with pytest.raises(error, match=words) as refused:
        emoji.load_emoji(where)
    assert "\n" not in str(refused.value)
    assert emoji.FETCH in str(refused.value)


def test_a_drawing_of_another_size_or_none_at_all_is_named(files, tmp_path, monkeypatch):
    content = io.BytesIO()
    picture(3, 32, 64).save(content, "png")
    for number, (bad, words) in enumerate([(content.getvalue(), "0003.png is 64 x 32 pixels"), (b"\x89PNG", "0003.png is damaged")]):
        files["img/google/64/0003.png"] = bad
        expect_emoji(monkeypatch, files)
        with pytest.raises(BadFileError, match=words):
            emoji.load_emoji(write_files(files, tmp_path / str(number)))


def test_no_package_at_all(tmp_path):
    (tmp_path / "notes.tgz").write_bytes(b"no archive")
    for where, words in (
        (tmp_path / "nowhere", "no such package"),
        (tmp_path, "no such package"),
        (tmp_path / "notes.tgz", "not the package's .tgz"),
    ):
        with pytest.raises(UsageError, match=words):
            emoji.load_emoji(where)


def test_the_pinned_package_is_the_whole_one():
    assert (emoji.PACKAGE.name, emoji.PACKAGE.version, emoji.PACKAGE.count) == ("emoji-datasource-google", "16.0.0", 1906)
    assert len(emoji.PACKAGE.sha256) == len(hashlib.sha256().hexdigest())
