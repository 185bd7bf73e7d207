# SPDX-License-Identifier: Apache-2.0
"""Augmentation of image batches, drawn from (seed, epoch, index) alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nimfast.corruption import Purpose, uniform


@dataclass(frozen=True)
class Affine:
    """Small random affine maps, for images whose content fills the frame; all 0: none.

    Attributes:
        shift: largest shift in pixels, along each axis.
        rotate: largest rotation in degrees.
        scale: largest relative change of size, along each axis by itself.
        shear: largest horizontal shear (pixels per pixel).
    """

    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def __call__(self, images: Tensor, indices: Tensor, epoch: int, seed: int) -> Tensor:
        """Images ``[B, C, H, W]``, `indices` their places in the data set -> the same shape."""
        if self == Affine():
            return images
        draws = uniform(seed, Purpose.AUGMENTATION, indices, 6, epoch).to(images.dtype)
        u = (2 * draws - 1)[:, :, None, None]  # [B, 6, 1, 1] in (-1, 1)
        height, width = images.shape[-2:]
        # Pixel centres as offsets from the image's centre: [1, H, 1] and [1, 1, W].
        y = (torch.arange(height, device=images.device) - (height - 1) / 2)[None, :, None]
        x = (torch.arange(width, device=images.device) - (width - 1) / 2)[None, None]
        angle = u[:, 0] * (self.rotate * torch.pi / 180)
        stretch_x, stretch_y = 1 + u[:, 1] * self.scale, 1 + u[:, 2] * self.scale
        # Written out by element, not as a batched product: an image's values then cannot depend on
        # which other images stand in its batch.
        from_x = x * stretch_x
        from_y = y * stretch_y
        source_x = angle.cos() * from_x - angle.sin() * from_y + u[:, 3] * self.shear * y
        source_y = angle.sin() * from_x + angle.cos() * from_y
        source_x = (source_x + u[:, 4] * self.shift) * (2 / width)
        source_y = (source_y + u[:, 5] * self.shift) * (2 / height)
        return F.grid_sample(images, torch.stack([source_x, source_y], -1), align_corners=False)
