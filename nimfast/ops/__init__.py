# SPDX-License-Identifier: Apache-2.0
"""The kernels: one file per operation, from its reference to its public function."""

from nimfast.ops.backend import OPERATIONS, use_backend
from nimfast.ops.corrupt import corrupt
from nimfast.ops.mask_tokens import mask_tokens
from nimfast.ops.noise import Stream, image_keys, random_bits
from nimfast.ops.random_masks import Masks, random_masks, unit_masks
from nimfast.ops.votes import votes

__all__ = [
    "OPERATIONS",
    "Masks",
    "Stream",
    "corrupt",
    "image_keys",
    "mask_tokens",
    "random_bits",
    "random_masks",
    "unit_masks",
    "use_backend",
    "votes",
]
