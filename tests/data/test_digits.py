"""The shipped digits: split, balance, checksum, recipe and source."""

from __future__ import annotations

import gzip
import shutil

import numpy as np
import pytest
import torch

from distillbench.data.digits import FILES, NAME, DigitsSource, build_digits, load_digits
from distillbench.errors import BadFileError, UsageError


def test_the_split_is_balanced_and_has_the_stated_sizes() -> None:
    for split, per_class in (("train", 400), ("held-out", 100)):
        digits = load_digits(split)
        assert digits.images.shape == (10 * per_class, 1, 28, 28)
        assert digits.labels.bincount().tolist() == [per_class] * 10


def test_images_are_real_and_in_range() -> None:
    images = load_digits("train").images
    assert images.min() == -1
    assert images.max() == 1
    assert -0.8 < images.mean() < -0.65
    assert 0.5 < images.std() < 0.7


def test_no_held_out_image_is_a_training_image() -> None:
    rows = torch.cat([load_digits(split).images.flatten(1) for split in ("train", "held-out")])
    assert len(rows.unique(dim=0)) == 5000


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match="held-out"):
        load_digits("test")


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:5000] + b"x" + content[5001:]])
def test_a_damaged_file_is_refused(tmp_path, damage) -> None:
    shutil.copytree(FILES, tmp_path / "files")
    path = tmp_path / "files" / NAME
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadFileError, match="checksum"):
        load_digits("train", tmp_path / "files")


def test_a_missing_file_or_card_is_refused(tmp_path) -> None:
    with pytest.raises(BadFileError, match="cannot be read"):
        load_digits("train", tmp_path)


def test_the_source_draws_training_images_by_its_generator_alone() -> None:
    train = load_digits("train")
    source = DigitsSource(train)
    x, conditions = source.draw(64, torch.Generator().manual_seed(3))
    again, _ = source.draw(64, torch.Generator().manual_seed(3))
    other, _ = source.draw(64, torch.Generator().manual_seed(4))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    for image, label in zip(x, conditions.field("label"), strict=True):
        rows = (train.images == image).flatten(1).all(1).nonzero().flatten()
        assert train.labels[rows].tolist() == [label]
    assert source.conditions(1000, torch.Generator().manual_seed(5)).field("label").unique().tolist() == list(range(10))
    assert conditions.null().field("label").unique().tolist() == [10]


def test_the_recipe_makes_the_shipped_file_again_from_its_rows(tmp_path) -> None:
    arrays = np.load(FILES / NAME, allow_pickle=False)
    rows = np.concatenate([arrays["images"].reshape(5000, -1), arrays["labels"][:, None]], axis=1)
    table = tmp_path / "table.csv.gz"
    with gzip.open(table, "wb", compresslevel=1) as file:
        file.write("\n".join(",".join(map(str, row)) for row in rows.tolist()).encode())
    built = np.load(build_digits(table, tmp_path), allow_pickle=False)
    for name in ("images", "labels", "held_out"):
        assert np.array_equal(built[name], arrays[name])
    with gzip.open(table, "wb") as file:
        file.write(b"1,2,3\n4,5,6\n")
    with pytest.raises(BadFileError, match="expected 5000"):
        build_digits(table, tmp_path)
