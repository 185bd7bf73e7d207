# SPDX-License-Identifier: Apache-2.0
"""The one interface every data set has, whatever it is read from."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nimfast.errors import UserError


class UnreadableImage(UserError):
    """One image of a data set is broken; training goes on without it, evaluation stops."""


# A map-style torch Dataset, so that DataLoader and Subset take it as it is.
class ImageDataset(torch.utils.data.Dataset[tuple[Tensor, int]], ABC):
    """Labelled images of one size.

    Attributes:
        name: short name for tables and headers, e.g. ``cifar10``.
        split: which part of the data this is, e.g. ``test``.
        classes: class names; label ``i`` means ``classes[i]``.
        shape: ``(C, H, W)`` of every image.
        on_gpu: whether images come as CUDA tensors, which can be neither pinned nor read by other
            processes.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    on_gpu: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image ``[C, H, W]`` (fp32, pixels in [0, 1]) and its label.

        Raises:
            UnreadableImage: the stored image is broken.
        """

    @abstractmethod
    def identity(self) -> str:
        """Short hash naming this data, so that no result is continued on other data."""

    def pictures(self, indices: Sequence[int]) -> list[tuple[Tensor, int] | UnreadableImage]:
        """What training crops from: the images as they are stored, and their labels.

        Each is ``[C, h, w]`` of its own size, uint8 in [0, 255] or fp32 in [0, 1]. A broken image
        is returned as the error that says so, since the others of its batch are still wanted.
        """
        return [self[index] for index in indices]

    def places(self, every: int | None, limit: int | None, usual: int) -> list[int]:
        """Images that an evaluation takes.

        Args:
            every: each K-th image. None: a spread of `limit` images, or of `usual`.
            limit: at most this many.
            usual: how many where nothing is asked for.
        """
        if every is not None:
            return list(range(0, len(self), every))[: limit or len(self)]
        # The widest step that yields enough images and has no factor in common with the number of
        # classes: in data whose labels go round (0 1 ... 9 0 1 ...) every 20th image would be of
        # one class.
        wanted = limit or usual
        steps = range(max(1, len(self) // wanted), 0, -1)
        step = next(step for step in steps if math.gcd(step, len(self.classes)) == 1)
        return list(range(0, len(self), step))[:wanted]

    @property
    def labelled(self) -> bool:
        """Whether there is anything to tell apart; pretraining does not mind, classifiers do."""
        return len(self.classes) > 1

    def _digest(self, *content: bytes) -> str:
        """16 hex digits over name, split, classes, shape, number of images and ``content``."""
        digest = hashlib.sha256()
        about = repr((self.name, self.split, self.classes, self.shape, len(self)))
        for part in (about.encode(), *content):
            # Lengths are hashed too, so that bytes cannot move between neighbouring parts.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()[:16]
