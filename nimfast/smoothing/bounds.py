# SPDX-License-Identifier: Apache-2.0
"""From vote counts to a certificate: Clopper-Pearson bound, certified radius, PREDICT's test.

Source: Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing"
(2019): theorem 1 (radius) and the procedures CERTIFY and PREDICT.

Every number errs to the safe side: bounds and radii are never above their exact value.
"""

from __future__ import annotations

import math
from functools import cache

from scipy.special import betainc, betaincinv, ndtr, ndtri

ABSTAIN = -1
"""The class that stands for "no answer"."""

# betainc's relative error grows with n: 3.4e-11 was the largest seen at n = 100,000. A tail that
# passes with this margin passes in exact arithmetic; it moves the bound by less than 1e-11.
_TAIL_MARGIN = 1e-9


def check_trials(n: int, alpha: float) -> None:
    """Raise ValueError where `n` trials or the error `alpha` make no sense."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie between 0 and 0.5 (both excluded), not {alpha}")


# Unbounded cache: the table from count to bound, filled as counts occur (at most n + 1 of them), so
# that a run pays for scipy once per distinct count and a single image does not pay for 100,000
# entries.
@cache
def lower_bound(count: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson bound: below the success probability with confidence 1 - alpha.

    The bound `p` is checked, P(Bin(n, p) >= count) <= alpha, and stepped down until that is true.

    Args:
        count: successes, 0 to n.
        n: independent trials.
        alpha: probability, over the trials, that the bound is above the truth; in (0, 0.5).

    Raises:
        ValueError: an argument out of range.
    """
    check_trials(n, alpha)
    if not 0 <= count <= n:
        raise ValueError(f"count must lie between 0 and n = {n}, not {count}")
    if count == 0:
        return 0.0
    bound, step = float(betaincinv(count, n - count + 1, alpha)), 2.0**-52
    # P(Bin(n, p) >= k) is the regularised incomplete beta function I_p(k, n - k + 1).
    while betainc(count, n - count + 1, bound) > alpha * (1 - _TAIL_MARGIN):
        bound, step = bound * (1 - step), 2 * step
    return bound


def probability(radius: float, sigma: float) -> float:
    """Probability Phi(radius / sigma) that a certificate of `radius` needs, rounded down."""
    # ndtr keeps 14 digits; 1e-15 is what its error moves, for radii of at least 0.
    return 0.5 if radius == 0 else float(ndtr(radius / sigma)) * (1 - 1e-14)


