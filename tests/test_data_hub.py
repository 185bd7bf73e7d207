# SPDX-License-Identifier: Apache-2.0
"""Data sets of the Hugging Face hub, without the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_files import cells, complaint

from nimfast.data import load


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError(f"Couldn't reach {name} ({split}).\nsecond line")

    def split_names(name: str) -> list[str]:
        return ["train", "test"]

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=split_names),
    )
    assert "(Couldn't reach someone/pets (test)); check" in complaint("hf:someone/pets")
    assert "split 'dev', cannot be loaded" in complaint("hf:someone/pets:dev")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    pets = datasets.Dataset.from_dict({"image": cells(3), "label": [0, 1, 1]}, features=features)
    (tmp_path / "pets").mkdir()
    pets.to_parquet(tmp_path / "pets" / "test-00000-of-00001.parquet")
    name = f"hf:{tmp_path}/pets"
    data = load(name)
    assert (data.name, data.split, data.classes) == (name, "test", ("cat", "dog"))
    assert [data[i][1] for i in range(3)] == [0, 1, 1]
    assert round(float(data[2][0][0, 0, 0]) * 255) == 2
    assert data.identity() == load(f"{name}:test").identity()
    assert "cannot be loaded" in complaint(name, "train")
