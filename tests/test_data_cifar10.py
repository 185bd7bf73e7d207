# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 in both its layouts."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import CIFAR10, cells, complaint, write_parquet

from nimfast.data import load


def test_real_cifar10(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    if not (shared_data / "cifar10").is_dir():
        pytest.skip(f"no CIFAR-10 in {shared_data}")
    data = load(f"cifar10:{shared_data / 'cifar10'}")
    assert (data.name, data.shape, list(data.classes)) == ("cifar10", (3, 32, 32), CIFAR10)
    pixels = torch.stack([data[i][0] for i in range(0, len(data), len(data) // 200)])
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    # CIFAR-10's published channel means; wrong scaling or channel order would miss them.
    means = pixels.mean((0, 2, 3))
    assert torch.allclose(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.03)

    monkeypatch.setenv("NIMFAST_DATA", str(shared_data))
    assert load("cifar10").identity() == data.identity()
    train = load("cifar10", "train")
    assert len(train) == 47_500 and train.identity() != data.identity()
    held_out = load("cifar10", "validation")
    assert len(held_out) == 2_500 and held_out.identity() != train.identity()
    # Any seed, machine or year must hold out the same images: nothing is chosen on others.
    assert held_out.rows[:5] == [6, 55, 58, 60, 83]
    assert not set(held_out.rows) & set(train.rows)
    classes = np.bincount(held_out.whole.labels[held_out.rows])
    assert len(classes) == 10 and abs(classes - 250).max() < 60


def test_cifar10_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.arange(2 * 3072, dtype=np.uint32).reshape(2, 3072).astype(np.uint8)

    def write(name: str, entry: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(entry))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    test = write("test_batch", {"data": images, "labels": [3, 9]})
    meta = write("batches.meta", {"label_names": CIFAR10})
    # torchvision knows the real files by their sums; here it shall know these.
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", test]])
    about = {"filename": "batches.meta", "key": "label_names", "md5": meta}
    monkeypatch.setattr(datasets.CIFAR10, "meta", about)

    data = load(f"cifar10:{tmp_path}")
    assert (data.shape, list(data.classes)) == ((3, 32, 32), CIFAR10)
    pixels, label = data[1]
    assert label == 9
    # The file holds each image channel by channel.
    assert torch.equal(pixels, torch.from_numpy(images[1]).reshape(3, 32, 32) / 255)
    assert load(f"cifar10:{folder}").identity() == data.identity()

    (folder / "test_batch").write_bytes(b"changed")
    assert "incomplete or damaged" in complaint(f"cifar10:{tmp_path}")


def test_no_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIMFAST_DATA", "elsewhere")
    message = complaint("cifar10")
    assert "elsewhere/cifar10, data/cifar10, data;" in message and "download=True" in message
    assert f"in {tmp_path};" in complaint(f"cifar10:{tmp_path}")
    assert "choose train, validation or test" in complaint("cifar10", "dev")


def test_cifar10_with_a_file_missing(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-00001-of-00003.parquet", cells(1), [0])
    assert "1 of 3 files" in complaint(f"cifar10:{tmp_path}")
