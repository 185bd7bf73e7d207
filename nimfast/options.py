# SPDX-License-Identifier: Apache-2.0
"""Words that options of several commands take, apart from what they switch.

Nothing is imported here, so that ``--help`` and a mistyped option need not wait for torch.
"""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""Of a network's arithmetic; see `nimfast.runtime.prepare`."""

Noise = Literal["gaussian", "grid"]
"""Law of the noise; see `nimfast.ops.corrupt`."""

ProtocolName = Literal["exact", "cohen", "dmae", "anytime"]
"""How an image is certified; see `nimfast.smoothing.protocols`."""
