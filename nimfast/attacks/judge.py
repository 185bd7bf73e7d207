# SPDX-License-Identifier: Apache-2.0
"""How often a classifier that may be random is right: the verdict on final points of an attack.

One draw proves nothing about a randomised classifier. Each point is judged on fresh draws, from
another stream than the attack's, and the verdict has four readings:

- mean: share of draws that are right, averaged over images. The classifier as it is deployed.
- majority: share of images whose most likely class is the label; a sequential test, `majority`.
- worst of k: share of images that are right in all of k draws. An attacker who may try k times.
- fixed: the noise is drawn once for each image, the attacker knows it; attack and judge
  `views.Fixed`.

Every reading comes with a 95% interval over images and draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nimfast.intervals import wilson
from nimfast.ops import Stream, image_keys
from nimfast.smoothing.majority import Majority
from nimfast.smoothing.majority import Verdict as Answer


class Share(NamedTuple):
    """A share of images or draws, and its 95% interval."""

    value: float
    low: float
    high: float


class Vote(NamedTuple):
    """Whether the label wins the vote over an image's draws, and how many draws decided it."""

    verdict: Answer
    samples: int


class Drawn(Protocol):
    """What is judged: logits of numbered draws, as `attacks.target.Target` gives them."""

    def logits(self, x: Tensor, keys: Tensor, samples: int, first_sample: int) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B * samples, K]``, image-major."""
        ...


class Verdict(NamedTuple):
    """B images, each judged on S draws.

    Attributes:
        right: whether a draw's class is the label, bool ``[B, S]``; never of logits that are not
            finite.
        loss: mean cross-entropy over the draws, fp64 ``[B]``.
        margin: mean over the draws of the label's logit minus the largest other, fp64 ``[B]``.
        votes: draws for each class, int64 ``[B, K + 1]``; the last counts draws whose logits are
            not finite.
    """

    right: Tensor
    loss: Tensor
    margin: Tensor
    votes: Tensor


@torch.no_grad()
def judge(
    target: Drawn,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    *,
    draws: int,
    seed: int,
    stream: Stream = Stream.EVALUATION,
    first: int = 0,
    rows: int = 512,
) -> Verdict:
    """Classify each of `x` in `draws` fresh draws.

    Args:
        target: what is judged.
        x: images ``[B, C, H, W]`` in [0, 1].
        y: labels, int64 ``[B]``.
        indices: places in the data set, int64 ``[B]``; with the seed they decide the draws.
        draws: S; 1 for a deterministic classifier.
        seed: of the draws.
        stream: what the draws are for. Never that of the attack that made `x`, but for
            `views.Fixed`.
        first: number of the first draw.
        rows: most logits at once.

    Raises:
        ValueError: draws below 1, or labels outside the classes.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    keys = image_keys(seed, stream, indices)
    step = max(1, min(draws, rows // len(x)))
    parts = []
    for start in range(first, first + draws, step):
        count = min(step, first + draws - start)
        parts.append(target.logits(x, keys, count, start).double().view(len(x), count, -1))
    logits = torch.cat(parts, 1)  # [B, S, K]
    classes = logits.shape[2]
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"labels must lie in [0, {classes}), not {int(y.min())} to {int(y.max())}")
    valid = logits.isfinite().all(2)
    predicted = torch.where(valid, logits.argmax(2), classes)
    label = y[:, None].expand(-1, draws)
    of_label = logits.gather(2, label[..., None])[..., 0]
    others = logits.scatter(2, label[..., None], -math.inf).amax(2)
    loss = functional.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
    return Verdict(
        right=predicted == label,
        loss=loss.view(len(x), draws).mean(1),
        margin=(of_label - others).mean(1),
        votes=functional.one_hot(predicted, classes + 1).sum(1),
    )


def share(values: Sequence[float] | np.ndarray) -> Share:
    """Mean over images of a share of draws, with its 95% interval over images and draws.

    Wilson's interval for as many yes-or-no trials as there are images: no values in [0, 1] of the
    same mean vary more. The variance seen would give a narrower one, which misses too often: few
    images that are always wrong decide the mean, and a sample may hold none of them. (With one
    in 50 of those, the rest right in 95% of the draws, and 100 images of 20 draws it held the truth
    in 85% of the experiments.)

    Args:
        values: for each image, the share of its draws that are right.

    Raises:
        ValueError: no images.
    """
    found = np.asarray(values, dtype=float)
    if not found.size:
        raise ValueError("values must hold at least one image")
    mean = float(found.mean())
    low, high = wilson(mean, found.size)
    return Share(mean, float(low), float(high))


def worst_of(hits: Sequence[int] | np.ndarray, draws: int, k: int) -> np.ndarray:
    """For each image an unbiased estimate of the probability that k draws are all right.

    ``C(hits, k) / C(draws, k)``: the share of all choices of k among the draws.

    Args:
        hits: draws that were right, ``[B]``.
        draws: how many there were.
        k: at most `draws`.

    Raises:
        ValueError: k below 1 or above `draws`.
    """
    if not 1 <= k <= draws:
        raise ValueError(f"k must lie between 1 and the {draws} draws, not {k}")
    return np.array([math.comb(int(h), k) / math.comb(draws, k) for h in hits])


@torch.no_grad()
def majority(
    target: Drawn,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    verdict: Verdict,
    *,
    most: int = 1000,
    alpha: float = 0.001,
    seed: int,
    rows: int = 512,
) -> list[Vote]:
    """Whether the label is each image's most likely class, by a sequential test.

    Draws go on where those of `verdict` end, for the images that are not decided yet.

    Args:
        target, x, y, indices, seed, rows: as of the call of `judge` that gave `verdict`.
        verdict: on the first draws of the stream EVALUATION.
        most: draws after which an image stays undecided; 1 for a deterministic classifier, whose
            one draw decides.
        alpha: probability, over the draws, that an image's answer is wrong.
    """
    draws, classes = verdict.right.shape[1], verdict.votes.shape[1] - 1
    if most <= 1:
        return [Vote("right" if right else "wrong", 1) for right in verdict.right[:, 0].tolist()]
    tests = [Majority(classes, label=label, n=most, alpha=alpha) for label in y.tolist()]
    counts, seen = verdict.votes.cpu(), draws
    while pending := [i for i, test in enumerate(tests) if test.wants() is not None]:
        # All that are undecided have seen as much, so they want as much.
        n = max(request.n for i in pending if (request := tests[i].wants()))
        if n > seen:
            at = torch.tensor(pending, device=x.device)
            more = judge(
                target,
                x[at],
                y[at],
                indices[at],
                draws=n - seen,
                seed=seed,
                first=seen,
                rows=rows,
            )
            counts[at.cpu()] += more.votes.cpu()
            seen = n
        for i in pending:
            tests[i].tell(counts[i].tolist())
    return [Vote(test.verdict, test.samples) for test in tests]
