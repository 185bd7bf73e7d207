# SPDX-License-Identifier: Apache-2.0
"""How the rows of a plan are made, and what error they have.

Acceptance: as early as the error allows, and at the last look CERTIFY's own count. Giving up: where
little is lost. Error: exact, for a known class or for whichever class leads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from nimfast.smoothing.recursion import (
    Counts,
    accept_boundary,
    crossing_probability,
    futility_boundary,
)

CONTESTED = 0.55
"""Below this probability of the leading class, a second one could have nearly as much."""

FUTILITY = 0.01
"""Share of the paths on the edge of passing that a row may give up."""

_BISECTIONS = 25
_INTERVALS = 2**10

Probabilities = tuple[float, ...]
Looks = tuple[int, ...]


def _accept_row(p: float, looks: Looks, alpha: float) -> Counts:
    """Acceptance counts of one hypothesis: as early as possible, CERTIFY's own count at the end."""
    n = looks[-1]
    (fixed,) = accept_boundary(p, looks[-1:], [alpha])[0]

    def spending(budget: float) -> Counts:
        limits = [budget * math.sqrt(look / n) for look in looks[:-1]]
        return accept_boundary(p, looks, [*limits, alpha])[0]

    # Spending more on early looks costs error only on paths that would not have passed at the end,
    # and what the discreteness of the count leaves of alpha pays for those.
    low, high = 0.0, 2 * alpha
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if spending(middle)[-1] == fixed else (low, middle)
    return spending(low)


def _futile_row(looks: Looks, accept: Counts) -> Counts:
    """Counts at which to give up, losing 1% of what is on the edge of passing at the end."""
    n, count = looks[-1], int(accept[-1])
    limits = [FUTILITY * (k + 1) / len(looks) for k in range(len(looks))]
    futile = futility_boundary(count / n, looks, limits)
    futile[-1] = count - 1
    return np.minimum(futile, accept - 1)


def nested(accept: list[Counts], futile: list[Counts]) -> tuple[Counts, Counts]:
    """Rows such that passing one is passing all before it; and giving one up, all after it."""
    return (
        np.maximum.accumulate(np.stack(accept), axis=0),
        np.minimum.accumulate(np.stack(futile)[::-1], axis=0)[::-1],
    )


def _label_free_error(p: Probabilities, looks: Looks, accept: Counts, alpha: float) -> float:
    """Largest error of the last of the rows `accept` where the leading class is tested.

    The error at true probability q of the most likely class is at most F_j(q) + F_0(1 - q) for q in
    (p_(j-1), p_j], where F_i(q) is the probability that a count of success probability q passes row
    i. F_j grows with q and F_0(1 - q) falls, so F_j(v) + F_0(1 - u) bounds it over [u, v];
    intervals are halved until that is at most alpha, or they get too small.
    """
    j = len(accept) - 1
    row = functools.cache(lambda q: crossing_probability(q, looks, accept[j]))
    first = functools.cache(lambda q: crossing_probability(q, looks, accept[0]))
    lowest = p[j - 1] if j else 0.5
    worst = 2 * first(0.5) if j == 0 else 0.0  # no class has more than 1/2
    least = (p[j] - lowest) / _INTERVALS
    waiting = [(lowest, p[j])]
    while waiting:
        low, high = waiting.pop()
        limit = row(high) + first(1 - low)
        if limit > alpha and high - low > least:
            middle = (low + high) / 2
            waiting += [(low, middle), (middle, high)]
            continue
        worst = max(worst, limit)
        if limit > alpha:
            break
    return worst


def errors(
    p: Probabilities, looks: Looks, accept: Counts, alpha: float, labelled: bool
) -> tuple[float, ...]:
    """Error of each of the nested rows `accept`, rounded up; see `Plan.error`."""
    if labelled:
        return tuple(crossing_probability(q, looks, row) for q, row in zip(p, accept, strict=True))
    rows = range(1, len(p) + 1)
    return tuple(_label_free_error(p[:j], looks, accept[:j], alpha) for j in rows)


def build(p: Probabilities, looks: Looks, alpha: float, labelled: bool) -> tuple[Counts, Counts]:
    """Acceptance and futility counts of the hypotheses p, nested: int64 ``[R, K]`` each."""
    accept: list[Counts] = []
    for j, q in enumerate(p):
        for share in _shares(q, looks, alpha, labelled, accept):
            row = _accept_row(q, looks, share)
            raised = np.maximum.accumulate(np.stack([*accept, row]), axis=0)
            if labelled or _label_free_error(p[: j + 1], looks, raised, alpha) <= alpha:
                break
        accept.append(row)
    return nested(accept, [_futile_row(looks, row) for row in accept])


def _shares(
    q: float, looks: Looks, alpha: float, labelled: bool, accept: Sequence[Counts]
) -> Iterator[float]:
    """How much of alpha a row may have, to be tried in this order."""
    if labelled or q >= CONTESTED:
        # Without a label: all of it, where the rounding of counts leaves what the runner-up adds;
        # then less by what that is.
        yield alpha
        first = accept[0] if accept else _accept_row(q, looks, alpha)
        yield max(alpha / 2, alpha - 2 * crossing_probability(1 - q, looks, first))
    # With half, the sum is at most alpha whatever the runner-up adds.
    yield alpha / 2
