# SPDX-License-Identifier: Apache-2.0
"""What to sample for one image and when to stop: the protocols of a certification.

A judge is a state machine without noise, model or device: it says which samples it wants, is told
their votes, and decides. Whoever drives it (the engine, a replay, a test) does

    while (request := judge.wants()) is not None:
        judge.tell(counts of the first request.n samples of request.stream)
    judge.decision()

- ``exact``: the group-sequential test of `nimfast.smoothing.plans` over a grid of radii.
- ``cohen``: CERTIFY of Cohen, Rosenfeld and Kolter (2019): n0 samples select a class, n fresh ones
  bound its probability. With ``top2`` the runner-up's probability is bounded as well.
- ``dmae``: the same, stopped after the n0 samples where they elect another class than the label.
- ``anytime``: e-processes over the same grid of radii, valid whenever one stops.

All of them: with probability at least 1 - alpha over the samples, the smoothed classifier returns
`Decision.predict` everywhere within `Decision.radius`, or `predict` is ABSTAIN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, get_args

import numpy as np

from nimfast.ops import Stream
from nimfast.options import ProtocolName
from nimfast.smoothing import bounds
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.plans import Plan, anytime_plan, plan


class Request(NamedTuple):
    """Samples 0 to n - 1 of a stream, counted together."""

    stream: Stream
    n: int


@dataclass(frozen=True)
class Decision:
    """What a protocol found for one image.

    Attributes:
        predict: the class, or ABSTAIN.
        radius: l2 radius within which it is certified, in the unit of sigma, never rounded up; 0
            for ABSTAIN.
        p_lower: lower bound of the tested class's probability, after `slack`; for the protocols
            over a grid of radii that of the radius certified, 0 where there is none.
        count: votes of the tested class among the estimation samples.
        samples: samples asked for in total.
    """

    predict: int
    radius: float
    p_lower: float
    count: int
    samples: int


class Judge(Protocol):
    """Decides about one image; see the module's text for how it is driven."""

    def wants(self) -> Request | None:
        """The samples to count next, always a longer prefix of a stream; None once decided."""

    def tell(self, counts: Sequence[int]) -> None:
        """Take the answer to `wants()`.

        Args:
            counts: K + 1 counts over the samples asked for, from sample 0 on: votes for each
                class, then samples that were votes for none. They add up to the request's n.

        Raises:
            ValueError: other counts, or nothing was wanted.
        """

    def decision(self) -> Decision:
        """The answer.

        Raises:
            ValueError: samples are still wanted.
        """


class CheckedJudge:
    """What all judges share: the next request, and checks of what they are told."""

    def __init__(self, num_classes: int, first: Request) -> None:
        self._num_classes = num_classes
        self._next: Request | None = first
        self._decision: Decision | None = None

    def wants(self) -> Request | None:
        """See `Judge`."""
        return self._next

    def tell(self, counts: Sequence[int]) -> None:
        """See `Judge`."""
        request = self._next
        if request is None:
            raise ValueError("nothing was asked for: the judge has decided")
        if len(counts) != self._num_classes + 1 or sum(counts) != request.n or min(counts) < 0:
            raise ValueError(
                f"counts must be {self._num_classes + 1} numbers of votes that add up to "
                f"{request.n}, not {list(counts)}"
            )
        self._take(request, counts)

    def decision(self) -> Decision:
        """See `Judge`."""
        if self._decision is None:
            raise ValueError("not decided yet: go on while wants() is not None")
        return self._decision

    def _decide(self, decision: Decision) -> None:
        self._decision, self._next = decision, None

    def _take(self, request: Request, counts: Sequence[int]) -> None:
        raise NotImplementedError


def leader(votes: Sequence[int]) -> int:
    """The class with most votes; the lowest among equals, as in every back end's argmax."""
    return votes.index(max(votes))


class Cohen(CheckedJudge):
    """CERTIFY; with a `label`, DMAE's early stop; with `top2`, the runner-up's bound as well.

    `top2` splits alpha: the tested class A gets a lower bound at alpha / 2, and the largest of the
    other classes an upper bound at alpha / 2; radius sigma / 2 * (Phi^-1(lower) - Phi^-1(upper)).
    The upper bound is that of the highest count among the others. The class B with the largest
    probability is one fixed class whose count is no higher, and bounds grow with the count.
    """

    def __init__(
        self,
        *,
        sigma: float,
        num_classes: int,
        n0: int,
        n: int,
        alpha: float,
        slack: float,
        label: int | None = None,
        top2: bool = False,
    ) -> None:
        super().__init__(num_classes, Request(Stream.SELECTION, n0))
        self._sigma, self._n0, self._n, self._alpha = sigma, n0, n, alpha
        self._slack, self._label, self._top2 = slack, label, top2
        self._tested = ABSTAIN

    def _take(self, request: Request, counts: Sequence[int]) -> None:
        votes = list(counts[:-1])
        if request.stream == Stream.SELECTION:
            self._tested = leader(votes)
            if self._label is not None and self._tested != self._label:
                self._decide(Decision(ABSTAIN, 0.0, 0.0, 0, self._n0))
            else:
                self._next = Request(Stream.ESTIMATION, self._n)
            return
        count, samples = votes[self._tested], self._n0 + self._n
        if self._top2:
            p_lower, radius = bounds.top2(
                count,
                max(vote for c, vote in enumerate(votes) if c != self._tested),
                self._n,
                self._alpha,
                self._sigma,
                self._slack,
            )
            certified = radius > 0
        else:
            p_lower = bounds.less_slack(
                bounds.lower_bound(count, self._n, self._alpha), self._slack
            )
            radius, certified = bounds.radius(p_lower, self._sigma), p_lower >= 0.5
        predict = self._tested if certified else ABSTAIN
        self._decide(Decision(predict, radius, p_lower, count, samples))


