# SPDX-License-Identifier: Apache-2.0
"""Bounds, radii and tests against reference numbers, exact arithmetic and each other."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, norm

from nimfast.smoothing import bounds

REFERENCE = json.loads((Path(__file__).parent / "reference" / "certify.json").read_text())


def test_reference_bounds_radii_and_abstentions() -> None:
    for case in REFERENCE["cases"]:
        bound = bounds.lower_bound(case["nA"], case["n"], case["alpha"])
        assert bound == pytest.approx(case["pA_lower"], abs=1e-9)
        assert (bound < 0.5) == case["abstain"], case
        assert bounds.radius(bound, case["sigma"]) == pytest.approx(case["radius"], abs=1e-9)


def test_reference_predictions() -> None:
    for case in REFERENCE["predict"]:
        p_value = bounds.two_sided_p_value(case["top"], case["second"])
        assert p_value == pytest.approx(case["p_value"], abs=1e-9)
        assert (p_value > case["alpha"]) == case["abstain"], case


def _upper_tail(count: int, n: int, p: float) -> Fraction:
    exact, terms = Fraction(p), range(count, n + 1)
    return sum((math.comb(n, k) * exact**k * (1 - exact) ** (n - k) for k in terms), Fraction(0))


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.3])
@pytest.mark.parametrize(
    ("count", "n"), [(1, 1), (1, 40), (23, 40), (39, 40), (40, 40), (170, 200)]
)
def test_bound_holds_in_exact_arithmetic_and_is_tight(count: int, n: int, alpha: float) -> None:
    bound = bounds.lower_bound(count, n, alpha)
    assert _upper_tail(count, n, bound) <= Fraction(alpha)
    assert _upper_tail(count, n, bound * (1 + 1e-8)) > Fraction(alpha)


def test_bound_holds_for_large_n() -> None:
    # binom.logsf sums in another way than betainc, which the bound is made with.
    n, alpha = 100_000, 0.001
    for count in (1, 317, 50_000, 50_500, 77_777, 99_990, 100_000):
        tail = float(binom.sf(count - 1, n, bounds.lower_bound(count, n, alpha)))
        assert alpha * (1 - 1e-8) < tail <= alpha


def test_radius_is_never_rounded_up() -> None:
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 40
    for bound in (0.5 + 2**-53, 0.500001, 0.6, 0.9, 0.999, 1 - 7e-5, 1 - 2**-53):
        for sigma in (0.12, 0.25, 1.0, 3.0):
            exact = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(bound) - 1) * mpmath.mpf(sigma)
            result = bounds.radius(bound, sigma)
            assert result <= exact
            assert float(exact) - result < 1e-12


def test_largest_radius_of_the_usual_settings() -> None:
    assert bounds.max_radius(10_000, 0.001, 1.0) == pytest.approx(3.199, abs=5e-4)
    assert bounds.max_radius(100_000, 0.001, 1.0) == pytest.approx(3.811, abs=5e-4)
    assert bounds.max_radius(10_000, 0.001, 0.25) == pytest.approx(norm.ppf(0.001 ** (1e-4)) / 4)


@pytest.mark.parametrize("alpha", [0.4999, 0.3, 0.05, 0.001, 1e-6, 2.0**-10])
def test_least_samples(alpha: float) -> None:
    n = bounds.least_samples(alpha)
    assert bounds.lower_bound(n, n, alpha) >= 0.5
    assert n == 1 or bounds.lower_bound(n - 1, n - 1, alpha) < 0.5


def test_bound_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth, n, alpha, repeats = 0.8, 200, 0.05, 4000
    counts = rng.binomial(n, truth, size=repeats)
    misses = sum(bounds.lower_bound(int(count), n, alpha) > truth for count in counts)
    # At most alpha; the exact level of this discrete test is just below it.
    assert 0 < misses <= repeats * alpha + 3 * math.sqrt(repeats * alpha)


@pytest.mark.parametrize(
    "bad", [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1), (5, 10, 0.0), (5, 10, 0.5)]
)
def test_arguments_out_of_range(bad: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        bounds.lower_bound(*bad)


def test_more_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="bound"):
        bounds.radius(1.0, 0.5)
    with pytest.raises(ValueError, match="votes"):
        bounds.two_sided_p_value(3, 4)
