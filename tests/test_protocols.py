# SPDX-License-Identifier: Apache-2.0
"""Judges driven by drawn votes: what they ask for, what they decide, how often they are wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
from drawn_votes import drawn_votes
from scipy.stats import beta, norm

from nimfast.ops import Stream
from nimfast.smoothing import bounds, plan
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.protocols import Decision, Judge, Request, judge

RADII = (0.0, 0.5, 1.0)
SETTINGS = dict(
    sigma=1.0, label=0, num_classes=3, n0=100, n=1000, alpha=0.001, radii=RADII, slack=0.0
)


def _judge(protocol: str, **changes: object) -> Judge:
    return judge(protocol, **{**SETTINGS, **changes})  # type: ignore[arg-type]


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
    decisions = [
        _run(_judge("exact", label=label), drawn_votes(rng, shares)) for _ in range(images)
    ]
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
    counts = drawn_votes(np.random.default_rng(0), (0.68, 0.0, 0.0))
    while (request := found.wants()) is not None:
        asked.append(request)
        votes = counts(request)
        found.tell(votes)
    looks = plan(1.0, RADII, n=1000).looks
    assert [request.n for request in asked] == list(looks[: len(asked)])
    assert {request.stream for request in asked} == {Stream.ESTIMATION}
    assert found.decision().count == votes[0]


def test_exact_with_a_label_tests_the_label() -> None:
    decision = _run(
        _judge("exact", label=2), drawn_votes(np.random.default_rng(0), (0.9, 0.05, 0.05))
    )
    assert decision.predict == ABSTAIN and decision.samples == 32
    free = _run(
        _judge("exact", label=None), drawn_votes(np.random.default_rng(0), (0.05, 0.9, 0.05))
    )
    assert (free.predict, free.radius) == (1, 1.0)


def test_exact_keeps_what_it_certified_when_the_next_radius_is_given_up() -> None:
    decision = _run(_judge("exact"), drawn_votes(np.random.default_rng(0), (0.8, 0.2, 0.0)))
    assert (decision.predict, decision.radius) == (0, 0.5)
    assert decision.samples < 1000


def test_anytime_certifies_and_seldom_errs() -> None:
    rng = np.random.default_rng(0)
    decision = _run(_judge("anytime"), drawn_votes(rng, (0.99, 0.01, 0.0)))
    assert (decision.predict, decision.radius) == (0, 1.0)
    at_edge = functools.partial(_judge, "anytime", alpha=0.05, radii=(0.5,), n=2000)
    wrong = [
        _run(at_edge(), drawn_votes(rng, (norm.cdf(0.5), 0.1, 0.1))).predict for _ in range(1000)
    ]
    assert sum(predict == 0 for predict in wrong) <= 50
    with pytest.raises(ValueError, match=r"radius 3 has no plan.*up to 2\.\d+"):
        _judge("anytime", radii=(0, 3.0))


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
    _run(found, drawn_votes(np.random.default_rng(0), (0.9, 0.1, 0.0)))
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
