# SPDX-License-Identifier: Apache-2.0
"""The smoothed classifier: PREDICT and CERTIFY.

Source: Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing"
(2019), theorem 1 and the two procedures of its section 3.2.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from nimfast.corruption import warn_if_units_look_wrong
from nimfast.ops import Stream
from nimfast.options import Precision
from nimfast.runtime import DTYPES, pick_device, prepare
from nimfast.smoothing import bounds
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.engine import Sampler, Work
from nimfast.smoothing.majority import Majority
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import Judge, Request, judge

# Indices of calls that name none start here, far from the indices of any data set: no call shares
# its noise with an image that is named.
_UNNAMED = 2**40


@dataclass(frozen=True)
class Certificate:
    """What CERTIFY, or the sequential test, found for one image.

    Attributes:
        predict: the class, or -1 for abstain.
        radius: l2 radius in pixel units within which `predict` is certified; 0 for abstain.
        p_lower: lower bound of the probability of the tested class under noise.
        count: votes of the tested class among the estimation samples.
        samples: samples drawn in total, selection and estimation.
        invalid: samples of these whose logits held NaN or infinity; they voted for no class.
    """

    predict: int
    radius: float
    p_lower: float
    count: int
    samples: int
    invalid: int


def new_seed() -> int:
    """A seed from the operating system, small enough to be exact in every JSON reader."""
    return secrets.randbits(48)


class Smooth:
    """A smoothed classifier g(x): the class that `base_classifier` most likely gives to x + noise.

    The noise is Gaussian, independent over pixels, with standard deviation `sigma`. The interface
    is that of the original implementation, so that a script written for it runs after changing its
    import.

    Args:
        base_classifier: any module from images ``[N, C, H, W]``, pixels in [0, 1] (noise leaves
            that range), to logits ``[N, num_classes]``. It is put in eval mode.
        num_classes: number of classes.
        sigma: standard deviation of the noise, in pixel units of [0, 1].
        seed: of the noise; from the operating system where None. Read it back as `seed`.
        precision: ``fp32`` uses the module as it is. ``tf32`` (CUDA), ``bf16`` and ``fp16`` use a
            copy made now by `nimfast.runtime.prepare`: the guarantee then holds for the classifier
            at that precision.

    Raises:
        ValueError: `num_classes` or `sigma` out of range.
        UserError: a precision that the module's device does not have.
    """

    ABSTAIN: ClassVar[int] = ABSTAIN

    def __init__(
        self,
        base_classifier: nn.Module,
        num_classes: int,
        sigma: float,
        *,
        seed: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be positive and finite, not {sigma}")
        warn_if_units_look_wrong(sigma, 1)
        self.base_classifier = base_classifier
        self.num_classes = num_classes
        self.sigma = sigma
        self.seed = new_seed() if seed is None else seed
        module = base_classifier
        if precision != "fp32":
            weight = next(base_classifier.parameters(), None)
            device = pick_device() if weight is None else weight.device
            module = prepare(base_classifier, device, precision)
        dtype = DTYPES[precision]
        self._sampler = Sampler(Network(module, num_classes, sigma, dtype=dtype), seed=self.seed)
        self._calls = 0

    def certify(
        self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int, *, index: int | None = None
    ) -> tuple[int, float]:
        """A class and the l2 radius around `x` within which g is certified to return it.

        With probability at least 1 - alpha over the samples, g returns this class for every x' with
        ||x' - x||_2 < radius, or the answer is ABSTAIN. This holds for each call on its own.

        Args:
            x: image ``[C, H, W]`` on any device.
            n0: samples to select the class.
            n: fresh samples to bound its probability.
            alpha: failure probability, in (0, 0.5).
            batch_size: most noisy copies per forward pass.
            index: names the noise: the same seed and index draw the same. Every call without it
                draws fresh noise.

        Returns:
            ``(class, radius)``, or ``(Smooth.ABSTAIN, 0.0)``.
        """
        found = self.certificate(x, n0, n, alpha, batch_size, index=index)
        return found.predict, found.radius

    def certificate(
        self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int, *, index: int | None = None
    ) -> Certificate:
        """As `certify`, with the numbers behind the answer."""
        cohen = judge(
            "cohen",
            sigma=self.sigma,
            label=None,
            num_classes=self.num_classes,
            n0=n0,
            n=n,
            alpha=alpha,
            radii=(),
        )
        work = Work(
            self._next(index),
            x,
            cohen,
            [Request(Stream.SELECTION, n0), Request(Stream.ESTIMATION, n)],
        )
        return self._decide(work, batch_size)

    def certify_sequential(
        self,
        x: Tensor,
        radii: Sequence[float],
        n: int,
        alpha: float,
        batch_size: int,
        *,
        label: int | None = None,
        index: int | None = None,
    ) -> Certificate:
        """The largest of `radii` that can be certified, from as few samples as the image needs.

        The exact group-sequential test (`nimfast.smoothing.plan`): the guarantee of `certify`, for
        all radii together.

        Args:
            x: image ``[C, H, W]`` on any device.
            radii: increasing target radii in pixel units; the first may be 0.
            n: the most samples.
            alpha: failure probability, in (0, 0.5).
            batch_size: most noisy copies per forward pass.
            label: the class to test, where it is known; else the leading one is tested.
            index: names the noise, as in `certify`.

        Raises:
            ValueError: radii that no plan exists for; a label outside the classes.
        """
        exact = judge(
            "exact",
            sigma=self.sigma,
            label=label,
            num_classes=self.num_classes,
            n0=0,
            n=n,
            alpha=alpha,
            radii=radii,
        )
        work = Work(self._next(index), x, exact, [Request(Stream.ESTIMATION, n)])
        return self._decide(work, batch_size)

    def _decide(self, work: Work[Judge], batch_size: int) -> Certificate:
        found = self._sampler.decide(work, batch_size)
        return Certificate(**vars(found.judge.decision()), invalid=found.invalid)

    def predict(
        self, x: Tensor, n: int, alpha: float, batch_size: int, *, index: int | None = None
    ) -> int:
        """The class that g returns for `x`.

        With probability at least 1 - alpha over the samples, the answer is g(x) or ABSTAIN.

        Args:
            x: image ``[C, H, W]`` on any device.
            n: samples.
            alpha: failure probability, in (0, 0.5).
            batch_size: most noisy copies per forward pass.
            index: names the noise, as in `certify`, with which it shares none.
        """
        bounds.check_trials(n, alpha)
        requests = [Request(Stream.EVALUATION, n)]
        ((*counts, _),) = self._sampler.counts(x, self._next(index), requests, batch_size)
        second, top = sorted(counts)[-2:]
        if bounds.two_sided_p_value(top, second) > alpha:
            return ABSTAIN
        return counts.index(top)

    def predict_sequential(
        self, x: Tensor, n: int, alpha: float, batch_size: int, *, index: int | None = None
    ) -> int:
        """As `predict`, by a sequential vote: as few samples as the image needs, at most n.

        With probability at least 1 - alpha over the samples, the answer is g(x) or ABSTAIN, see
        `nimfast.smoothing.majority`.
        """
        majority = Majority(self.num_classes, n=n, alpha=alpha)
        work = Work(self._next(index), x, majority, [Request(Stream.EVALUATION, n)])
        return self._sampler.decide(work, batch_size).judge.predict

    def _next(self, index: int | None) -> int:
        if index is not None:
            return index
        self._calls += 1
        return _UNNAMED + self._calls
