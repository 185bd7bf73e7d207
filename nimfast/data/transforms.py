# SPDX-License-Identifier: Apache-2.0
"""Random crops, flips and colours of training images, one by one, where the images are read.

Every draw is a function of (seed, epoch, index in the data set): the same images come out whatever
the order, the number of worker processes and the number of machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nimfast.corruption import Purpose, uniform
from nimfast.data.base import ImageDataset, UnreadableImage
from nimfast.data.colours import check_rand_augment, erase, rand_augment
from nimfast.data.decode import resize_and_crop, to_pixels
from nimfast.errors import UserError

_TRIES = 10
_DRAWS = 3 + 2 * _TRIES  # flip, two for the place, two for each try at a shape
_LOG_RATIO = math.log(4 / 3)

# Broken images beyond this share of the data are no accident that training should hide.
MOST_BROKEN = 0.01


@dataclass(frozen=True)
class Augmentation:
    """Crop, flip, RandAugment and random erasing of training images, in this order."""

    crop: Literal["none", "resized", "padded"] = "none"
    """resized: a random part of the picture, resized (bicubic); padded: a random place in the
    image with zeros around it; none: the image as it is evaluated"""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """smallest and largest share of the picture's area in a resized crop"""
    padding: int = 4
    """zeros on each side of a padded crop, in pixels"""
    flip: bool = False
    """mirror every other image"""
    rand_augment: str = "none"
    """timm's RandAugment, e.g. rand-m9-mstd0.5-inc1; none: none"""
    erasing: float = 0.0
    """probability that a random rectangle becomes noise (timm's RandomErasing)"""

    def check(self) -> None:
        """Raise `UserError` for what cannot be used."""
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"--crop-scale must grow within (0, 1], not {low:g} {high:g}")
        if self.padding < 0:
            raise UserError(f"--padding must be at least 0, not {self.padding}")
        if not 0 <= self.erasing <= 1:
            raise UserError(f"--erasing is a probability, in [0, 1], not {self.erasing}")
        check_rand_augment(self.rand_augment)

    def __call__(
        self, picture: Tensor, draws: Sequence[float], size: tuple[int, int], seed: int = 0
    ) -> Tensor:
        """Apply to one picture.

        Args:
            picture: ``[C, h, w]``, uint8 or fp32 in [0, 1].
            draws: `_DRAWS` numbers in (0, 1).
            size: ``(H, W)`` of the result.
            seed: of RandAugment and erasing, below 2^31.

        Returns:
            ``[C, H, W]`` fp32 in [0, 1].
        """
        # On demand, see `nimfast.data.decode.resize_and_crop`.
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transforms

        bicubic = InterpolationMode.BICUBIC
        mirror, down, right, *tries = draws
        if self.crop == "resized":
            box = _crop_box(picture.shape, down, right, tries, self.crop_scale)
            # Bytes until here: resizing them is faster, and rounds as Pillow does.
            picture = transforms.resized_crop(picture, *box, list(size), bicubic, antialias=True)
        elif self.crop == "padded":
            if picture.shape[1:] != size:
                picture = transforms.resize(picture, [min(size)], bicubic, antialias=True)
            picture = transforms.pad(picture, [self.padding])
            top, left = _place(picture.shape, size, down, right)
            picture = transforms.crop(picture, top, left, *size)
        elif picture.shape[1:] != size:
            picture = resize_and_crop(picture, size[0])
        if self.flip and mirror < 0.5:
            picture = transforms.horizontal_flip(picture)
        if self.rand_augment != "none":
            picture = rand_augment(picture, self.rand_augment, seed)
        pixels = to_pixels(picture).contiguous()
        return erase(pixels, self.erasing, seed) if self.erasing else pixels


