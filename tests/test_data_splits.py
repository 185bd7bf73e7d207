# SPDX-License-Identifier: Apache-2.0
"""Which images are trained on and which are held out."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from data_files import cells, complaint, picture, write_folder, write_parquet

from nimfast.data import load
from nimfast.data.splits import Choice, choose


@pytest.mark.parametrize(
    ("split", "present", "expected"),
    [
        ("train", ("train", "test"), Choice("train", "train")),
        ("validation", ("train", "test"), Choice("train", "validation")),
        ("val", ("train",), Choice("train", "validation")),
        ("test", ("train", "test"), Choice("test", None)),
        ("train", ("train", "val"), Choice("train", None)),  # it has its own: nothing is carved
        ("validation", ("train", "val"), Choice("val", None)),
        ("valid", ("train", "valid", "validation"), Choice("valid", None)),
        ("test", ("train", "val"), None),
        ("validation", ("test",), None),
        ("train", ("test", "val"), None),
        ("train", (), Choice("train", "train")),
        ("validation", (), Choice("validation", "validation")),
        ("test", (), Choice("test", None)),
        ("extra", ("train", "extra"), Choice("extra", None)),
    ],
)
def test_choice(split: str, present: tuple[str, ...], expected: Choice | None) -> None:
    assert choose(split, present) == expected


def test_held_out_images(tmp_path: Path) -> None:
    names = {f"train/{'ab'[i % 2]}/{i:02}.png": picture(i) for i in range(60)}
    write_folder(tmp_path, {**names, "test/a/1.png": picture(99), "test/b/1.png": picture(98)})
    spec = f"imagefolder:{tmp_path}"
    train, held_out = load(spec, "train"), load(spec, "validation")
    assert (train.split, held_out.split) == ("train", "validation")
    assert (len(train), len(held_out)) == (57, 3) and train.labelled
    seen = [round(float(data[i][0][0, 0, 0]) * 255) for data in (train, held_out) for i in range(3)]
    assert len(set(seen)) == 6
    assert sorted(train.rows + held_out.rows) == list(range(60))
    # The same ones every time, and wherever the folder lies.
    assert load(spec, "validation").rows == held_out.rows
    assert len({train.identity(), held_out.identity(), load(spec).identity()}) == 3
    # The images are the whole's, also for training and behind a process border.
    copy = pickle.loads(pickle.dumps(held_out))
    (pixels, label), *_ = copy.pictures([2, 0])
    assert label == held_out[2][1] and torch.equal(pixels / 255, held_out[2][0])


def test_parquet_without_validation(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", cells(20), [0, 1] * 10)
    sizes = [len(load(f"parquet:{file}", split)) for split in ("train", "validation", "test")]
    assert sizes == [19, 1, 20]  # files that name no split are all of the data, too


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": picture()})
    assert "too few to hold any out" in complaint(f"imagefolder:{tmp_path}", "validation")
