# SPDX-License-Identifier: Apache-2.0
"""The error of plans, by other algorithms than the package's.

The package carries distributions from look to look by convolutions of binomials. Here the error is
computed again one sample at a time: with whole numbers of paths (exact), in 256-bit integers
rounded up (a proof for n = 10,000), in float64 with all that is dropped counted as error; or drawn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import plan_files
import pytest
from scipy.stats import beta, binom

from nimfast.smoothing import plan, recursion
from nimfast.smoothing.plans import Plan

ALPHA = plan_files.ALPHA


@functools.cache
def _stopping_paths(looks: tuple[int, ...], accept: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(look, successes, number of paths) where a path passes; whole numbers, whatever p is."""
    paths, low, before, found = [1], 0, 0, []
    for look, count in zip(looks, accept, strict=True):
        for _ in range(look - before):
            paths = [a + b for a, b in zip([*paths, 0], [0, *paths], strict=True)]
        before, kept = look, max(0, count - low)
        found += [(look, low + kept + i, number) for i, number in enumerate(paths[kept:])]
        paths = paths[:kept] or [0]
    return found


def _exact(p: float, looks: Sequence[int], accept: Sequence[int]) -> Fraction:
    """Error as a fraction, for a p that is a multiple of 2^-40."""
    hit, n = int(p * 2**40), looks[-1]
    assert hit == Fraction(p) * 2**40
    total = sum(
        number * hit**s * (2**40 - hit) ** (look - s) << 40 * (n - look)
        for look, s, number in _stopping_paths(tuple(looks), tuple(accept))
    )
    return Fraction(total, 1 << 40 * n)


def _rounded_up(p: float, looks: Sequence[int], accept: Sequence[int]) -> Fraction:
    """Upper bound of the error in 256-bit fixed point: what is cut off is rounded up."""
    one, bits = 1 << 256, 40
    hit = int(Fraction(p) * (1 << bits))  # p is a multiple of 2^-40
    miss, tiny = (1 << bits) - hit, one >> 120
    alive, low, crossed, before = [one], 0, 0, 0
    for look, count in zip(looks, accept, strict=True):
        for _ in range(look - before):
            alive = [
                ((a * miss + b * hit) >> bits) + 1
                for a, b in zip([*alive, 0], [0, *alive], strict=True)
            ]
            while alive[0] < tiny:
                crossed, low = crossed + alive.pop(0), low + 1
            while alive[-1] < tiny:
                crossed += alive.pop()
        before, kept = look, max(0, count - low)
        crossed += sum(alive[kept:])
        alive = alive[:kept] or [0]
        if alive == [0]:
            break
    assert hit == Fraction(p) * (1 << bits)
    return Fraction(crossed, one)


@functools.cache
def _stepwise(p: float, looks: tuple[int, ...], accept: tuple[int, ...]) -> float:
    """Error in float64, one sample at a time: 3 roundings each, so good to n * 4e-16."""
    alive, low, crossed, before = np.ones(1), 0, 0.0, 0
    for look, count in zip(looks, accept, strict=True):
        for step in range(look - before):
            grown = np.zeros(len(alive) + 1)
            grown[:-1] = alive * (1 - p)
            grown[1:] += alive * p
            alive = grown
            if step % 16 == 15:
                kept = np.nonzero(alive > 1e-30)[0]
                crossed += alive[: kept[0]].sum() + alive[kept[-1] + 1 :].sum()
                low, alive = low + kept[0], alive[kept[0] : kept[-1] + 1]
        before, kept_counts = look, max(0, count - low)
        crossed += alive[kept_counts:].sum()
        alive = alive[:kept_counts]
        if not len(alive):
            break
    return crossed


@pytest.mark.parametrize("name", plan_files.SMALL)
def test_error_of_small_plans_in_exact_arithmetic(name: str) -> None:
    found = plan_files.SMALL[name]()
    rows = list(zip(found.probabilities, found.accept.tolist(), found.error, strict=True))
    first = found.accept[0].tolist()
    for j, (p, accept, error) in enumerate(rows):
        exact = _exact(p, found.looks, accept)
        if found.labelled:
            assert exact <= Fraction(error) <= Fraction(found.alpha)
            assert error == pytest.approx(float(exact), rel=1e-8)
            continue
        lowest = found.probabilities[j - 1] if j else 0.5
        for share in (0, 0.3, 0.7, 1):
            q = math.floor((lowest + share * (p - lowest)) * 2**40) / 2**40
            total = _exact(q, found.looks, accept) + _exact(1 - q, found.looks, first)
            assert total <= Fraction(error) <= Fraction(found.alpha)


