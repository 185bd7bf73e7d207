# SPDX-License-Identifier: Apache-2.0
"""The loops that published code runs, written out plainly: the other side of every ratio.

Certification as the smoothing papers describe and as their released scripts do it: the image is
repeated, noise drawn and added in fp32, votes are counted on the host, 1,000 samples at a time.
"""

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

BATCH = 1000


def corrupt(image: Tensor, sigma: float, samples: int) -> Tensor:
    """Noisy copies [S, C, H, W] of one image [C, H, W]."""
    batch = image.repeat((samples, 1, 1, 1))
    noise = torch.randn_like(batch) * sigma
    return batch + noise


def corrupt_and_normalise(
    image: Tensor, sigma: float, samples: int, mean: Tensor, std: Tensor
) -> Tensor:
    """The same, and the classifier's first layer: mean and std are [C, 1, 1]."""
    return (corrupt(image, sigma, samples) - mean) / std


def votes(logits: Tensor, num_classes: int) -> np.ndarray:
    """Votes of a batch of logits [N, K], counted on the host."""
    counts = np.zeros(num_classes, dtype=int)
    for index in logits.argmax(1).cpu().numpy():
        counts[index] += 1
    return counts


def recon_loss(
    prediction: Tensor,
    images: Tensor,
    patch: int,
    norm_pix: bool,
    mask: Tensor | None,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Masked autoencoder loss of [N, L, p * p * C] on images [N, C, H, W] in [0, 1].

    mask is float32 [N, L], 1 where a patch counts; mean and std are [C, 1, 1].
    """
    count, channels, height, width = images.shape
    normalised = (images - mean) / std
    grid = normalised.reshape(count, channels, height // patch, patch, width // patch, patch)
    target = torch.einsum("nchpwq->nhwpqc", grid).reshape(count, -1, patch**2 * channels)
    if norm_pix:
        average = target.mean(dim=-1, keepdim=True)
        variance = target.var(dim=-1, keepdim=True)
        target = (target - average) / (variance + 1.0e-6) ** 0.5
    loss = ((prediction - target) ** 2).mean(dim=-1)
    return loss.mean() if mask is None else (loss * mask).sum() / mask.sum()


@torch.no_grad()
def sample_noise(
    model: nn.Module, image: Tensor, sigma: float, n: int, num_classes: int
) -> np.ndarray:
    """Votes of n noisy copies, batch by batch."""
    counts = np.zeros(num_classes, dtype=int)
    while n > 0:
        size = min(BATCH, n)
        n -= size
        counts += votes(model(corrupt(image, sigma, size)), num_classes)
    return counts


def certify(
    model: nn.Module, image: Tensor, sigma: float, n0: int, n: int, alpha: float, num_classes: int
) -> tuple[int, float]:
    """CERTIFY (Cohen et al., 2019): class and radius, or (-1, 0) to abstain."""
    top = int(sample_noise(model, image, sigma, n0, num_classes).argmax())
    count = int(sample_noise(model, image, sigma, n, num_classes)[top])
    lower = stats.beta.ppf(alpha, count, n - count + 1) if count else 0.0
    return (-1, 0.0) if lower < 0.5 else (top, sigma * float(stats.norm.ppf(lower)))
