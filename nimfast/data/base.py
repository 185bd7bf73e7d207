# SPDX-License-Identifier: Apache-2.0
"""The one interface every data set has, whatever it is read from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor


# A map-style torch Dataset, so that DataLoader and Subset take it as it is.
class ImageDataset(torch.utils.data.Dataset[tuple[Tensor, int]], ABC):
    """Labelled images of one size.

    Attributes:
        name: short name for tables and headers, e.g. ``cifar10``.
        split: which part of the data this is, e.g. ``test``.
        classes: class names; label ``i`` means ``classes[i]``.
        shape: ``(C, H, W)`` of every image.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image ``[C, H, W]`` (fp32, pixels in [0, 1]) and its label."""

    @abstractmethod
    def identity(self) -> str:
        """Short hash naming this data, so that no result is continued on other data."""

    def _digest(self, *content: bytes) -> str:
        """16 hex digits over name, split, classes, shape, number of images and ``content``."""
        digest = hashlib.sha256()
        about = repr((self.name, self.split, self.classes, self.shape, len(self)))
        for part in (about.encode(), *content):
            # Lengths are hashed too, so that bytes cannot move between neighbouring parts.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()[:16]
