# SPDX-License-Identifier: Apache-2.0
"""Randomised smoothing: certified radii from votes over noisy copies of an image."""

from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.plans import Plan, plan
from nimfast.smoothing.smooth import Certificate, Smooth

__all__ = ["ABSTAIN", "Certificate", "Plan", "Smooth", "plan"]
