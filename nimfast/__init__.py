# SPDX-License-Identifier: Apache-2.0
"""nimfast: denoising pretraining, and fast, honest measurement of robustness."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nimfast.defense import De3, DeMask
    from nimfast.loading import load

__version__ = "0.1.0"
__all__ = ["De3", "DeMask", "load"]

# On demand: importing the package must not import torch.
_PLACES = {"De3": "nimfast.defense", "DeMask": "nimfast.defense", "load": "nimfast.loading"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'nimfast' has no attribute {name!r}")
