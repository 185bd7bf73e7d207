# SPDX-License-Identifier: Apache-2.0
"""Images as patch rows, and back: the layout that every operation and model shares."""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images ``[N, C, H, W]`` -> patch rows ``[N, L, p*p*C]`` in (row, column, channel) order."""
    count, channels, height, width = images.shape
    cut = images.reshape(count, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(
        count, (height // patch) * (width // patch), patch * patch * channels
    )


def unpatchify(rows: Tensor, patch: int, image_size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: rows ``[N, L, p*p*C]`` -> images ``[N, C, H, W]``."""
    height, width = image_size
    channels = rows.shape[2] // (patch * patch)
    cut = rows.reshape(len(rows), height // patch, width // patch, patch, patch, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(rows), channels, height, width)
