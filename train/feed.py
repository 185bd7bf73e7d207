# SPDX-License-Identifier: Apache-2.0
"""The order of the images: which of them stand in which step, whoever reads and trains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from nimfast.corruption import Purpose, uniform
from nimfast.data.base import ImageDataset, UnreadableImage
from nimfast.data.transforms import Augmented, Skipped
from train.parallel import World
from train.settings import Settings

_Key = tuple[int, int]  # epoch, place in the data set


class Batch(NamedTuple):
    """Images ``[B, C, H, W]`` in [0, 1], augmented; labels and places in the data set, ``[B]``."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class _Order(Sampler[list[_Key]]):
    """Keys of this process's micro-batches, from step `first` to the end of the run."""

    def __init__(self, images: int, settings: Settings, world: World, first: int) -> None:
        self.images, self.settings, self.world, self.first = images, settings, world, first

    def __iter__(self) -> Iterator[list[_Key]]:
        batch, rank = self.settings.batch_size, self.world.rank
        micro, parts = self.settings.split_batch(self.world.size)
        steps = self.images // batch  # of an epoch; what is left over waits for another epoch
        share = micro * parts
        for epoch in range(self.first // steps, self.settings.epochs):
            draws = uniform(self.settings.seed, Purpose.ORDER, torch.arange(self.images), 1, epoch)
            order = draws[:, 0].argsort(stable=True)
            for step in range(self.first % steps if epoch == self.first // steps else 0, steps):
                start = step * batch + rank * share
                for place in range(start, start + share, micro):
                    yield [(epoch, index) for index in order[place : place + micro].tolist()]


def batches(
    data: ImageDataset, settings: Settings, world: World, skipped: Skipped, first: int = 0
) -> Iterator[Batch]:
    """This process's micro-batches from step `first` to the end of the run.

    The order of an epoch is drawn from (seed, epoch). One loader serves all epochs, so its workers
    start once and read ahead over an epoch's end. Broken images are noted in `skipped`.
    """
    # Images that were decoded on a GPU are there already.
    pinned = world.device.type == "cuda" and not data.on_gpu
    loader = DataLoader(
        Augmented(data, settings.crop_and_flip, settings.seed),
        batch_sampler=_Order(len(data), settings, world, first),
        num_workers=settings.workers,
        pin_memory=pinned,
    )
    for item in loader:
        skipped.note(item.asked, item.place)
        epoch = int(item.epoch[0])
        images, labels, places = (
            part.to(world.device, non_blocking=pinned)
            for part in (item.image, item.label, item.place)
        )
        yield Batch(settings.augment(images, places, epoch, settings.seed), labels, places)


def in_order(data: ImageDataset, size: int, world: World, skipped: Skipped) -> Iterator[Batch]:
    """This process's part of all images, as they are, in batches of at most `size`.

    Broken images are left out and noted in `skipped`, however many there are.
    """
    for start in range(size * world.rank, len(data), size * world.size):
        found = []
        for index in range(start, min(start + size, len(data))):
            try:
                found.append((*data[index], index))
            except UnreadableImage as error:
                skipped.reasons[index] = str(error)
        if found:
            images, labels, indices = zip(*found, strict=True)
            yield Batch(
                torch.stack(images).to(world.device),
                torch.tensor(labels, device=world.device),
                torch.tensor(indices, device=world.device),
            )
