# SPDX-License-Identifier: Apache-2.0
"""The kernels: one file per operation, from its reference to its public function."""

from nimfast.ops.ascend import ascend
from nimfast.ops.attention import attention
from nimfast.ops.backend import OPERATIONS, use_backend
from nimfast.ops.corrupt import corrupt
from nimfast.ops.corrupt_patches import corrupt_patches
from nimfast.ops.grid import check_grid, grid_slack
from nimfast.ops.mask_tokens import mask_tokens
from nimfast.ops.noise import Stream, image_keys, random_bits
from nimfast.ops.random_masks import Masks, random_masks, unit_masks
from nimfast.ops.recon_loss import recon_loss
from nimfast.ops.vote_loss import vote_loss
from nimfast.ops.votes import votes

__all__ = [
    "OPERATIONS",
    "Masks",
    "Stream",
    "ascend",
    "attention",
    "check_grid",
    "corrupt",
    "corrupt_patches",
    "grid_slack",
    "image_keys",
    "mask_tokens",
    "random_bits",
    "random_masks",
    "recon_loss",
    "unit_masks",
    "use_backend",
    "vote_loss",
    "votes",
]
