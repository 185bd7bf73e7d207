# SPDX-License-Identifier: Apache-2.0
"""A network that works at another size than its images have, as DMAE's classifiers of CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Resize:
    """Bicubic enlargement; noise is drawn before it, so radii stay in pixels of the small image.

    Attributes:
        size: ``(H, W)`` of the result.
        antialias: torchvision's newer default (kernel a = -0.5, widened where images shrink). The
            published runs had none (a = -0.75); outputs differ by up to 0.116.
    """

    size: tuple[int, int]
    antialias: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> ``[N, C, H, W]`` of the same type; linear in the pixels."""
        if tuple(images.shape[2:]) == tuple(self.size):
            return images
        return F.interpolate(images, self.size, mode="bicubic", antialias=self.antialias)


class Resized(nn.Module):
    """`body` behind a resize: normalised images ``[N, C, h, w]`` -> what `body` makes of them.

    Normalisation may come first: the resize is an average, so the two commute.
    """

    def __init__(self, body: nn.Module, resize: Resize) -> None:
        super().__init__()
        self.body, self.resize = body, resize

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.body(self.resize(images))
        return result