def _unique_rows(n: int) -> list[tuple[float, tuple[int, ...], tuple[int, ...]]]:
    """(p, looks, accept) of the shipped plans for a known class, each once."""
    rows = {}
    for sigma, size, labelled in plan_files.SETTINGS:
        if size == n and labelled:
            found = plan_files.shipped(sigma, n, labelled)
            for p, accept in zip(found.probabilities, found.accept.tolist(), strict=True):
                rows[p, found.looks, tuple(accept)] = None
    return list(rows)


def _check_stepwise(n: int) -> None:
    rows = _unique_rows(n)
    assert len(rows) == len(plan_files.radii(1.0, n))  # the coarser grids' rows are among them
    for p, looks, accept in rows:
        error = _stepwise(p, looks, accept)
        assert error * (1 + n * 4e-16) <= ALPHA
        computed = recursion.crossing_probability(p, looks, np.array(accept))
        assert error * (1 - n * 4e-16) <= computed <= error * (1 + 2e-9) + 1e-20


def _check_leading(n: int) -> None:
    for sigma in (0.25, 0.5, 1.0):
        found = plan_files.shipped(sigma, n, False)
        first, *others = map(tuple, found.accept.tolist())
        # docs/sequential_test.md, lemma 3, needs more than half of the votes at every look.
        assert all(2 * count > look for look, count in zip(found.looks, first, strict=True))
        assert 2 * _stepwise(0.5, found.looks, first) <= ALPHA
        lowest, highest = found.probabilities[:2]
        for share in (0.0, 0.9, 1.0):
            p = lowest + share * (highest - lowest)
            chance = _stepwise(p, found.looks, others[0]) + _stepwise(1 - p, found.looks, first)
            assert chance <= found.error[1] <= ALPHA
        assert max(found.error) <= ALPHA


def test_error_of_shipped_plans_one_sample_at_a_time() -> None:
    _check_stepwise(10_000)


def test_error_of_shipped_plans_for_the_leading_class() -> None:
    _check_leading(10_000)


@pytest.mark.slow
def test_error_of_shipped_plans_for_large_n() -> None:
    _check_stepwise(100_000)


@pytest.mark.slow
def test_error_of_shipped_plans_in_integers_rounded_up() -> None:
    for p, looks, accept in _unique_rows(10_000):
        proven = _rounded_up(p, looks, accept)
        assert proven <= Fraction(ALPHA)
        assert recursion.crossing_probability(p, looks, np.array(accept)) >= proven * (1 - 1e-20)


def _draw(found: Plan, p: float, images: int, seed: int) -> np.ndarray:
    """Rows certified, without ever giving up: int ``[images]``."""
    rng = np.random.default_rng(seed)
    successes = np.zeros(images, dtype=np.int64)
    certified, before = np.zeros(images, dtype=np.int64), 0
    for k, look in enumerate(found.looks):
        successes += rng.binomial(look - before, p, images)
        before = look
        reached = np.searchsorted(found.accept[:, k], successes, side="right")
        np.maximum(certified, reached, out=certified)
    return certified


