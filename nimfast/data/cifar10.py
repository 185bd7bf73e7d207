# SPDX-License-Identifier: Apache-2.0
"""``cifar10[:DIR]``: CIFAR-10 as torchvision or the Hugging Face hub lays it out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from nimfast.data.base import ImageDataset
from nimfast.data.decode import one_line
from nimfast.data.parquet import ParquetDataset
from nimfast.data.pictures import Options, PictureDataset
from nimfast.data.splits import choose, part_of
from nimfast.errors import UserError

_BATCHES = "cifar-10-batches-py"
_HOW_TO_GET = (
    "python -c \"from torchvision.datasets import CIFAR10; CIFAR10('data', download=True)\""
    " fetches it into ./data"
)


class BatchesDataset(PictureDataset):
    """The original ``cifar-10-batches-py``, read by torchvision into memory.

    torchvision compares the files' MD5 sums first, so no other pickle is ever opened.
    """

    def __init__(self, root: Path, split: str, options: Options) -> None:
        from torchvision.datasets import CIFAR10

        try:
            data = CIFAR10(str(root), train=split == "train")
        except RuntimeError as error:
            raise UserError(
                f"{root / _BATCHES} is incomplete or damaged ({one_line(error)}); {_HOW_TO_GET}"
            ) from error
        self._root = root
        self._images: np.ndarray = data.data  # uint8 [N, 32, 32, 3]
        super().__init__("cifar10", split, data.classes, data.targets, options)

    def _stored(self, index: int) -> np.ndarray:
        image: np.ndarray = self._images[index]
        return image

    def _place(self, index: int) -> str:
        return f"image {index} of {self._root / _BATCHES}"

    def identity(self) -> str:
        """Covers every pixel and label."""
        return self._digest(self._images.tobytes(), self.labels.tobytes())


def load(argument: str, split: str, options: Options) -> ImageDataset:
    """Read DIR, else the first of $NIMFAST_DATA/cifar10, ./data/cifar10 and ./data with it.

    CIFAR-10 comes as 50,000 training and 10,000 test images; 5% of the former are ``validation``.
    """
    chosen = choose(split, ("train", "test"))
    if chosen is None:
        raise UserError(f"CIFAR-10 has no split {split!r}; choose train, validation or test")
    return part_of(_stored_split(argument, chosen.stored, options), chosen)


def _stored_split(argument: str, split: str, options: Options) -> ImageDataset:
    for folder in (places := _places(argument)):
        if (folder / _BATCHES).is_dir():
            return BatchesDataset(folder, split, options)
        if folder.name == _BATCHES and folder.is_dir():
            return BatchesDataset(folder.parent, split, options)
        for inner in (folder, folder / "plain_text"):  # the hub's folder of this data set
            if files := _shards(inner, split):
                return ParquetDataset("cifar10", files, split, options)
    looked = ", ".join(str(place) for place in places)
    raise UserError(
        f"no CIFAR-10 ({_BATCHES} or {split}-*.parquet) in {looked};"
        f" name its folder, cifar10:DIR, or: {_HOW_TO_GET}"
    )


def _places(argument: str) -> list[Path]:
    if argument:
        return [Path(argument).expanduser()]
    root = os.environ.get("NIMFAST_DATA")
    return [*([Path(root) / "cifar10"] if root else []), Path("data/cifar10"), Path("data")]


def _shards(folder: Path, split: str) -> list[Path]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    # A download that stopped half way must not pass for the whole data set.
    match = re.search(r"-of-(\d+)\.parquet$", files[0].name) if files else None
    if match and len(files) != int(match[1]):
        raise UserError(
            f"{folder} has {len(files)} of {int(match[1])} files {split}-*.parquet;"
            " download the others"
        )
    return files
