# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of shares."""

from __future__ import annotations

from typing import Any

import numpy as np

_NORMAL_95 = 1.959963984540054


def wilson(share: Any, trials: float) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of a probability of which `share` was seen in `trials` independent trials.

    Wilson (1927), rather than share +- z * sqrt(...): sensible at 0 and 1, and with 20 trials.

    Args:
        share: one number or an array, in [0, 1].
        trials: how many; need not be whole.

    Returns:
        Lower and upper ends, of the shape of `share`.
    """
    share, z = np.asarray(share, dtype=float), _NORMAL_95
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    half *= z / (1 + z * z / trials)
    # At a share of 0 or 1 the end is exactly 0 or 1; rounding may miss it.
    return np.clip(middle - half, 0, share), np.clip(middle + half, share, 1)
