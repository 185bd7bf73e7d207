# SPDX-License-Identifier: Apache-2.0
"""Which stored split serves which name, and the validation images that data sets do not have.

Nothing may be chosen on test images, so where data has no validation split of its own, 5% of its
training images are held out: those with the smallest of one keyed draw per image. The draw knows
the image's place alone, so every run, machine and seed holds out the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nimfast.corruption import Purpose, uniform
from nimfast.data.base import ImageDataset, UnreadableImage
from nimfast.errors import UserError

_VALIDATION = ("validation", "val", "valid")
NAMES = ("train", *_VALIDATION, "test")
HELD_OUT = 0.05


class Choice(NamedTuple):
    """What to read: the stored split, and which part of it (None: all)."""

    stored: str
    part: Literal["train", "validation"] | None


def choose(split: str, present: Collection[str]) -> Choice | None:
    """How to serve `split` from the splits that are stored; None where they cannot.

    Args:
        split: its name; ``validation``, ``val`` and ``valid`` are one.
        present: names of what is stored; empty where the data tells no splits apart. Then ``train``
            and ``validation`` are its two parts, and any other name means all of it.
    """
    validation = split in _VALIDATION
    own = next((name for name in _VALIDATION if name in present), None)
    if validation and own is not None:
        return Choice(split if split in present else own, None)
    if validation and (not present or "train" in present):
        return Choice("train" if present else split, "validation")
    if split == "train" and own is None and (not present or "train" in present):
        return Choice("train", "train")
    return Choice(split, None) if split in present or not present else None


def part_of(whole: ImageDataset, chosen: Choice) -> ImageDataset:
    """The part of a stored split that `chosen` names.

    Raises:
        UserError: a single image, of which none can be held out.
    """
    if chosen.part is None:
        return whole
    if len(whole) < 2:
        raise UserError(
            f"{whole.name} has one image, too few to hold any out for validation; add images"
        )
    draws = uniform(0, Purpose.SPLIT, torch.arange(len(whole)), 1, 0)[:, 0]
    held_out = max(1, round(HELD_OUT * len(whole)))
    order = draws.argsort(stable=True)
    rows = order[:held_out] if chosen.part == "validation" else order[held_out:]
    return Part(whole, chosen.part, rows.sort().values.tolist())


class Part(ImageDataset):
    """Some images of another data set, in its order.

    Args:
        whole: the other data set.
        split: what this part is called.
        rows: their places in it.
    """

    def __init__(self, whole: ImageDataset, split: str, rows: Sequence[int]) -> None:
        self.whole, self.rows = whole, list(rows)
        self.name, self.split = whole.name, split
        self.classes, self.shape = whole.classes, whole.shape
        self.on_gpu = whole.on_gpu

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.whole[self.rows[index]]

    def pictures(self, indices: Sequence[int]) -> list[tuple[Tensor, int] | UnreadableImage]:
        """See `ImageDataset`."""
        return self.whole.pictures([self.rows[index] for index in indices])

    def identity(self) -> str:
        """Covers what the whole's does, and which images of it these are."""
        return self._digest(self.whole.identity().encode(), str(self.rows).encode())
