# SPDX-License-Identifier: Apache-2.0
"""Judges driven by drawn votes: what they ask for, what they decide, how often they are wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.special import betaincinv
from scipy.stats import beta, binom, norm

from nimfast.ops import Stream
from nimfast.smoothing import anytime, bounds, plan, plans
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.majority import Majority
from nimfast.smoothing.plans import Plan
from nimfast.smoothing.protocols import Decision, Judge, Request, judge
from nimfast.smoothing.records import read

RADII = (0.0, 0.5, 1.0)
SETTINGS = dict(
    sigma=1.0, label=0, num_classes=3, n0=100, n=1000, alpha=0.001, radii=RADII, slack=0.0
)


def _judge(protocol: str, **changes: object) -> Judge:
    return judge(protocol, **{**SETTINGS, **changes})  # type: ignore[arg-type]


def _votes(rng: np.random.Generator, shares: Sequence[float]) -> Callable[[Request], list[int]]:
    """Prefix counts of streams of votes with these shares; the rest are votes for no class."""
    chances = [*shares, max(0.0, 1 - sum(shares))]
    drawn: dict[Stream, tuple[int, np.ndarray]] = {}

    def counts(request: Request) -> list[int]:
        n, before = drawn.get(request.stream, (0, np.zeros(len(chances), dtype=np.int64)))
        drawn[request.stream] = (
            request.n,
            before + rng.multinomial(request.n - n, chances),
        )
        found: list[int] = drawn[request.stream][1].tolist()
        return found

    return counts


def _run(found: Judge, counts: Callable[[Request], list[int]]) -> Decision:
    while (request := found.wants()) is not None:
        found.tell(counts(request))
    return found.decision()


# --- cohen, dmae ----------------------------------------------------------------------------------


def test_cohen_is_certify() -> None:
    found = _judge("cohen")
    assert found.wants() == Request(Stream.SELECTION, 100)
    found.tell([40, 45, 10, 5])
    assert found.wants() == Request(Stream.ESTIMATION, 1000)
    found.tell([300, 700, 0, 0])
    assert found.wants() is None
    bound = bounds.lower_bound(700, 1000, 0.001)
    assert found.decision() == Decision(1, bounds.radius(bound, 1.0), bound, 700, 1100)


def test_cohen_abstains_and_takes_the_first_of_equals() -> None:
    found = _judge("cohen")
    found.tell([10, 45, 45, 0])
    found.tell([0, 540, 460, 0])
    bound = bounds.lower_bound(540, 1000, 0.001)
    assert found.decision() == Decision(ABSTAIN, 0.0, bound, 540, 1100)


def test_dmae_stops_where_another_class_is_selected() -> None:
    found = _judge("dmae", label=1)
    found.tell([50, 40, 10, 0])
    assert found.wants() is None
    assert found.decision() == Decision(ABSTAIN, 0.0, 0.0, 0, 100)
    same = _judge("dmae", label=0)
    same.tell([50, 40, 10, 0])
    assert same.wants() == Request(Stream.ESTIMATION, 1000)


def test_slack_lowers_every_bound() -> None:
    plain, slack = (_judge("cohen", slack=amount) for amount in (0.0, 1e-6))
    for found in (plain, slack):
        found.tell([90, 5, 5, 0])
        found.tell([900, 50, 50, 0])
    assert slack.decision().p_lower <= plain.decision().p_lower - 1e-6
    assert slack.decision().radius < plain.decision().radius


def test_top2_is_wider_where_the_rest_is_spread() -> None:
    ordinary, top2 = _judge("cohen", num_classes=10), _judge("cohen", num_classes=10, top2=True)
    spread = [450, *[60] * 9, 10]
    for found in (ordinary, top2):
        found.tell([60, *[4] * 9, 4])
        found.tell(spread)
    assert ordinary.decision().predict == ABSTAIN
    assert top2.decision().predict == 0
    lower, upper = beta.ppf(0.0005, 450, 551), beta.ppf(0.9995, 61, 940)
    expected = (norm.ppf(lower) - norm.ppf(upper)) / 2
    assert expected - 1e-9 < top2.decision().radius <= expected


@pytest.mark.parametrize("shares", [(0.4, 0.35, 0.25), (0.7, 0.3, 0.0), (0.5, 0.25, 0.25)])
def test_top2_is_seldom_too_wide(shares: tuple[float, ...]) -> None:
    rng, tries, alpha = np.random.default_rng(0), 4000, 0.05
    exact = (norm.ppf(shares[0]) - norm.ppf(shares[1])) / 2
    radii = [
        bounds.top2(v[0], max(v[1:]), 300, alpha, 1.0)[1]
        for v in rng.multinomial(300, shares, tries)
    ]
    assert 0 < np.mean([radius > exact for radius in radii]) <= alpha
    swapped = [
        bounds.top2(v[1], max(v[0], v[2]), 300, alpha, 1.0)[1]
        for v in rng.multinomial(300, shares, tries)
    ]
    assert np.mean([radius > 0 for radius in swapped]) <= alpha


def test_recertify_covers_the_changed_classifier() -> None:
    # Old probability 0.9; 5% of the copies are lost, 1% gained: now 0.86.
    rng, tries, n = np.random.default_rng(0), 4000, 500
    wrong, bounds_found = 0, []
    for kept, lost, _gained, _other in rng.multinomial(n, (0.85, 0.05, 0.01, 0.09), tries).tolist():
        before = bounds.lower_bound(kept + lost, n, 0.02)
        bound, radius = bounds.recertify(before, lost, n, 0.02, 1.0)
        assert bound < before and radius == bounds.radius(bound, 1.0)
        wrong += bound > 0.86
        bounds_found.append(bound)
    assert wrong <= tries * 0.04 and np.mean(bounds_found) > 0.79
    assert bounds.recertify(0.6, 60, n, 0.02, 1.0) == (pytest.approx(0.45, abs=0.03), 0.0)
    with pytest.raises(ValueError, match="p_lower"):
        bounds.recertify(1.0, 0, n, 0.02, 1.0)


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "label"),
    [(0.3, 0), (0.5, 0), (0.65, 0), (0.97, 0), (0.65, None), (0.8, None), (0.97, None)],
)
def test_exact_does_what_its_plan_says(p: float, label: int | None) -> None:
    found = plan(1.0, RADII, n=1000, alpha=0.001, labelled=label is not None)
    expected, rng, images = found.outcome(p), np.random.default_rng(3), 400
    shares = (p, (1 - p) / 2, (1 - p) / 2)
    decisions = [_run(_judge("exact", label=label), _votes(rng, shares)) for _ in range(images)]
    samples = [decision.samples for decision in decisions]
    # Without a label the leading class is another one at times; it is as far from the radii.
    few = 4 * np.std(samples) / math.sqrt(images) + (30 if label is None else 1)
    assert np.mean(samples) == pytest.approx(expected.samples, abs=few)
    for level, radius in enumerate((None, *RADII)):
        share = np.mean([(None if d.predict == ABSTAIN else d.radius) == radius for d in decisions])
        tolerance = 4 * math.sqrt(0.25 / images) if expected.reached[level] > 1e-6 else 0.0
        assert share == pytest.approx(expected.reached[level], abs=tolerance + 0.01)
    for decision in decisions:
        assert decision.samples in found.looks
        if decision.predict != ABSTAIN:
            assert decision.predict == 0
            assert norm.cdf(decision.radius) - 1e-13 < decision.p_lower <= norm.cdf(decision.radius)
        else:
            assert (decision.radius, decision.p_lower) == (0.0, 0.0)


def test_exact_asks_for_growing_prefixes_and_counts_invalid_samples_as_misses() -> None:
    found, asked = _judge("exact"), []
    counts = _votes(np.random.default_rng(0), (0.68, 0.0, 0.0))
    while (request := found.wants()) is not None:
        asked.append(request)
        votes = counts(request)
        found.tell(votes)
    looks = plan(1.0, RADII, n=1000).looks
    assert [request.n for request in asked] == list(looks[: len(asked)])
    assert {request.stream for request in asked} == {Stream.ESTIMATION}
    assert found.decision().count == votes[0]


def test_exact_with_a_label_tests_the_label() -> None:
    decision = _run(_judge("exact", label=2), _votes(np.random.default_rng(0), (0.9, 0.05, 0.05)))
    assert decision.predict == ABSTAIN and decision.samples == 32
    free = _run(_judge("exact", label=None), _votes(np.random.default_rng(0), (0.05, 0.9, 0.05)))
    assert (free.predict, free.radius) == (1, 1.0)


def test_exact_keeps_what_it_certified_when_the_next_radius_is_given_up() -> None:
    decision = _run(_judge("exact"), _votes(np.random.default_rng(0), (0.8, 0.2, 0.0)))
    assert (decision.predict, decision.radius) == (0, 0.5)
    assert decision.samples < 1000


# --- anytime --------------------------------------------------------------------------------------


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
    short, long = (plans.anytime_plan(1.0, RADII, n=n, alpha=0.001) for n in (1000, 10_000))
    shared = [k for k, look in enumerate(short.looks) if look in long.looks and look < 1000]
    for k in shared:
        other = long.looks.index(short.looks[k])
        assert (short.accept[:, k] == long.accept[:, other]).all()
    assert max(long.error) <= 0.001 and max(short.error) < max(long.error)


def test_anytime_certifies_and_seldom_errs() -> None:
    rng = np.random.default_rng(0)
    decision = _run(_judge("anytime"), _votes(rng, (0.99, 0.01, 0.0)))
    assert (decision.predict, decision.radius) == (0, 1.0)
    at_edge = functools.partial(_judge, "anytime", alpha=0.05, radii=(0.5,), n=2000)
    wrong = [_run(at_edge(), _votes(rng, (norm.cdf(0.5), 0.1, 0.1))).predict for _ in range(1000)]
    assert sum(predict == 0 for predict in wrong) <= 50
    with pytest.raises(ValueError, match=r"radius 3 has no plan.*up to 2\.\d+"):
        _judge("anytime", radii=(0, 3.0))


# --- the vote -------------------------------------------------------------------------------------


def _vote(shares: Sequence[float], seed: int, **options: object) -> Majority:
    found = Majority(len(shares), **options)  # type: ignore[arg-type]
    counts = _votes(np.random.default_rng(seed), shares)
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


# --- what a judge is told -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["exact", "cohen", "dmae", "anytime"])
def test_a_judge_checks_what_it_is_told(protocol: str) -> None:
    found = _judge(protocol)
    request = found.wants()
    assert request is not None
    for bad in ([request.n, 0, 0], [request.n - 1, 0, 0, 0], [request.n + 1, -1, 0, 0]):
        with pytest.raises(ValueError, match="counts must be 4 numbers"):
            found.tell(bad)
    with pytest.raises(ValueError, match="not decided"):
        found.decision()
    _run(found, _votes(np.random.default_rng(0), (0.9, 0.1, 0.0)))
    with pytest.raises(ValueError, match="nothing was asked"):
        found.tell([1000, 0, 0, 0])


@pytest.mark.parametrize(
    ("protocol", "changes", "says"),
    [
        ("nothing", {}, "exact, cohen, dmae, anytime"),
        ("cohen", dict(sigma=-1.0), "sigma"),
        ("cohen", dict(num_classes=1), "num_classes"),
        ("cohen", dict(label=3), "label must lie between 0 and 2"),
        ("cohen", dict(n0=0), "n0"),
        ("cohen", dict(slack=-1.0), "slack"),
        ("cohen", dict(alpha=0.7), "alpha"),
        ("cohen", dict(n=0), "n must"),
        ("dmae", dict(label=None), "needs the label"),
        ("exact", dict(radii=(1.0, 0.5)), "increasing"),
        ("exact", dict(radii=(0.0, 4.0)), "no plan"),
        ("exact", dict(top2=True), "top2"),
        ("exact", dict(n=5), "too small"),
    ],
)
def test_bad_input(protocol: str, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _judge(protocol, **changes)


# --- real logs ------------------------------------------------------------------------------------

# DMAE's radii for each sigma, and the file with certificates at n = 100,000.
LOGS = {
    0.25: (0.0, 0.5),
    0.5: (0.0, 0.5, 1.0, 1.5),
    1.0: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
}


def label_probabilities(path: Path, sigma: float, unknown: Sequence[float]) -> list[float]:
    """The label's probability in each image of a log; `unknown` in turn where it abstained.

    Radii are of alpha = 0.01 and rounded to 3 digits. Where another class was certified the label
    has at most the rest; that is taken.
    """
    n, alpha = 100_000, 0.01
    counts = np.arange(n // 2, n + 1)
    radii = sigma * norm.ppf(betaincinv(counts, n - counts + 1, alpha))
    found, abstained = [], 0
    for row in read(path):
        if row.predict == ABSTAIN:
            found.append(unknown[abstained % len(unknown)])
            abstained += 1
        else:
            p = float(counts[np.abs(radii - row.radius).argmin()]) / n
            found.append(p if row.correct else 1 - p)
    return found


class Replay(NamedTuple):
    """Expected samples over a log, and certified accuracy at the radii ``[R]``.

    `low` and `high` are of CERTIFY: with selection against a single rival, and with none. What the
    other classes share is not in the log.
    """

    cohen: float
    dmae: float
    exact: float
    low: np.ndarray
    high: np.ndarray
    ours: np.ndarray


def _replay(path: Path, found: Plan, unknown: Sequence[float]) -> Replay:
    n, n0 = found.n, 100
    p = np.array(label_probabilities(path, found.sigma, unknown))
    selected = binom.sf(n0 // 2, n0, p) + binom.pmf(n0 // 2, n0, p) / 2
    outcomes = {q: found.outcome(q) for q in set(p.tolist())}
    high = binom.sf(found.accept[:, -1:] - 1, n, p)  # [R, images]
    ours = [outcomes[q].reached[::-1].cumsum()[::-1][1:] for q in p.tolist()]
    return Replay(
        cohen=len(p) * (n0 + n),
        dmae=float((n0 + n * selected).sum()),
        exact=sum(outcomes[q].samples for q in p.tolist()),
        low=(high * selected).mean(axis=1),
        high=high.mean(axis=1),
        ours=np.mean(ours, axis=0),
    )


# Where a log abstained nobody knows the label's probability. The worst is 1/2, on the edge of
# radius 0; the other case spreads it evenly below.
WORST, SPREAD = [0.5], np.linspace(0.025, 0.475, 10).tolist()


@pytest.mark.parametrize(
    ("n", "unknown", "against_cohen", "against_dmae"),
    [
        pytest.param(10_000, WORST, 2.9, 1.9, id="10k worst"),
        pytest.param(10_000, SPREAD, 4.9, 2.9, id="10k spread"),
        pytest.param(100_000, WORST, 4.7, 3.0, id="100k worst", marks=pytest.mark.slow),
        pytest.param(100_000, SPREAD, 15.0, 9.0, id="100k spread", marks=pytest.mark.slow),
    ],
)
def test_replay_of_real_logs(
    shared_reference: Path,
    n: int,
    unknown: list[float],
    against_cohen: float,
    against_dmae: float,
) -> None:
    """The numbers that docs/sequential_test.md quotes: run with -s to see them."""
    replays = []
    for sigma, radii in LOGS.items():
        name = f"imagenet_resnet50_noise_{sigma:.2f}_test_sigma_{sigma:.2f}.tsv"
        one = _replay(shared_reference / "certify_logs" / name, plan(sigma, radii, n=n), unknown)
        replays.append(one)
        lost, gained = (one.high - one.ours).max(), (one.ours - one.low).max()
        print(
            f"sigma {sigma}: {one.cohen / one.exact:.2f} {one.dmae / one.exact:.2f}, "
            f"at most {lost:.4f} below CERTIFY without selection, {gained:.4f} above with"
        )
        assert (one.ours >= one.high - 0.003).all()
        assert (one.ours <= one.high + 0.003).all()
    cohen, dmae, exact = (sum(getattr(one, name) for one in replays) for name in Replay._fields[:3])
    print(f"all: {cohen / exact:.2f} {dmae / exact:.2f}")
    assert cohen / exact > against_cohen
    assert dmae / exact > against_dmae
