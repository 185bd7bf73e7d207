# SPDX-License-Identifier: Apache-2.0
"""Losses of the classifiers that are trained to be smoothed."""

from __future__ import annotations

import math

from torch import Tensor


def consistency(logits: Tensor, weight: float, entropy_weight: float) -> Tensor:
    """Consistency regularisation (Jeong and Shin, 2020), as DMAE's classifiers use it.

    ``weight * mean_k KL(p_mean || p_k) + entropy_weight * H(p_mean)`` over the m noisy copies of an
    image, averaged over images; gradients flow through p_mean too.

    Args:
        logits: ``[B, m, K]``, m noisy copies of each of B images.
        weight: lambda, 2 in DMAE.
        entropy_weight: eta (the paper's mu), 0.5 in DMAE, 0.1 at sigma 1.
    """
    log_p = logits.log_softmax(-1)
    log_mean = log_p.logsumexp(1) - math.log(logits.shape[1])  # [B, K], without leaving log space
    mean = log_mean.exp()
    divergence = (mean[:, None] * (log_mean[:, None] - log_p)).sum(-1).mean()
    entropy = -(mean * log_mean).sum(-1).mean()
    return weight * divergence + entropy_weight * entropy
