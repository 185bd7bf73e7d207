# SPDX-License-Identifier: Apache-2.0
"""Evidence that may be looked at whenever one likes: mixture e-processes for success counts.

After t samples with S successes the e-value against "the success probability is at most p0" is

    E = integral over p > p0 of (p / p0)^S ((1 - p) / (1 - p0))^(t - S) d Beta(1/2, 1/2)(p | p > p0)
      = B(a + S, a + t - S) P(Beta(a + S, a + t - S) > p0)
        / [B(a, a) P(Beta(a, a) > p0) p0^S (1 - p0)^(t - S)],   a = 1/2.

Each likelihood ratio in the integral is a non-negative supermartingale under the hypothesis, so
their mixture is one, and by Ville's inequality P(E reaches 1 / alpha at any time) <= alpha. There
is no largest sample, no schedule to keep and no price for looking.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaln

_A = 0.5

# Log-gamma functions keep 14 digits of sums of the size of t: 1e-8 at t = 10^6. A threshold that is
# passed with this margin is passed in exact arithmetic; it is worth a hundred-thousandth of a
# sample's evidence.
_LOG_MARGIN = 1e-6
_MOST_SAMPLES = 10**7


def log_e_value(successes: ArrayLike, failures: ArrayLike, p0: float) -> NDArray[np.float64]:
    """Natural logarithm of the e-value against "success probability <= p0", never rounded up.

    It grows with successes and falls with failures.

    Args:
        successes, failures: counts, arrays of one shape, at most 10^7 together.
        p0: in (0, 1).

    Returns:
        Array of the same shape; -inf where the share of successes is at most p0, where no E is
        above 1.
    """
    s, f = np.asarray(successes, dtype=np.float64), np.asarray(failures, dtype=np.float64)
    if not 0 < p0 < 1:
        raise ValueError(f"p0 must lie between 0 and 1 (both excluded), not {p0}")
    if s.size and (min(s.min(), f.min()) < 0 or (s + f).max() > _MOST_SAMPLES):
        raise ValueError(f"counts must not be negative nor exceed {_MOST_SAMPLES:,} together")
    above = s > p0 * (s + f)
    s, f = np.where(above, s, 1), np.where(above, f, 0)
    # P(Beta(x, y) > p) is the regularised incomplete beta function I_(1-p)(y, x).
    log_e = betaln(_A + s, _A + f) + np.log(betainc(_A + f, _A + s, 1 - p0))
    log_e -= betaln(_A, _A) + math.log(betainc(_A, _A, 1 - p0))
    log_e -= s * math.log(p0) + f * math.log1p(-p0)
    return np.where(above, log_e - _LOG_MARGIN, -np.inf)


def acceptance_counts(looks: ArrayLike, p0: float, alpha: float) -> NDArray[np.int64]:
    """Smallest number of successes at each look whose e-value reaches 1 / alpha.

    Args:
        looks: int ``[K]``, samples seen.
        p0: the hypothesis is "success probability <= p0".
        alpha: error over all looks together.

    Returns:
        int64 ``[K]``; look + 1 where no number of successes is enough.
    """
    t = np.asarray(looks, dtype=np.int64)
    low, high = np.full_like(t, -1), t + 1  # low is not enough, high is (or is out of reach)
    while np.any(high - low > 1):
        middle = np.clip((low + high) // 2, 0, t)
        enough = log_e_value(middle, t - middle, p0) >= -math.log(alpha)
        open_ = high - low > 1
        high = np.where(open_ & enough, middle, high)
        low = np.where(open_ & ~enough, middle, low)
    return high


def largest_hypothesis(n: int, alpha: float) -> float:
    """Largest p0 that n successes out of n reject, rounded down; 0 where there is none."""
    low, high = 0.0, 1 - 2.0**-52
    while high - low > 1e-15:
        middle = (low + high) / 2
        enough = middle > 0 and log_e_value(n, 0, middle) >= -math.log(alpha)
        low, high = (middle, high) if enough else (low, middle)
    return low
