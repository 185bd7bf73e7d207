# SPDX-License-Identifier: Apache-2.0
"""Images as rows of patches: the form in which every network here takes and gives them.

A row holds one patch in (row, column, channel) order. The patch embedding is a linear map of rows,
so that a kernel can hand rows to a network without an image ever being assembled.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nimfast.ops.patches import patchify


@dataclass(frozen=True)
class Shape:
    """What a network's patches are.

    Attributes:
        image_size: ``(H, W)`` in pixels, each a multiple of `patch`.
        channels: image channels.
        patch: patch side p in pixels.
    """

    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    patch: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON gives a list
        if self.patch < 1 or any(side % self.patch or side < 1 for side in self.image_size):
            raise ValueError(f"image size {self.image_size} is no multiple of patch {self.patch}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        height, width = self.image_size
        return height // self.patch, width // self.patch

    @property
    def patches(self) -> int:
        """Number of patches L."""
        rows, columns = self.grid
        return rows * columns

    @property
    def row_size(self) -> int:
        """Values in one patch row: p * p * C."""
        return self.patch * self.patch * self.channels


class PatchModel(nn.Module):
    """A network that takes patch rows; `arch` says which."""

    arch: Shape

    @property
    def predicted_patch(self) -> int:
        """Side P in pixels of the patches that an autoencoder predicts."""
        return self.arch.patch

    def rows(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` of this network's size -> patch rows ``[N, L, p*p*C]``.

        Raises:
            ValueError: images of another shape.
        """
        self.check_images(images)
        return patchify(images, self.arch.patch)

    def check_images(self, images: Tensor) -> None:
        """Refuse images that are not of this network's size ``[N, C, H, W]``.

        Raises:
            ValueError: another shape; a single patch would broadcast over any number.
        """
        wanted = (self.arch.channels, *self.arch.image_size)
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"images must be [N, C, H, W] with {wanted}, not {tuple(images.shape)}"
            )


def take(rows: Tensor, keep: Tensor | None) -> Tensor:
    """Rows ``[N, L, D]`` at places `keep` (int64 ``[N, K]``) -> ``[N, K, D]``; None keeps all."""
    return rows if keep is None else rows.gather(1, keep[..., None].expand(-1, -1, rows.shape[2]))
