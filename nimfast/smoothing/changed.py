# SPDX-License-Identifier: Apache-2.0
"""A changed classifier on the noisy copies of the one before it: certificates that carry over.

Source: Ugare et al., "Incremental Randomized Smoothing Certification" (2024). The old classifier's
certificate says that its class c has probability at least p. The new one gives c with at least that
probability less the probability of the copies on which c is lost, and the latter is bounded from
few samples where the two seldom differ. Errors add: the two statements may both be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nimfast.ops import Stream
from nimfast.smoothing import bounds
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import CheckedJudge, Decision, Request
from nimfast.smoothing.records import Row


class Pair:
    """Two networks on the same noise, voting for what is lost.

    Of K classes it has K + 1: where the old network says a class and the new one another, a vote
    for the old one's class; where nothing is lost, for class K. A copy on which the new network's
    logits hold NaN or infinity votes for none.

    Args:
        old, new: of the same classes, sigma and noise.
    """

    def __init__(self, old: Network, new: Network) -> None:
        self.old, self.new = old, new
        self.module: nn.Module = nn.ModuleList([old.module, new.module])
        self.num_classes = old.num_classes + 1

    @property
    def device(self) -> torch.device | None:
        """Where the weights lie."""
        return self.old.device or self.new.device

    def accept(self, image: Tensor) -> Tensor:
        """As `Network.accept`, of both."""
        self.old.accept(image)
        return self.new.accept(image)

    def __call__(self, images: Tensor, keys: Tensor, first: Tensor, samples: int) -> Tensor:
        """As `Network.__call__`: fp32 ``[B * samples, K + 1]``, 1 for the vote and 0 else."""
        before, after = (net(images, keys, first, samples) for net in (self.old, self.new))
        said, says = before.argmax(1), after.argmax(1)
        said = torch.where(before.isfinite().all(1), said, self.old.num_classes)
        lost = torch.where(said == says, self.old.num_classes, said)
        vote = F.one_hot(lost, self.num_classes).float()
        return vote.masked_fill(~after.isfinite().all(1, keepdim=True), torch.nan)


class Carry(CheckedJudge):
    """Carries one image's certificate over to the new network, by n copies that `Pair` compares.

    They are of a stream that no certificate draws from, so the class is fixed before them.

    Args:
        before: the certificate; it has a class and a bound.
        num_classes: K.
        sigma: standard deviation of the noise.
        n: copies.
        alpha: error of the bound on what is lost, on top of that of `before`.
        slack: total variation between the noise drawn and the noise law.
    """

    def __init__(
        self, before: Row, num_classes: int, *, sigma: float, n: int, alpha: float, slack: float
    ) -> None:
        super().__init__(num_classes + 1, Request(Stream.EVALUATION, n))
        bounds.check_trials(n, alpha)
        self._before, self._sigma, self._alpha, self._slack = before, sigma, alpha, slack

    def _take(self, request: Request, counts: Sequence[int]) -> None:
        assert self._before.p_lower is not None
        # A copy that is a vote for none may have lost the class.
        lost = counts[self._before.predict] + counts[-1]
        bound, radius = bounds.recertify(
            self._before.p_lower, lost, request.n, self._alpha, self._sigma, self._slack
        )
        predict = self._before.predict if bound > 0.5 else ABSTAIN
        self._decide(Decision(predict, radius, bound, request.n - lost, request.n))
