# SPDX-License-Identifier: Apache-2.0
"""The kernels: one file per operation, from its reference to its public function."""

from nimfast.ops.backend import OPERATIONS, use_backend
from nimfast.ops.corrupt import corrupt
from nimfast.ops.noise import Stream, image_keys, random_bits
from nimfast.ops.recon_loss import recon_loss
from nimfast.ops.votes import votes

__all__ = [
    "OPERATIONS",
    "Stream",
    "corrupt",
    "image_keys",
    "random_bits",
    "recon_loss",
    "use_backend",
    "votes",
]
