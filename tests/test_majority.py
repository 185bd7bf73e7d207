# SPDX-License-Identifier: Apache-2.0
"""E-processes and the sequential vote: values to 30 digits, fairness, and how often it errs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from drawn_votes import drawn_votes
from scipy.stats import binom

from nimfast.ops import Stream
from nimfast.smoothing import anytime, plans
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.majority import Majority
from nimfast.smoothing.protocols import Request


@pytest.mark.parametrize(
    ("s", "f", "p0"),
    [
        (20, 12, 0.5),
        (40, 0, 0.84),
        (51_000, 49_000, 0.5),
        (97_900, 2_100, 0.977),
        (999_500, 500, 0.9993),
    ],
)
def test_e_values_agree_with_a_mixture_integrated_to_30_digits(s: int, f: int, p0: float) -> None:
    mp = pytest.importorskip("mpmath")
    with mp.workdps(30):
        null, peak = mp.mpf(p0), mp.mpf(s + f and (s - 0.5) / (s + f - 1))
        width = mp.sqrt(peak * (1 - peak) / (s + f)) if f else mp.mpf(1) / 1000

        def log_ratio(p: object) -> object:  # likelihood ratio times the density of Beta(1/2, 1/2)
            return (s - 0.5) * mp.log(p) + (f - 0.5) * mp.log(1 - p) - scale

        scale = mp.mpf(0)
        scale = log_ratio(min(peak, 1 - width))  # type: ignore[assignment]
        nodes = [peak + width * t for t in range(-14, 15, 2)]
        nodes = [null, *(p for p in nodes if null < p < 1), mp.mpf(1)]
        integral = mp.quad(lambda p: mp.exp(log_ratio(p)) if 0 < p < 1 else mp.mpf(0), nodes)
        prior = 2 * mp.asin(mp.sqrt(1 - null))
        exact = mp.log(integral / prior) + scale - s * mp.log(null) - f * mp.log(1 - null)
        found = float(anytime.log_e_value(s, f, p0))
        assert exact - 1e-4 < found <= exact if f == 0 else exact - 2e-6 < found <= exact
    assert anytime.log_e_value(10, 10, 0.5) == -math.inf


def test_e_values_grow_with_successes_and_fall_with_failures() -> None:
    for p0 in (0.5, 0.8, 0.999):
        s = np.arange(1, 400)
        values = anytime.log_e_value(s, 20, p0)
        assert (np.diff(values[np.isfinite(values)]) > 0).all()
        values = anytime.log_e_value(400, np.arange(200), p0)
        assert (np.diff(values[np.isfinite(values)]) < 0).all()


def test_an_e_value_is_a_fair_bet() -> None:
    # Under the hypothesis its mean stays 1 (p = p0) or below: here exactly, over all outcomes.
    n = 200
    s = np.arange(n + 1)
    for p0, p in ((0.5, 0.5), (0.5, 0.4), (0.9, 0.9)):
        # Below p0 the value is reported as 0: the mean may only lose.
        mean = (binom.pmf(s, n, p) * np.exp(anytime.log_e_value(s, n - s, p0))).sum()
        assert (0.9 if p == p0 else 0) < mean <= 1


def test_anytime_counts_do_not_depend_on_n() -> None:
    short, long = (
        plans.anytime_plan(1.0, (0.0, 0.5, 1.0), n=n, alpha=0.001) for n in (1000, 10_000)
    )
    shared = [k for k, look in enumerate(short.looks) if look in long.looks and look < 1000]
    for k in shared:
        other = long.looks.index(short.looks[k])
        assert (short.accept[:, k] == long.accept[:, other]).all()
    assert max(long.error) <= 0.001 and max(short.error) < max(long.error)


# --- the vote -------------------------------------------------------------------------------------


def _vote(shares: Sequence[float], seed: int, **options: object) -> Majority:
    found = Majority(len(shares), **options)  # type: ignore[arg-type]
    counts = drawn_votes(np.random.default_rng(seed), shares)
    while (request := found.wants()) is not None:
        found.tell(counts(request))
    return found


def test_the_vote_finds_the_winner() -> None:
    assert _vote((0.6, 0.3, 0.1), 0, label=0).verdict == "right"
    assert _vote((0.6, 0.3, 0.1), 0, label=1).verdict == "wrong"
    assert _vote((0.4, 0.3, 0.2), 0, label=0, n=5000).verdict == "right"  # no class has half
    assert _vote((0.4, 0.4, 0.2), 0, label=0).verdict == "undecided"
    assert _vote((0.2, 0.7, 0.1), 0).predict == 1
    assert _vote((0.4, 0.4, 0.2), 0).predict == ABSTAIN
    assert _vote((0.95, 0.05), 0, label=0).samples == 32


@pytest.mark.parametrize(
    ("shares", "options", "wrong"),
    [
        ((0.4, 0.4, 0.2), dict(label=0), "right"),  # a tie is no win
        ((0.4, 0.4, 0.2), dict(label=0), "wrong"),  # nor a loss
        ((0.25, 0.25, 0.25, 0.25), dict(label=0), "wrong"),
        ((0.34, 0.33, 0.33), dict(), "1 or 2"),
    ],
)
def test_the_vote_seldom_errs(
    shares: tuple[float, ...], options: dict[str, int], wrong: str
) -> None:
    alpha, tries = 0.1, 250
    found = [_vote(shares, seed, alpha=alpha, n=2000, **options) for seed in range(tries)]
    errors = sum(
        vote.verdict == wrong if options else vote.predict not in (0, ABSTAIN) for vote in found
    )
    assert errors <= tries * alpha


def test_the_vote_takes_more_samples_than_it_asked_for_and_no_others() -> None:
    found = Majority(2, label=0, n=1000)
    assert found.wants() == Request(Stream.EVALUATION, 32)
    found.tell([30, 20, 0])
    assert found.wants() == Request(Stream.EVALUATION, 64)
    for bad in ([29, 40, 0], [30, 20, 0], [64, 0], [40, 40, 0, 0]):
        with pytest.raises(ValueError, match="counts must be"):
            found.tell(bad)
    found.tell([500, 20, 0])
    assert found.wants() is None and found.verdict == "right" and found.samples == 520
    with pytest.raises(ValueError, match="nothing was asked"):
        found.tell([600, 20, 0])
    with pytest.raises(ValueError, match="label"):
        _ = Majority(2).verdict
    for bad_options in (dict(label=2), dict(n=0), dict(alpha=0.5)):
        with pytest.raises(ValueError, match="must"):
            Majority(2, **bad_options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes"):
        Majority(1)