class Sequential(CheckedJudge):
    """Follows a plan: the answer is the largest radius whose count was ever reached.

    Args:
        plan: of `nimfast.smoothing.plans`, made for a known class or for the leading one.
        num_classes: K.
        label: the class to test; None, for a plan that allows it, to test the leading one.
    """

    def __init__(self, plan: Plan, num_classes: int, label: int | None) -> None:
        if plan.labelled and label is None:
            raise ValueError("this plan tests a known class; give the label or make another plan")
        super().__init__(num_classes, Request(Stream.ESTIMATION, plan.looks[0]))
        self._plan, self._label = plan, label
        self._look = 0
        self._level = 0  # radii certified so far
        self._class = ABSTAIN

    def _take(self, request: Request, counts: Sequence[int]) -> None:
        plan, look = self._plan, self._look
        votes = list(counts[:-1])
        tested = leader(votes) if self._label is None else self._label
        level = int(np.searchsorted(plan.accept[:, look], votes[tested], side="right"))
        if level > self._level:
            self._level, self._class = level, tested
        if (
            self._level == len(plan.radii)
            or look == len(plan.looks) - 1
            or votes[tested] <= plan.futile[self._level, look]
        ):
            count = votes[self._class if self._level else tested]
            radius = plan.radii[self._level - 1] if self._level else 0.0
            p_lower = bounds.probability(radius, plan.sigma) if self._level else 0.0
            self._decide(Decision(self._class, radius, p_lower, count, request.n))
        else:
            self._look += 1
            self._next = Request(Stream.ESTIMATION, plan.looks[self._look])


def judge(
    protocol: ProtocolName,
    *,
    sigma: float,
    label: int | None,
    num_classes: int,
    n0: int,
    n: int,
    alpha: float,
    radii: Sequence[float],
    slack: float = 0.0,
    top2: bool = False,
) -> Judge:
    """A new judge for one image.

    Args:
        protocol: see the module's text.
        sigma: standard deviation of the noise.
        label: the true class, where it is known. ``dmae`` stops early by it, ``exact`` and
            ``anytime`` test it directly; without it they test the leading class. ``cohen`` does not
            look at it.
        num_classes: K.
        n0: selection samples of ``cohen`` and ``dmae``.
        n: estimation samples, the most that may be drawn.
        alpha: error probability of the answer, in (0, 0.5).
        radii: increasing target radii of ``exact`` and ``anytime``, in the unit of sigma.
        slack: how far any probability under the noise that is drawn may lie from that under the
            noise law (total variation, `nimfast.ops.grid_slack`); every bound gives way by it.
        top2: let ``cohen`` or ``dmae`` bound the runner-up's probability too.

    Raises:
        ValueError: an argument out of range, a label that the protocol needs and has not got, radii
            that do not increase or are larger than n samples can certify.
    """
    if protocol not in get_args(ProtocolName):
        names = ", ".join(get_args(ProtocolName))
        raise ValueError(f"protocol must be one of {names}, not {protocol!r}")
    bounds.check_trials(n, alpha)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}")
    if label is not None and not 0 <= label < num_classes:
        raise ValueError(f"label must lie between 0 and {num_classes - 1}, not {label}")
    if not 0 <= slack < 0.5:
        raise ValueError(f"slack must lie in [0, 0.5), not {slack}")
    if top2 and protocol not in ("cohen", "dmae"):
        raise ValueError(f"top2 is an option of the protocols cohen and dmae, not of {protocol}")
    if protocol in ("cohen", "dmae"):
        if n0 < 1:
            raise ValueError(f"n0 must be at least 1, not {n0}")
        if protocol == "dmae" and label is None:
            raise ValueError("protocol dmae needs the label: it stops where another class is ahead")
        return Cohen(
            sigma=sigma,
            num_classes=num_classes,
            n0=n0,
            n=n,
            alpha=alpha,
            slack=slack,
            label=label if protocol == "dmae" else None,
            top2=top2,
        )
    make = plan if protocol == "exact" else anytime_plan
    rows = make(sigma, radii, n=n, alpha=alpha, labelled=label is not None, slack=slack)
    return Sequential(rows, num_classes, label)