def _check_drawn(found: Plan, rows: Sequence[int], images: int) -> None:
    """At each boundary as often wrong as computed; over all of them at most alpha; below, less."""
    wrong = {j: int((_draw(found, found.probabilities[j], images, j) > j).sum()) for j in rows}
    for j, count in wrong.items():
        assert abs(count - images * found.error[j]) < 4.5 * math.sqrt(images * found.error[j])
        below = 2 * found.probabilities[j] - (1 + found.probabilities[j]) / 2
        assert (_draw(found, below, images // 10, j) > j).sum() == 0
    total = len(rows) * images
    upper = 1 - beta.ppf(0.05, total - sum(wrong.values()), sum(wrong.values()) + 1)
    assert upper < found.alpha * 1.1


def test_drawn_error_at_and_below_a_boundary() -> None:
    _check_drawn(plan(1.0, (0, 1.0), n=2000, alpha=0.01), [0, 1], 100_000)


def _drawn_errors(found: Plan, j: int, q: float, images: int, seed: int) -> int:
    """How many of `images`, with a class of probability q, certify radius j, which is false.

    The images are drawn together: how many of those with s successes have t at the next look is
    multinomial, so only the numbers of images in each state are kept. Of a plan for the leading
    class a second class has all the other votes, and certifying anything for it is false, too.
    """
    rng = np.random.default_rng([seed, j])
    state, number, wrong, before = np.zeros(1, dtype=np.int64), np.array([images]), 0, 0
    for k, look in enumerate(found.looks):
        more = np.arange(look - before + 1)
        chance = binom.pmf(more, look - before, q)
        more, chance = more[chance > 1e-16], chance[chance > 1e-16]  # 1e-13 in all
        split = rng.multinomial(number, chance / chance.sum())  # [states, increments]
        reached = np.bincount((state[:, None] + more).ravel(), split.ravel()).astype(np.int64)
        state = np.flatnonzero(reached)
        number, before = reached[state], look
        false = state >= found.accept[j, k]
        if not found.labelled:
            false |= look - state >= found.accept[0, k]
        wrong += int(number[false].sum())
        state, number = state[~false], number[~false]
        if not len(state):
            break
    assert wrong + number.sum() == images
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("n", [10_000, 100_000])
def test_drawn_error_at_and_below_every_boundary(n: int, labelled: bool) -> None:
    # Ten million images at each: of one million 7% would miss the second limit by chance alone.
    images, rows = 10_000_000, set()
    for sigma in (1.0, 0.5, 0.25):  # the coarser grids have few rows of their own, or none
        found = plan_files.shipped(sigma, n, labelled)
        for j, (p, error) in enumerate(zip(found.probabilities, found.error, strict=True)):
            first = () if labelled else tuple(found.accept[0])
            if (row := (p, tuple(found.accept[j]), first)) in rows:
                continue
            rows.add(row)
            wrong = _drawn_errors(found, j, p, images, n)
            assert beta.ppf(0.95, wrong + 1, images - wrong) < 1.1 * found.alpha
            expected = images * error
            assert wrong < expected + 4.5 * math.sqrt(expected)
            if labelled:  # `error` is that of this q; else it is the largest in an interval
                assert wrong > expected - 4.5 * math.sqrt(expected)
            # Half a standard error of n votes below: still false, and rarer.
            below = p - 0.5 * math.sqrt(p * (1 - p) / n)
            if labelled or below > 0.5:  # else the second class is the first
                rarer = _drawn_errors(found, j, below, images, n + 1)
                assert beta.ppf(0.95, rarer + 1, images - rarer) < found.alpha
    assert len(rows) >= len(plan_files.radii(1.0, n))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.25, 0.25), (1 / 3, 1 / 3, 1 / 3)])
def test_drawn_error_of_the_leading_class_where_no_class_has_a_majority(
    shares: tuple[float, ...],
) -> None:
    found, images = plan(1.0, (0, 0.1, 0.5), n=500, alpha=0.05, labelled=False), 200_000
    rng = np.random.default_rng(1)
    votes = np.zeros((images, len(shares)), dtype=np.int64)
    wrong, before = np.zeros(images, dtype=bool), 0
    for k, look in enumerate(found.looks):
        votes += rng.multinomial(look - before, shares, images)
        before = look
        wrong |= votes.max(axis=1) >= found.accept[0, k]
    assert wrong.mean() < 0.05
    if shares == (0.5, 0.5):
        assert wrong.mean() > 0.04  # both classes can be taken for one of more than 1/2


def test_extreme_settings_keep_their_error() -> None:
    for n, alpha, radii in ((10, 0.001, (0.0,)), (2000, 1e-9, (0, 1.0)), (333, 0.49, (0, 2.0))):
        found = plan(1.0, radii, n=n, alpha=alpha)
        for p, accept in zip(found.probabilities, found.accept.tolist(), strict=True):
            assert _stepwise(p, found.looks, tuple(accept)) <= alpha
