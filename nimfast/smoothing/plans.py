# SPDX-License-Identifier: Apache-2.0
"""Plans of the exact group-sequential test: CERTIFY's alpha and counts, far fewer samples.

For target radii r_0 < r_1 < ... row j of a plan tests "the class has probability at most p_j",
p_j = Phi(r_j / sigma). It looks at the number of successes after 32, 64, ... and at last n samples,
stops as soon as enough of them have been seen, and gives up where too few have. Rows are nested:
who reaches row j's count has reached those of all rows before it. docs/sequential_test.md proves
what a plan promises:

    whatever the probabilities, the probability of certifying a radius that is too large is at most
    alpha, for all radii together, and it holds for the smoothed classifier at this one image.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from scipy.special import ndtr

from nimfast.smoothing import anytime, bounds, plan_store
from nimfast.smoothing.construction import CONTESTED, FUTILITY, build, errors, nested
from nimfast.smoothing.recursion import MOST_SAMPLES, Counts, Outcome, futility_loss, outcome

# Every p_j is a multiple of 2^-40, rounded up, plus this: it covers the slack of grid noise (for
# ImageNet 2.5e-11) and is too little to move an acceptance count.
_SLACK = 2.0**-32
_QUANTUM = 2.0**-40


@dataclass(frozen=True, eq=False)
class Plan:
    """What a sequential test decides by; online there are integer comparisons only.

    At look k the test has seen the first ``looks[k]`` samples; S of them were votes for the class.
    ``str(plan)`` shows boundaries, error, expected samples and power.

    Attributes:
        sigma: standard deviation of the noise.
        radii: R target radii, increasing; the first may be 0.
        n: the most samples.
        alpha: bound on the probability of certifying a radius that is too large.
        looks: ``n_1 < ... < n_K = n``.
        accept: int64 ``[R, K]``: ``S >= accept[j, k]`` certifies ``radii[j]`` (n_k + 1: never).
        futile: int64 ``[R, K]``: ``S <= futile[j, k]`` gives ``radii[j]`` up (-1: never).
        error: for each radius, the largest probability with which it or a larger one is certified
            though it is the smallest that is false; computed to 9 digits and rounded up.
        labelled: whether the class is known beforehand; else the leading class is tested.
        slack: total variation between the noise drawn and the noise law that is allowed for.
    """

    sigma: float
    radii: tuple[float, ...]
    n: int
    alpha: float
    looks: tuple[int, ...]
    accept: Counts
    futile: Counts
    error: tuple[float, ...]
    labelled: bool
    slack: float

    @property
    def probabilities(self) -> tuple[float, ...]:
        """p_j: certifying ``radii[j]`` is right where the class has more than this, as drawn."""
        return _probabilities(self.sigma, self.radii, self.slack)

    @functools.cached_property
    def loss(self) -> tuple[float, ...]:
        """For each radius, the most that giving up can cost.

        Of all images whose n samples would reach the last acceptance count, whatever their
        probability, at most this share is given up before.
        """
        return tuple(
            futility_loss(self.looks, futile, int(accept[-1]))
            for accept, futile in zip(self.accept, self.futile, strict=True)
        )

    def outcome(self, p: float) -> Outcome:
        """Expected samples, and the probability of each answer, for a class of probability p."""
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], not {p}")
        return outcome(p, self.looks, self.accept, self.futile)

    def __rich__(self) -> Group:
        from nimfast.smoothing.plan_view import view  # it needs this module

        return view(self)

    def __str__(self) -> str:
        console = Console(width=80, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def plan(
    sigma: float,
    radii: Sequence[float],
    *,
    n: int = 10_000,
    alpha: float = 0.001,
    growth: float | None = None,
    labelled: bool = True,
    slack: float = 0.0,
) -> Plan:
    """The exact group-sequential test for a grid of radii.

    Plans for the radii 0, 0.25, 0.5, ... at sigma 0.25, 0.5 and 1, alpha 0.001 and n = 10,000 or
    100,000 come with the package; others are made in about a second and kept in the user's cache
    folder. A plan read from a file is used only after its error has been computed again.

    Args:
        sigma: standard deviation of the noise.
        radii: increasing target radii, in the unit of sigma; the first may be 0.
        n: the most samples.
        alpha: error probability of the whole grid, in (0, 0.5).
        growth: ratio of a look to the one before; default 1.15, above n = 10,000 it is 1.3.
        labelled: whether the class to test is known before any sample is seen.
        slack: total variation between the noise drawn and the noise law, `nimfast.ops.grid_slack`.

    Raises:
        ValueError: an argument out of range, radii that do not increase, n too small for alpha, a
            radius beyond what n samples can certify.
    """
    grid = check_radii(sigma, radii, n=n, alpha=alpha, labelled=labelled, slack=slack)
    looks = look_schedule(n, growth)
    return _plan(float(sigma), grid, n, float(alpha), looks, labelled, _allowance(slack))


def anytime_plan(
    sigma: float,
    radii: Sequence[float],
    *,
    n: int,
    alpha: float = 0.001,
    labelled: bool = True,
    slack: float = 0.0,
) -> Plan:
    """The same for e-processes (`nimfast.smoothing.anytime`), whose counts do not depend on n.

    A run that ends at n may be continued to any larger n; `error` is what was spent up to n.
    Giving up is an e-process as well: against "the probability is at least p_j", at 1%.

    Args: as for `plan`.

    Raises:
        ValueError: as for `plan`.
    """
    grid = check_radii(sigma, radii, n=n, alpha=alpha, labelled=labelled, slack=slack)
    return _anytime_plan(float(sigma), grid, n, float(alpha), labelled, _allowance(slack))


def check_radii(
    sigma: float,
    radii: Sequence[float],
    *,
    n: int,
    alpha: float,
    labelled: bool = True,
    slack: float = 0.0,
) -> tuple[float, ...]:
    """The radii as a tuple, after checking that a plan for them can exist.

    Raises:
        ValueError: see `plan`.
    """
    bounds.check_trials(n, alpha)
    if n > MOST_SAMPLES:
        raise ValueError(f"n must be at most {MOST_SAMPLES:,}, not {n:,}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if not 0 <= slack < 0.01:
        raise ValueError(f"slack must lie in [0, 0.01), not {slack}")
    grid = tuple(float(radius) for radius in radii)
    if not grid or not grid[0] >= 0 or not all(a < b for a, b in itertools.pairwise(grid)):
        raise ValueError(f"radii must be increasing and not negative, not {list(grid)}")
    # Without a label, a class of about one half has half of alpha.
    contested = alpha if labelled else alpha / 2
    least = bounds.least_samples(contested)
    if n < least:
        raise ValueError(
            f"n = {n} is too small for alpha = {alpha:g}: nothing could ever be certified; use at "
            f"least {least}"
        )
    allowance = _allowance(slack)
    for radius, p in zip(grid, _probabilities(sigma, grid, allowance), strict=True):
        share = contested if p < CONTESTED else alpha
        # Even n successes out of n must be improbable enough.
        if p >= 1 or n * math.log(p) > math.log(share):
            most = bounds.less_slack(bounds.lower_bound(n, n, share), allowance + 2 * _QUANTUM)
            raise _no_plan(radius, sigma, n, alpha, bounds.radius(most, sigma))
    return grid


def _no_plan(radius: float, sigma: float, n: int, alpha: float, largest: float) -> ValueError:
    most = math.floor(largest * 1e4) / 1e4
    return ValueError(
        f"radius {radius:g} has no plan: {n:,} samples at sigma = {sigma:g} and alpha = {alpha:g} "
        f"can certify radii up to {most}; leave it out or raise n"
    )


def look_schedule(n: int, growth: float | None = None) -> tuple[int, ...]:
    """Sample counts at which a sequential test looks: multiples of 32 that grow, then n.

    Args:
        n: the most samples.
        growth: ratio of a look to the one before; default 1.15, above n = 10,000 it is 1.3.

    Raises:
        ValueError: `growth` is not above 1.
    """
    if growth is None:
        growth = 1.15 if n <= 10_000 else 1.3
    if not 1 < growth < math.inf:
        raise ValueError(f"growth must be greater than 1, not {growth}")
    looks, exact = {n}, 32.0
    while exact < n:
        looks.add(min(n, math.ceil(exact / 32) * 32))
        exact *= growth
    return tuple(sorted(looks))


def _allowance(slack: float) -> float:
    """The slack that a plan is made for: `slack` rounded up to a power of two, or the usual one."""
    mantissa, exponent = math.frexp(slack)  # slack = mantissa 2^exponent, mantissa in [1/2, 1)
    return max(_SLACK, slack if mantissa == 0.5 else 2.0**exponent) if slack > 0 else _SLACK


@functools.lru_cache(maxsize=64)
def _probabilities(sigma: float, radii: tuple[float, ...], slack: float) -> tuple[float, ...]:
    """Phi(r / sigma) rounded up to a multiple of 2^-40 (the same on every machine), plus slack."""

    def rounded_up(ratio: float) -> float:
        # ndtr errs by less than one quantum; Phi(0) = 1/2 has no error.
        return (math.ceil(float(ndtr(ratio)) / _QUANTUM) + (ratio > 0)) * _QUANTUM

    return tuple(rounded_up(radius / sigma) + slack for radius in radii)


@functools.lru_cache(maxsize=64)
def _plan(
    sigma: float,
    radii: tuple[float, ...],
    n: int,
    alpha: float,
    looks: tuple[int, ...],
    labelled: bool,
    slack: float,
) -> Plan:
    p = _probabilities(sigma, radii, slack)
    key = plan_store.Key(p, looks, alpha, labelled)
    tables = plan_store.load(key)
    error = errors(p, looks, tables[0], alpha, labelled) if tables else ()
    if tables is None or max(error) > alpha:
        tables = build(p, looks, alpha, labelled)
        error = errors(p, looks, tables[0], alpha, labelled)
        if max(error) > alpha:  # cannot be: the rows were made to fit
            raise AssertionError(f"the plan for {key} has error {max(error)}")
        plan_store.save(key, *tables)
    return _finish(sigma, radii, n, alpha, looks, tables, error, labelled, slack)


@functools.lru_cache(maxsize=64)
def _anytime_plan(
    sigma: float, radii: tuple[float, ...], n: int, alpha: float, labelled: bool, slack: float
) -> Plan:
    p, looks = _probabilities(sigma, radii, slack), look_schedule(n)
    share = alpha if labelled else alpha / 2  # for the most likely class and for all others
    accept = [anytime.acceptance_counts(looks, q, share) for q in p]
    for radius, row in zip(radii, accept, strict=True):
        if row[-1] > n:
            most = anytime.largest_hypothesis(n, share) - slack - 2 * _QUANTUM
            raise _no_plan(radius, sigma, n, alpha, bounds.radius(max(0.0, most), sigma))
    futile = [looks - anytime.acceptance_counts(looks, 1 - q, FUTILITY) for q in p]
    tables = nested(accept, futile)
    error = errors(p, looks, tables[0], alpha, labelled)
    return _finish(sigma, radii, n, alpha, looks, tables, error, labelled, slack)


def _finish(
    sigma: float,
    radii: tuple[float, ...],
    n: int,
    alpha: float,
    looks: tuple[int, ...],
    tables: tuple[Counts, Counts],
    error: tuple[float, ...],
    labelled: bool,
    slack: float,
) -> Plan:
    for table in tables:
        table.setflags(write=False)  # plans are shared
    return Plan(sigma, radii, n, alpha, looks, *tables, error, labelled, slack)
