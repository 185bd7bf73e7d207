# SPDX-License-Identifier: Apache-2.0
"""What options of several commands take, apart from what they switch.

Nothing is imported here, so that ``--help`` and a mistyped option need not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""Of a network's arithmetic; see `nimfast.runtime.prepare`."""

Noise = Literal["gaussian", "grid"]
"""Law of the noise; see `nimfast.ops.corrupt`."""

ProtocolName = Literal["exact", "cohen", "dmae", "anytime"]
"""How an image is certified; see `nimfast.smoothing.protocols`."""

Norm = Literal["linf", "l2", "l1"]
"""Of an attack's ball."""

Protocol = Literal["official", "nim", "fair"]
"""How an attack is measured; see `nimfast.attacks.autoattack`."""


@dataclass(frozen=True)
class Hints:
    """What a published file does not say."""

    heads: int | None = None
    """attention heads (default: as in the sizes known by name, else width / 64)"""
    decoder_heads: int | None = None
    """attention heads of the decoder (default: its width / 32)"""
    image_size: tuple[int, int] | None = None
    """height and width in pixels (default: the file's); positions are resized bicubically"""
    window: int | None = None
    """side in tokens of a Swin's windows (default: the file's); their positions are resized too"""
    mean: tuple[float, ...] | None = None
    """normalisation it was trained with, one value per channel (default: ImageNet's)"""
    std: tuple[float, ...] | None = None
    """normalisation it was trained with, one value per channel (default: ImageNet's)"""