def _crop_box(
    shape: Sequence[int],
    down: float,
    right: float,
    tries: Sequence[float],
    scale: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a resized crop, by the law of torchvision's RandomResizedCrop.

    The area's share is uniform in `scale`, the logarithm of the aspect ratio in log(3/4, 4/3); what
    does not fit is drawn again, and in the end the largest central part of an allowed ratio taken.
    """
    _, height, width = shape
    for share, ratio in zip(tries[::2], tries[1::2], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        stretch = math.exp((2 * ratio - 1) * _LOG_RATIO)
        wide, high = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
        if 0 < wide <= width and 0 < high <= height:
            return *_place(shape, (high, wide), down, right), high, wide
    high, wide = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - high) // 2, (width - wide) // 2, high, wide


def _place(
    shape: Sequence[int], size: tuple[int, int], down: float, right: float
) -> tuple[int, int]:
    """Top left corner, uniform among those that fit, of a part of an image ``[C, h, w]``."""
    return int(down * (shape[1] - size[0] + 1)), int(right * (shape[2] - size[1] + 1))


class Item(NamedTuple):
    """One training image, or, put together by a DataLoader, a batch of them.

    Attributes:
        image: ``[C, H, W]`` fp32 in [0, 1], augmented.
        label: its class.
        place: where it stands in the data.
        asked: the place that was asked for, another one where the image there is broken.
        epoch: of which the draws are.
    """

    image: Tensor
    label: Tensor | int
    place: Tensor | int
    asked: Tensor | int
    epoch: Tensor | int


class Augmented(Dataset[Item]):
    """Augmented training images by key: (epoch, index in the data).

    Where an image is broken, the next one that can be read takes its place, so that batches stay
    full; `Skipped` keeps account.

    Args:
        data: the images.
        augmentation: what is done to them.
        seed: of the draws.
    """

    def __init__(self, data: ImageDataset, augmentation: Augmentation, seed: int) -> None:
        self.data, self.augmentation, self.seed = data, augmentation, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Item]:
        # A whole batch at once, as DataLoader asks where it can: the draws of one image alone would
        # take as long as reading it, and nvJPEG wants many files.
        asked = [index for _, index in keys]
        found = [
            (index, picture) if isinstance(picture, tuple) else self._next(index, picture)
            for index, picture in zip(asked, self.data.pictures(asked), strict=True)
        ]
        draws: dict[int, list[list[float]]] = {}
        seeds: dict[int, list[int]] = {}
        for epoch in {epoch for epoch, _ in keys}:
            places = torch.tensor([place for place, _ in found])
            draws[epoch] = uniform(self.seed, Purpose.CROP, places, _DRAWS, epoch).tolist()
            colour = uniform(self.seed, Purpose.COLOUR, places, 1, epoch)[:, 0]
            seeds[epoch] = (colour * 2**31).long().tolist()
        height, width = self.data.shape[1:]
        items = []
        for row, ((epoch, wanted), (index, (picture, label))) in enumerate(
            zip(keys, found, strict=True)
        ):
            image = self.augmentation(
                picture, draws[epoch][row], (height, width), seeds[epoch][row]
            )
            items.append(Item(image, label, index, wanted, epoch))
        return items

    def _next(self, index: int, broken: UnreadableImage) -> tuple[int, tuple[Tensor, int]]:
        for step in range(1, len(self.data)):
            place = (index + step) % len(self.data)
            picture = self.data.pictures([place])[0]
            if isinstance(picture, tuple):
                return place, picture
        raise broken


class Skipped:
    """The broken images that a run met: which, and whether they are too many.

    Args:
        data: the images.
    """

    def __init__(self, data: ImageDataset) -> None:
        self.data = data
        self.reasons: dict[int, str] = {}

    def note(self, asked: Tensor, got: Tensor) -> None:
        """Compare the images asked for with those that came, see `Augmented`; int64 ``[B]`` each.

        Raises:
            UserError: more than `MOST_BROKEN` of the data is broken.
        """
        for index in asked[asked != got].tolist():
            if index not in self.reasons:
                # Read once more for its message: that is rare, and costs no line between processes.
                self.reasons[index] = str(self.data.pictures([index])[0])
        if len(self.reasons) > MOST_BROKEN * len(self.data):
            raise UserError(
                f"{self.summary()}: more than {MOST_BROKEN:.0%} of the data; the first:"
                f" {next(iter(self.reasons.values()))}"
            )

    def summary(self) -> str:
        """One line: how many."""
        count = len(self.reasons)
        images = "image" if count == 1 else "images"
        return f"{count} broken {images} among the {len(self.data)} of {self.data.name} met so far"

    def report(self) -> list[str]:
        """Lines for the end of a run: how many, then each with its place; none if none."""
        return [self.summary(), *self.reasons.values()] if self.reasons else []
