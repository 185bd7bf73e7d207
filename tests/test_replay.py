# SPDX-License-Identifier: Apache-2.0
"""Real certification logs, replayed: what `exact` saves and what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.special import betaincinv
from scipy.stats import binom, norm

from nimfast.smoothing import plan
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.plans import Plan
from nimfast.smoothing.records import read

# DMAE's radii for each sigma of the logs, which hold certificates at n = 100,000.
IMAGENET, CIFAR10 = "imagenet_resnet50", "cifar10_resnet110"
LOGS = {
    IMAGENET: {
        0.25: (0.0, 0.5),
        0.5: (0.0, 0.5, 1.0, 1.5),
        1.0: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0),
    },
    CIFAR10: {
        0.25: (0.0, 0.25, 0.5, 0.75),
        0.5: (0.0, 0.25, 0.5, 0.75, 1.0),
    },
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
SLOW = pytest.mark.slow
WORST, SPREAD = [0.5], np.linspace(0.025, 0.475, 10).tolist()


@pytest.mark.parametrize(
    ("logs", "n", "unknown", "against_cohen", "against_dmae"),
    [
        pytest.param(IMAGENET, 10_000, WORST, 2.9, 1.9, id="10k worst"),
        pytest.param(IMAGENET, 10_000, SPREAD, 4.9, 2.9, id="10k spread"),
        pytest.param(IMAGENET, 100_000, WORST, 4.7, 3.0, id="100k worst", marks=SLOW),
        pytest.param(IMAGENET, 100_000, SPREAD, 15.0, 9.0, id="100k spread", marks=SLOW),
        pytest.param(CIFAR10, 10_000, WORST, 2.9, 2.2, id="CIFAR 10k worst"),
        pytest.param(CIFAR10, 10_000, SPREAD, 4.0, 2.8, id="CIFAR 10k spread", marks=SLOW),
        pytest.param(CIFAR10, 100_000, WORST, 5.3, 4.0, id="CIFAR 100k worst", marks=SLOW),
        pytest.param(CIFAR10, 100_000, SPREAD, 12.0, 8.4, id="CIFAR 100k spread", marks=SLOW),
    ],
)
def test_replay_of_real_logs(
    shared_reference: Path,
    logs: str,
    n: int,
    unknown: list[float],
    against_cohen: float,
    against_dmae: float,
) -> None:
    """The numbers that docs/sequential_test.md quotes: run with -s to see them."""
    replays = []
    for sigma, radii in LOGS[logs].items():
        name = f"{logs}_noise_{sigma:.2f}_test_sigma_{sigma:.2f}.tsv"
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


def test_our_own_runs_find_what_certify_finds_and_draw_what_is_expected() -> None:
    """The runs behind docs/certification.md's table and the last lines of the replay."""
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    for exact_file, cohen_file, sigma, last, least in (
        ("cifar10/dmae-cr-0.25.tsv", "cifar10/dmae-cr-0.25-cohen.tsv", 0.25, 0.75, 4.4),
        ("digits/exact.tsv", "digits/cohen.tsv", 0.5, 1.25, 3.5),
    ):
        paths = [results / exact_file, results / cohen_file]
        exact, cohen = ({row.idx: row for row in read(path)} for path in paths)
        assert exact.keys() == cohen.keys()
        radii = [0.25 * step for step in range(int(last / 0.25) + 1)]
        for radius in radii:
            ours, theirs = (
                sum(row.correct and row.radius >= radius for row in run.values())
                for run in (exact, cohen)
            )
            assert abs(ours - theirs) <= (1 if radius == 0 else 0)
        drawn = {index: row.samples or 0 for index, row in exact.items()}
        assert sum(row.samples or 0 for row in cohen.values()) > least * sum(drawn.values())
        found = plan(sigma, radii, n=10_000)
        known = [row for row in cohen.values() if row.correct]
        expected = sum(found.outcome((row.count or 0) / 10_000).samples for row in known)
        assert sum(drawn[row.idx] for row in known) == pytest.approx(expected, rel=0.03)
