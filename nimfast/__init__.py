# SPDX-License-Identifier: Apache-2.0
"""nimfast: denoising pretraining, and fast, honest measurement of robustness."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nimfast.ondemand import on_demand

if TYPE_CHECKING:
    from nimfast.defense import De3, DeMask
    from nimfast.loading import load

__version__ = "0.1.0"
__all__ = ["De3", "DeMask", "load"]

__getattr__ = on_demand(
    __name__,
    {"De3": "nimfast.defense", "DeMask": "nimfast.defense", "load": "nimfast.loading"},
)
