# SPDX-License-Identifier: Apache-2.0
"""The two kinds of masked autoencoder, as pretraining sees them: how made, how shown an image.

MAE leaves removed patches out; SimMIM puts a learned token in their place. Either is the denoising
one (NIM, DMAE) by the noise in its corruption alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from nimfast.corruption import Corruption, Purpose, SigmaLaw, draw_keys
from nimfast.data.base import ImageDataset
from nimfast.errors import UserError
from nimfast.models.mae import MAE
from nimfast.models.patches import PatchModel
from nimfast.models.simmim import SimMIM, simmim_architecture
from nimfast.ops import unit_masks
from train.settings import named_architecture

if TYPE_CHECKING:
    from train.pretrain import Pretrain


class Shown(NamedTuple):
    """What a network gets to see of a batch of B images.

    Attributes:
        inputs: arguments of its forward.
        hidden: predicted patches that were masked, bool ``[B, L']``; None without a mask.
        target: the clean images at the network's size, ``[B, C, H, W]`` in [0, 1].
    """

    inputs: tuple[Tensor, Tensor | None]
    hidden: Tensor | None
    target: Tensor


class Removing:
    """Noise, and MAE's mask: patches that are not encoded at all.

    Args:
        model: whose patches are meant.
        settings: noise law and mask ratio.

    Raises:
        UserError: a ratio that leaves no patch.
    """

    def __init__(self, model: PatchModel, settings: Pretrain) -> None:
        law = SigmaLaw.parse(settings.sigma)
        ratio, seed = settings.mask_ratio, settings.seed
        self.corruption = Corruption(
            law, ratio, seed, settings.mean, settings.std, settings.enlarge
        )
        self.model = model
        if int(model.arch.patches * (1 - ratio)) < 1:
            raise UserError(
                f"--mask-ratio {ratio} leaves none of {model.arch.patches} patches; lower it, or "
                "choose a smaller --patch"
            )

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Shown:
        """Images ``[B, C, H, W]`` and their places in the data -> what the network gets."""
        rows, keep, removed = self.corruption(images, indices, epoch, self.model.arch.patch)
        return Shown((rows, keep), removed, self.corruption.enlarged(images))


class Replacing:
    """Noise, and SimMIM's mask: squares of pixels whose patches become a learned token.

    ``ceil(ratio * squares)`` of the squares are masked.

    Args:
        model: whose patches are meant.
        settings: noise law, mask ratio and the side of the squares.

    Raises:
        UserError: squares that fit neither image nor patches, or of which none would remain.
    """

    def __init__(self, model: PatchModel, settings: Pretrain) -> None:
        law, unit = SigmaLaw.parse(settings.sigma), settings.mask_unit
        self.corruption = Corruption(
            law, 0.0, settings.seed, settings.mean, settings.std, settings.enlarge
        )
        self.model, self.seed = model, settings.seed
        self.ratio = settings.mask_ratio
        if not self.ratio:
            return
        height, width = model.arch.image_size
        if unit < 1 or unit % model.predicted_patch or height % unit or width % unit:
            raise UserError(
                f"--mask-unit {unit} must divide the images' {height}x{width} pixels and be a "
                f"multiple of the predicted patch, {model.predicted_patch}"
            )
        self.grid = (height // unit, width // unit)
        squares = self.grid[0] * self.grid[1]
        if math.ceil(self.ratio * squares) == squares:
            raise UserError(
                f"--mask-ratio {self.ratio} leaves none of {squares} squares; lower it, or "
                f"--mask-unit {unit}"
            )
        self.embedded = unit // model.arch.patch  # sides of a square in patches that go in
        self.predicted = unit // model.predicted_patch  # and in patches that come out

    def __call__(self, images: Tensor, indices: Tensor, epoch: int) -> Shown:
        """Images ``[B, C, H, W]`` and their places in the data -> what the network gets."""
        rows = self.corruption(images, indices, epoch, self.model.arch.patch).rows
        target = self.corruption.enlarged(images)
        if not self.ratio:
            return Shown((rows, None), None, target)
        keys = draw_keys(self.seed, Purpose.MASK, indices)
        squares = unit_masks(keys, self.grid, 1, self.ratio, first_sample=epoch)
        squares = squares.view(-1, *self.grid)
        inputs = (rows, _enlarge(squares, self.embedded))
        return Shown(inputs, _enlarge(squares, self.predicted), target)


def _enlarge(squares: Tensor, times: int) -> Tensor:
    """``[B, h, w]`` -> ``[B, (h * times) * (w * times)]``: each entry becomes a square of them."""
    return squares.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)


def masked_autoencoder(settings: Pretrain, data: ImageDataset) -> MAE:
    """The MAE that the settings name, with fresh weights."""
    return MAE(named_architecture(settings, data, settings.patch))


def simmim(settings: Pretrain, data: ImageDataset) -> SimMIM:
    """The SimMIM that the settings name, with fresh weights."""
    try:
        shape = settings.image_shape(data)
        return SimMIM(simmim_architecture(settings.model, shape, settings.patch))
    except ValueError as error:
        raise UserError(f"--model {settings.model} --data {settings.data}: {error}") from None


@dataclass(frozen=True)
class Kind:
    """A kind of network.

    Attributes:
        network: its class.
        build: makes one by the settings, with fresh weights.
        corruption: how an image is shown to it.
    """

    network: type[PatchModel]
    build: Callable[[Pretrain, ImageDataset], PatchModel]
    corruption: type[Removing] | type[Replacing]


KINDS = {
    "mae": Kind(MAE, masked_autoencoder, Removing),
    "simmim": Kind(SimMIM, simmim, Replacing),
}
