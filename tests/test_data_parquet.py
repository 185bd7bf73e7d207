# SPDX-License-Identifier: Apache-2.0
"""Parquet files: what is read, what identifies it, and what is refused."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import cells, complaint, write_parquet

from nimfast.data import load
from nimfast.data.base import UnreadableImage


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path: Path, columns: tuple[str, str], struct: bool) -> None:
    images: list[Any] = cells(7) if struct else [cell["bytes"] for cell in cells(7)]
    labels, names = [0, 1, 2, 1, 0, 2, 1], ["cat", "dog", "emu"]
    for part, rows in (("a", slice(0, 5)), ("b", slice(5, 7))):
        file = tmp_path / "pets" / f"{part}.parquet"
        write_parquet(file, images[rows], labels[rows], columns=columns, names=names)
    data = load(f"parquet:{tmp_path}/pets/*.parquet")
    assert (data.name, data.classes, len(data)) == ("parquet:pets", tuple(names), 7)
    assert [data[i][1] for i in range(7)] == labels
    # The corner pixel is the image's own number: every row is found, in any order.
    for index in (6, 0, 4, 5, 3):
        assert round(float(data[index][0][0, 0, 0]) * 255) == index


def test_parquet_without_names_numbers_its_classes(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", cells(2), [0, 3])
    assert load(f"parquet:{file}").classes == ("0", "1", "2", "3")


def test_parquet_of_several_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", cells(3), [0, 0, 0])
    write_parquet(tmp_path / "validation-0.parquet", cells(2), [0, 0])
    assert len(load(f"parquet:{tmp_path}/*.parquet", "train")) == 3
    assert "has no split 'test' but train, validation" in complaint(f"parquet:{tmp_path}/*.parquet")
    assert len(load(f"parquet:{tmp_path}/val*.parquet", "test")) == 2


def test_parquet_question_mark_is_a_glob(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x1.parquet", cells(1), [0])
    assert load(f"parquet:{tmp_path}/x?.parquet").shape == (3, 4, 6)
    assert load(f"parquet:{tmp_path}/x?.parquet?size=2").shape == (3, 2, 2)


def test_parquet_survives_a_worker_process(tmp_path: Path) -> None:
    data = load(f"parquet:{write_parquet(tmp_path / 'x.parquet', cells(3), [0, 1, 2])}")
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[2][0], data[2][0])


def test_parquet_reads_again_what_left_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nimfast.data.parquet._CACHE_BYTES", 1)
    data = load(f"parquet:{write_parquet(tmp_path / 'x.parquet', cells(5), [0] * 5)}")
    assert [round(float(data[i][0][0, 0, 0]) * 255) for i in (4, 0, 2, 4)] == [4, 0, 2, 4]


@pytest.mark.parametrize(
    ("columns", "images", "labels", "expected"),
    [
        (("image", "class"), None, [0, 0], "has no label column (its columns: image, class)"),
        (("photo", "label"), None, [0, 0], "has no image column (its columns: photo, label)"),
        (("image", "label"), None, ["cat", "dog"], "column 'label' holds"),
        (("image", "label"), None, [0, None], "with missing values"),
        (("image", "label"), None, [0, -1], "label -1"),
        (("image", "label"), None, [0, 2], "label 2 names none of its 2 classes"),
        (("image", "label"), [b"GIF?", b"hello"], [0, 0], "row 0 of"),
        (("image", "label"), [1, 2], [0, 0], "holds no image bytes"),
        (("image", "label"), [], [], "has no images"),
    ],
)
def test_bad_parquet(
    tmp_path: Path,
    columns: tuple[str, str],
    images: list[Any] | None,
    labels: list[Any],
    expected: str,
) -> None:
    file = tmp_path / "x.parquet"
    given = cells(2) if images is None else images
    write_parquet(file, given, labels, columns=columns, names=["cat", "dog"])
    assert expected in complaint(f"parquet:{file}")


def test_bad_row_is_numbered_within_its_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", cells(3), [0, 0, 0])
    bad = [*cells(3), {"bytes": b"hello", "path": None}]
    write_parquet(tmp_path / "b.parquet", bad, [0, 0, 0, 0])
    with pytest.raises(UnreadableImage, match=f"row 3 of {tmp_path}/b.parquet is not an image"):
        load(f"parquet:{tmp_path}/*.parquet")[6]


def test_not_a_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_text("hello")
    assert "x.parquet is not a parquet file" in complaint(f"parquet:{tmp_path}/x.parquet")
    assert f"parquet:{tmp_path}/*.parquet" in complaint(f"parquet:{tmp_path}")


def test_parquet_files_of_different_data(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", cells(1), [0], names=["cat"])
    write_parquet(tmp_path / "b.parquet", cells(1), [0], names=["dog"])
    assert "different classes" in complaint(f"parquet:{tmp_path}/*.parquet")


def test_parquet_identity(tmp_path: Path) -> None:
    def identity(folder: str, first: int = 0, label: int = 1) -> str:
        file = tmp_path / folder / "x" / "x.parquet"
        write_parquet(file, cells(2, first), [0, label], names=["a", "b"])
        return load(f"parquet:{file}").identity()

    same = identity("one")
    assert identity("two") == same
    assert len({same, identity("three", first=1), identity("four", label=0)}) == 3


@pytest.mark.parametrize("module", ["pyarrow", "datasets"])
def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    (tmp_path / "x.parquet").write_text("")
    for name in [module, *(loaded for loaded in sys.modules if loaded.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    message = complaint(f"parquet:{tmp_path}/x.parquet" if module == "pyarrow" else "hf:x")
    assert f"needs {module}" in message and "pip install 'nimfast[data]'" in message