def upper_bound(count: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson bound above the success probability; see `lower_bound`."""
    return min(1.0, math.nextafter(1 - lower_bound(n - count, n, alpha), 2.0))


def less_slack(bound: float, slack: float) -> float:
    """`bound` - `slack`, not below 0, never rounded up.

    Where the noise drawn is within `slack` of the noise law in total variation, no probability
    differs by more, so a lower bound under the one less the slack is one under the other.
    """
    return bound if slack == 0 else max(0.0, math.nextafter(bound - slack, -1.0))


def radius(bound: float, sigma: float) -> float:
    """Certified l2 radius sigma * Phi^-1(bound), never rounded up; 0 for a bound of at most 1/2.

    Args:
        bound: lower bound of the winning class's probability, in [0, 1).
        sigma: standard deviation of the noise, in pixel units.

    Returns:
        The radius, in the unit of `sigma`.
    """
    if not 0 <= bound < 1:
        raise ValueError(f"bound must lie in [0, 1), not {bound}")
    if bound <= 0.5:
        return 0.0
    # In the upper tail, 1 - bound is exact in floating point, and Phi keeps its relative precision
    # there.
    tail, step = 1 - bound, 2.0**-52
    quantile = -float(ndtri(tail))
    while ndtr(-quantile) < tail * (1 + 1e-14):
        quantile, step = quantile * (1 - step), 2 * step
    return max(0.0, math.nextafter(sigma * quantile, 0.0))


def top2(
    count: int, second: int, n: int, alpha: float, sigma: float, slack: float = 0.0
) -> tuple[float, float]:
    """Certified radius from the tested class and its strongest rival, alpha / 2 for each.

    Source: Cohen et al. (2019), theorem 1 with both probabilities bounded.

    Args:
        count: votes of the tested class among n; the class was chosen without looking at them.
        second: most votes that any other class got.
        n: samples.
        alpha: probability that the radius is too large, in (0, 0.5).
        sigma: standard deviation of the noise.
        slack: total variation between the noise drawn and the noise law.

    Returns:
        ``(lower, radius)``: lower bound of the tested class's probability; radius sigma / 2 *
        (Phi^-1(lower) - Phi^-1(upper)), never rounded up, 0 where the rival may be ahead.
    """
    lower = less_slack(lower_bound(count, n, alpha / 2), slack)
    # All other classes together have what the tested one has not.
    upper = min(
        math.nextafter(upper_bound(second, n, alpha / 2) + slack, 2.0),
        math.nextafter(1 - lower, 2.0),
    )
    if not 0 < lower < 1 or not upper < lower:
        return lower, 0.0
    # ndtri keeps 13 digits on both sides of 0; the margin is a hundred times its error.
    gap = float(ndtri(lower)) - float(ndtri(upper))
    gap -= 1e-12 * (1 + abs(float(ndtri(lower))) + abs(float(ndtri(upper))))
    return lower, max(0.0, math.nextafter(sigma / 2 * gap, 0.0))


def recertify(
    p_lower: float, lost: int, n: int, alpha: float, sigma: float, slack: float = 0.0
) -> tuple[float, float]:
    """Certificate of a changed classifier from that of the classifier before the change.

    Both are run on the same noisy copies. A copy is lost where the old classifier gave the
    certified class and the new one does not; counting every copy on which they differ is allowed
    and gives a smaller radius. Source: Ugare et al., "Incremental Randomized Smoothing
    Certification" (2024).

    Args:
        p_lower: lower bound of the class's probability before the change, of error alpha_1.
        lost: lost copies among n; which n are looked at must not depend on what is lost.
        n: copies compared. They may be among those of the first certificate: errors add anyway.
        alpha: error of the upper bound of the share that is lost, in (0, 0.5).
        sigma: standard deviation of the noise.
        slack: total variation between the noise drawn and the noise law; `p_lower` has its own
            taken off.

    Returns:
        ``(bound, radius)``: lower bound of the class's probability now, and the radius it gives, 0
        where the bound is at most 1/2. Wrong with probability at most alpha_1 + alpha.
    """
    if not 0 <= p_lower < 1:
        raise ValueError(f"p_lower must lie in [0, 1), not {p_lower}")
    most = math.nextafter(upper_bound(lost, n, alpha) + slack, 2.0)
    bound = max(0.0, math.nextafter(p_lower - most, -1.0))
    return bound, radius(bound, sigma)


def max_radius(n: int, alpha: float, sigma: float) -> float:
    """Largest radius that n samples can certify: the one of n votes out of n."""
    return radius(lower_bound(n, n, alpha), sigma)


def least_samples(alpha: float) -> int:
    """Smallest n that can certify anything: n votes out of n give a bound of at least 1/2."""
    check_trials(1, alpha)
    n = max(1, math.floor(-math.log2(alpha)))
    while lower_bound(n, n, alpha) < 0.5:
        n += 1
    return n


def two_sided_p_value(top: int, second: int) -> float:
    """Exact binomial test of "both classes are equally likely", as PREDICT applies it.

    Args:
        top: votes of the leading class.
        second: votes of the runner-up, at most `top`.

    Returns:
        P(a split of top + second fair coin tosses at least as uneven as this one).
    """
    if not 0 <= second <= top:
        raise ValueError(
            f"votes must satisfy 0 <= second <= top, not top = {top}, second = {second}"
        )
    if top == second:
        return 1.0
    # Symmetric at 1/2: twice the upper tail P(Bin(top + second, 1/2) >= top).
    return min(1.0, 2 * float(betainc(top, second + 1, 0.5)))
