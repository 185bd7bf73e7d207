# SPDX-License-Identifier: Apache-2.0
"""Losses: reconstruction of patches, and of classifiers that are trained to be smoothed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nimfast.ops import recon_loss

Region = Literal["all", "removed"]


@dataclass(frozen=True)
class Reconstruction:
    """Mean of ``|prediction - target|^p`` over the predicted patches.

    Attributes:
        patch: side P of the predicted patches in pixels.
        norm_pix: the target is each patch standardised by its own mean and (unbiased) variance (He
            et al., 2022, section 4.1), else the normalised pixels.
        p: 2 (MAE, DMAE) or 1 (SimMIM).
        region: ``all`` patches (NIM, DMAE) or the ``removed`` ones (MAE, SimMIM).
        mean, std: normalisation, one value per channel.
    """

    patch: int
    norm_pix: bool
    p: int
    region: Region
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, prediction: Tensor, images: Tensor, hidden: Tensor | None) -> Tensor:
        """Scalar fp32.

        Args:
            prediction: patch rows ``[B, L', P*P*C]``.
            images: the clean images, ``[B, C, H, W]`` in [0, 1].
            hidden: patches that were masked, bool ``[B, L']``.
        """
        return recon_loss(
            prediction,
            images,
            patch=self.patch,
            norm_pix=self.norm_pix,
            p=self.p,
            mask=hidden if self.region == "removed" else None,
            mean=self.mean,
            std=self.std,
        )


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
