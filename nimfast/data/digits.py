# SPDX-License-Identifier: Apache-2.0
"""The embedded data set: 1,797 real handwritten digits, enlarged from 8 x 8 to 32 x 32.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository (https://doi.org/10.24432/C50P49), CC BY 4.0, in the order scikit-learn distributes it;
the licence note lies beside the data in ``digits.NOTICE.txt``. Thirteen people wrote these digits;
the file does not say who wrote which, so the splits share writers.

Pixels are those of an 8-bit image file: level v of 0 to 16 is the byte nearest to 255 v / 16, and a
pixel is a multiple of 1/255, as noise on the 8-bit grid needs it (``--noise grid``).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nimfast.data.base import ImageDataset

Split = Literal["train", "validation", "test"]

ENLARGE = 4
_BYTES = np.rint(np.arange(17) * (255 / 16)).astype(np.uint8)  # of the only half, 127.5: 128
_FILE = Path(__file__).with_name("digits.npz")


class Digits(ImageDataset):
    """One split of the embedded digits: 1 x 32 x 32 images in [0, 1], labels 0 to 9.

    Nearest-neighbour enlargement keeps the real pixels: each is a 4 x 4 square, so every l2
    distance of the 8 x 8 data is exactly 4 times as large at 32 x 32.

    Attributes:
        images: ``[N, 1, 32, 32]`` fp32, multiples of 1/255 in [0, 1].
        labels: ``[N]`` int64.
    """

    name = "digits"
    classes = tuple("0123456789")
    shape = (1, 8 * ENLARGE, 8 * ENLARGE)

    def __init__(self, split: Split) -> None:
        if split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(get_args(Split))}, not {split!r}")
        self.split = split
        pixels, labels = _read()
        rows = _rows(split, len(labels))
        small = torch.from_numpy(_BYTES[pixels[rows]]).float().div_(255)[:, None]  # [N, 1, 8, 8]
        self.images = small.repeat_interleave(ENLARGE, 2).repeat_interleave(ENLARGE, 3)
        self.labels = torch.from_numpy(labels[rows]).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def identity(self) -> str:
        """Short hash of the name, the split, the pixels and the labels."""
        digest = hashlib.sha256(f"{self.name} {self.split} {self.shape}".encode())
        digest.update(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


def load(split: str = "test") -> ImageDataset:
    """The embedded digits: 1,197 ``train``, 200 ``validation`` or 400 ``test`` images.

    Raises:
        ValueError: no such split.
    """
    return Digits(split)  # type: ignore[arg-type]  # Digits checks the name


def _rows(split: Split, count: int) -> np.ndarray:
    # The digits were written in runs of 0 1 2 ... 9, so whole tens keep the classes balanced:
    # of nine consecutive tens two are test, one is validation, six are train.
    turn = np.arange(count) // 10 % 9
    part = np.select([turn < 2, turn == 2], ["test", "validation"], "train")
    return np.flatnonzero(part == split)


@lru_cache(maxsize=1)
def _read() -> tuple[np.ndarray, np.ndarray]:
    with np.load(_FILE, allow_pickle=False) as file:
        return file["images"], file["labels"]
