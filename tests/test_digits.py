# SPDX-License-Identifier: Apache-2.0
"""The embedded digits: real pixels, fixed and disjoint splits, one interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nimfast.data import digits
from nimfast.data.base import ImageDataset
from nimfast.ops import check_grid

SIZES = {"train": 1197, "validation": 200, "test": 400}


@pytest.mark.parametrize("split", SIZES)
def test_split(split: str) -> None:
    data = digits.load(split)
    assert isinstance(data, ImageDataset)
    assert (data.name, data.split, len(data)) == ("digits", split, SIZES[split])
    image, label = data[0]
    assert image.shape == data.shape == (1, 32, 32)
    assert image.dtype == torch.float32
    assert isinstance(label, int)
    assert data.classes[label] == str(label)
    labels = torch.tensor([data[i][1] for i in range(len(data))])
    share = labels.bincount(minlength=10) / len(labels)
    assert 0.07 < share.min() < share.max() < 0.13


def test_pixels_are_those_of_scikit_learn() -> None:
    source = pytest.importorskip("sklearn.datasets").load_digits()
    turn = np.arange(1797) // 10 % 9
    for split, rows in {"test": turn < 2, "validation": turn == 2, "train": turn > 2}.items():
        data = digits.load(split)
        images = torch.stack([data[i][0] for i in range(len(data))])
        assert (images.min(), images.max()) == (0, 1)
        # A byte each, the nearest: noise on the 8-bit grid takes them.
        expected = (source.images[rows] / 16 * 255).round().astype(np.float32) / 255
        assert np.abs(expected - source.images[rows] / 16).max() <= 0.5 / 255 + 1e-7
        for offset in range(4):  # every pixel of each 4 x 4 square
            assert np.array_equal(images[:, 0, offset::4, offset::4].numpy(), expected)
        check_grid(images)
        assert [data[i][1] for i in range(len(data))] == source.target[rows].tolist()


def test_identity_names_the_data() -> None:
    assert digits.load("test").identity() == digits.load("test").identity()
    assert len({digits.load(split).identity() for split in SIZES}) == 3


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="train, validation, test"):
        digits.load("val")
