# SPDX-License-Identifier: Apache-2.0
"""The one interface every data set has, whatever it is read from."""

from __future__ import annotations

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
        """Short hash that names this data, so that a result file cannot be continued on other data."""
