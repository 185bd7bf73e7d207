# SPDX-License-Identifier: Apache-2.0
"""Randomised smoothing: certified radii from votes over noisy copies of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nimfast.ondemand import on_demand

if TYPE_CHECKING:
    from nimfast.smoothing.bounds import ABSTAIN
    from nimfast.smoothing.plans import Plan, plan
    from nimfast.smoothing.smooth import Certificate, Smooth

__all__ = ["ABSTAIN", "Certificate", "Plan", "Smooth", "plan"]

__getattr__ = on_demand(
    __name__,
    {
        "ABSTAIN": "nimfast.smoothing.bounds",
        "Certificate": "nimfast.smoothing.smooth",
        "Plan": "nimfast.smoothing.plans",
        "Smooth": "nimfast.smoothing.smooth",
        "plan": "nimfast.smoothing.plans",
    },
)
