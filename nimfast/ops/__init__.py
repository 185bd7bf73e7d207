# SPDX-License-Identifier: Apache-2.0
"""The kernels: one file per operation, from its reference to its public function."""

from nimfast.ops.backend import OPERATIONS, use_backend
from nimfast.ops.corrupt import corrupt
from nimfast.ops.corrupt_patches import corrupt_patches
from nimfast.ops.noise import Stream, image_keys, random_bits
from nimfast.ops.votes import votes

__all__ = [
    "OPERATIONS",
    "Stream",
    "corrupt",
    "corrupt_patches",
    "image_keys",
    "random_bits",
    "use_backend",
    "votes",
]
