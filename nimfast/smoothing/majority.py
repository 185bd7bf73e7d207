# SPDX-License-Identifier: Apache-2.0
"""Sequential PREDICT: which class a randomised classifier most likely returns, and is it the label.

The votes of a noisy classifier on one input are independent draws of a class. Class A is compared
with class B by the samples that voted for one of the two: where A is not the more likely of them,
each of these is a vote for A with probability at most 1/2, and the e-process of
`nimfast.smoothing.anytime` against 1/2 reaches 1 / alpha with probability at most alpha, however
often one looks (samples of other classes leave it as it is).

- "the label wins" (no class is more likely) needs E(label against B) >= 1 / alpha for every B. Where
  it is false some B is more likely, and E against that one had to be large: error at most alpha.
- "the label loses" (some class is more likely) needs E(B against label) >= (K - 1) / alpha for some
  B. Where it is false, this is one of K - 1 events of probability at most alpha / (K - 1) each:
  error at most alpha.
- without a label, "A wins" needs E(A against B) >= (K - 1) / alpha for every B. Where it is false,
  A is one of at most K - 1 classes that are not the most likely one: error at most alpha.

Exactly one of the first two statements is true, so the total error of a verdict is at most alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from nimfast.ops import Stream
from nimfast.smoothing import bounds
from nimfast.smoothing.anytime import log_e_value
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.plans import look_schedule
from nimfast.smoothing.protocols import Request, leader

Verdict = Literal["right", "wrong", "undecided"]


class Majority:
    """Decides which class wins the vote over noise, or whether the label does; driven as a judge.

        while (request := majority.wants()) is not None:
            majority.tell(counts of the first request.n samples of request.stream)
        majority.verdict

    Args:
        num_classes: K.
        label: the class that should win; None to ask which one does.
        n: the most samples.
        alpha: probability, over the samples, that an answer other than "undecided" (ABSTAIN) is
            wrong; in (0, 0.5). Looking after every batch costs nothing, so `tell` may also be given
            more samples than were asked for.
        stream: which samples to ask for.

    Attributes:
        counts: the last counts told, votes for each class and samples without a vote.
        samples: how many samples they are over.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        label: int | None = None,
        n: int = 1000,
        alpha: float = 0.001,
        stream: Stream = Stream.EVALUATION,
    ) -> None:
        bounds.check_trials(n, alpha)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        if label is not None and not 0 <= label < num_classes:
            raise ValueError(f"label must lie between 0 and {num_classes - 1}, not {label}")
        self._num_classes, self._label = num_classes, label
        self._alpha, self._stream = alpha, stream
        self._looks = look_schedule(n)
        self._winner: int | None = None
        self._loses = False
        self.counts: list[int] = [0] * (num_classes + 1)
        self.samples = 0

    def wants(self) -> Request | None:
        """The samples to count next, a longer prefix of the stream; None once decided."""
        if self._winner is not None or self._loses:
            return None
        n = next((look for look in self._looks if look > self.samples), None)
        return None if n is None else Request(self._stream, n)

    def tell(self, counts: Sequence[int]) -> None:
        """Take the K + 1 counts of a longer prefix: votes for each class, then votes for none.

        Raises:
            ValueError: counts that no longer prefix can have.
        """
        request, samples = self.wants(), sum(counts)
        if request is None:
            raise ValueError("nothing was asked for: the vote is decided or out of samples")
        grown = len(counts) == self._num_classes + 1 and all(
            new >= old for new, old in zip(counts, self.counts, strict=True)
        )
        if not grown or samples < request.n:
            raise ValueError(
                f"counts must be {self._num_classes + 1} numbers of votes over at least "
                f"{request.n} samples, none below {self.counts}, not {list(counts)}"
            )
        self.counts, self.samples = list(counts), samples
        *votes, _ = counts
        one, many = -math.log(self._alpha), math.log((self._num_classes - 1) / self._alpha)
        tested = leader(votes) if self._label is None else self._label
        # Against all others at once: the evidence is least against the strongest of them.
        rival = max(vote for c, vote in enumerate(votes) if c != tested)
        if log_e_value(votes[tested], rival, 0.5) >= (many if self._label is None else one):
            self._winner = tested
        elif self._label is not None and log_e_value(rival, votes[tested], 0.5) >= many:
            self._loses = True

    @property
    def predict(self) -> int:
        """The class that wins, or ABSTAIN; with a label, only ever the label."""
        return ABSTAIN if self._winner is None else self._winner

    @property
    def verdict(self) -> Verdict:
        """Whether the label wins; "undecided" while samples are wanted and where n did not do.

        Raises:
            ValueError: there is no label to judge by.
        """
        if self._label is None:
            raise ValueError("a verdict needs the label; without one there is `predict`")
        if self._loses:
            return "wrong"
        return "right" if self._winner is not None else "undecided"
