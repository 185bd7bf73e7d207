# SPDX-License-Identifier: Apache-2.0
"""Exact probabilities of group-sequential tests of a success probability.

The test looks at the number of successes S among the first n_1 < ... < n_K samples. Between two
looks S grows by a binomial number, so the distribution of S over the paths that have not stopped is
carried from look to look by a convolution, and what a boundary stops is a sum of its entries.

Rounding. All terms are positive and nothing is ever subtracted, so relative errors only add up: at
most 4 roundings for each factor of a binomial weight, one for each term of a sum. For n <= 10^7 a
probability is thus within 1e-10 of itself. Weights below 1e-32 of the largest are left out, which
loses less than 1e-22. `at_most` allows for ten times the first and for the second.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Mass = NDArray[np.float64]
Counts = NDArray[np.int64]

MOST_SAMPLES = 10**7
_NEGLIGIBLE = 1e-32
_RELATIVE, _ABSOLUTE = 1e-9, 1e-22
_UNSEEN = 1e-14  # paths that no expectation shows


Real = TypeVar("Real", float, Mass)


def at_most(probability: Real) -> Real:
    """What the exact value of a computed `probability` does not exceed."""
    return probability * (1 + _RELATIVE) + _ABSOLUTE


class Distribution(NamedTuple):
    """Probabilities ``mass[i]`` of the counts ``low + i``; all others have none."""

    low: int
    mass: Mass

    def trimmed(self) -> Distribution:
        """Without negligible weights at both ends."""
        kept = np.nonzero(self.mass > _NEGLIGIBLE)[0]
        if not len(kept):
            return Distribution(self.low, np.zeros(0))
        return Distribution(self.low + int(kept[0]), self.mass[kept[0] : kept[-1] + 1])

    def plus(self, other: Distribution) -> Distribution:
        """Distribution of the sum of two independent counts."""
        if not len(self.mass):
            return self
        # Summed term by term: an FFT's error would be absolute, and tails are what matters here.
        return Distribution(self.low + other.low, np.convolve(self.mass, other.mass)).trimmed()

    def cut(self, first: int, last: int) -> Distribution:
        """Only the counts from `first` to `last`."""
        start = min(max(first - self.low, 0), len(self.mass))
        stop = min(max(last + 1 - self.low, start), len(self.mass))
        return Distribution(self.low + start, self.mass[start:stop])


START = Distribution(0, np.ones(1))
_NOTHING = Distribution(0, np.zeros(0))


@functools.lru_cache(maxsize=256)
def binomial(n: int, p: float) -> Distribution:
    """Number of successes among n independent samples of success probability p."""
    if p in (0.0, 1.0):
        return Distribution(round(n * p), np.ones(1))
    q = 1 - p
    mode = min(n, int((n + 1) * p))
    # Products of ratios of neighbours, from the mode outwards; 1 at the mode.
    above, below = np.arange(mode, n, dtype=np.float64), np.arange(mode, 0, -1, dtype=np.float64)
    up = np.cumprod((n - above) / (above + 1) * (p / q))
    down = np.cumprod(below / (n - below + 1) * (q / p))
    up, down = up[up > _NEGLIGIBLE], down[down > _NEGLIGIBLE]
    weights = np.concatenate([down[::-1], [1.0], up])
    mass = weights / weights.sum()
    mass.setflags(write=False)
    return Distribution(mode - len(down), mass)


def _increments(p: float, looks: Sequence[int]) -> list[Distribution]:
    return [binomial(m, p) for m in np.diff([0, *looks]).tolist()]


def accept_boundary(
    p: float, looks: Sequence[int], limits: Sequence[float]
) -> tuple[Counts, float]:
    """Smallest acceptance counts whose error, added up from the first look on, fits the limits.

    Args:
        p: success probability under the hypothesis.
        looks: int, increasing, K numbers of samples.
        limits: K, the error that may be spent up to each look.

    Returns:
        int64 ``[K]`` counts (a count above the look means never); the total error, rounded up.
    """
    alive, spent, counts = START, 0.0, np.asarray(looks, dtype=np.int64) + 1
    for k, increment in enumerate(_increments(p, looks)):
        alive = alive.plus(increment)
        tails = np.cumsum(alive.mass[::-1])[::-1]
        if at_most(spent) > limits[k]:
            continue
        first = int(np.count_nonzero(at_most(spent + tails) > limits[k]))
        counts[k] = alive.low + first
        if first < len(tails):
            spent += float(tails[first])
            alive = alive.cut(0, int(counts[k]) - 1)
    return counts, at_most(spent)


def futility_boundary(p: float, looks: Sequence[int], limits: Sequence[float]) -> Counts:
    """Largest counts that may be given up with the probabilities `limits`, added up over the looks.

    Args:
        p: success probability at which the loss is counted.
        looks: int, increasing, K numbers of samples.
        limits: K, the probability of giving up that is allowed up to each look.

    Returns:
        int64 ``[K]``; -1 means never.
    """
    alive, spent, counts = START, 0.0, np.full(len(looks), -1, dtype=np.int64)
    for k, increment in enumerate(_increments(p, looks)):
        alive = alive.plus(increment)
        heads = np.cumsum(alive.mass)
        given_up = int(np.count_nonzero(at_most(spent + heads) <= limits[k]))
        counts[k] = alive.low + given_up - 1
        if given_up:
            spent += float(heads[given_up - 1])
            alive = alive.cut(int(counts[k]) + 1, looks[k])
    return counts


def crossing_probability(p: float, looks: Sequence[int], accept: Counts) -> float:
    """Probability, rounded up, that S reaches ``accept[k]`` at any look k."""
    alive, crossed = START, 0.0
    for increment, count in zip(_increments(p, looks), accept.tolist(), strict=True):
        alive = alive.plus(increment)
        crossed += float(alive.cut(count, alive.low + len(alive.mass)).mass.sum())
        alive = alive.cut(0, count - 1)
    return at_most(crossed)


def futility_loss(looks: Sequence[int], futile: Counts, count: int) -> float:
    """Probability of being given up before the last look, for paths that end at `count` successes.

    Given its end, all orders of a path are equally likely, whatever the success probability.
    """
    n = looks[-1]
    p = count / n  # any would do; this one keeps the end likely
    alive = START
    for k, increment in enumerate(_increments(p, looks)):
        alive = alive.plus(increment)
        if k < len(looks) - 1:
            alive = alive.cut(int(futile[k]) + 1, looks[k])
    kept = float(alive.cut(count, count).mass.sum())
    return max(0.0, 1 - kept / float(binomial(n, p).cut(count, count).mass.sum()))


class Outcome(NamedTuple):
    """What a plan does at one success probability.

    Attributes:
        samples: expected number of samples.
        reached: ``[R + 1]``, probability that exactly 0, 1, ... R radii are certified.
    """

    samples: float
    reached: Mass


def outcome(p: float, looks: Sequence[int], accept: Counts, futile: Counts) -> Outcome:
    """Expected samples and answers of a nested plan (`accept` grows with the row) at p."""
    rows = len(accept)
    levels = [START] + [_NOTHING] * rows  # by rows passed so far
    samples, reached, before = 0.0, np.zeros(rows + 1), 0
    for k, (look, increment) in enumerate(zip(looks, _increments(p, looks), strict=True)):
        alive = sum(float(level.mass.sum()) for level in levels)
        if alive < _UNSEEN:
            break
        samples += (look - before) * alive
        before = look
        grown = [level.plus(increment) for level in levels]
        edges = [0, *accept[:, k].tolist(), look + 1]
        for level in range(rows + 1):
            # Those at or above the count of this row and below that of the next; and those that
            # passed this row before and are below the next count now.
            parts = [part.cut(edges[level], edges[level + 1] - 1) for part in grown[:level]]
            arrived = _together([*parts, grown[level].cut(0, edges[level + 1] - 1)])
            last = level == rows or k == len(looks) - 1
            kept = arrived.cut(look + 1 if last else int(futile[level, k]) + 1, look)
            reached[level] += arrived.mass.sum() - kept.mass.sum()
            levels[level] = kept.trimmed()
    return Outcome(samples, reached)


def _together(parts: Sequence[Distribution]) -> Distribution:
    """Sum of the weights, count by count."""
    parts = [part for part in parts if len(part.mass)]
    if not parts:
        return _NOTHING
    low = min(part.low for part in parts)
    mass = np.zeros(max(part.low + len(part.mass) for part in parts) - low)
    for part in parts:
        mass[part.low - low : part.low - low + len(part.mass)] += part.mass
    return Distribution(low, mass)
