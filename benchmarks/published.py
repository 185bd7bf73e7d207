# SPDX-License-Identifier: Apache-2.0
"""What published code runs, written out plainly: the other side of every ratio.

Certification as the smoothing papers describe and as their released scripts do it: the image is
repeated, noise drawn and added in fp32, votes are counted on the host, 1,000 samples at a time.
"""

import math

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


def random_masking(batch: int, patches: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's masks: uniform draws are ranked, and the ranking ranked again to undo it."""
    shuffle = torch.rand(batch, patches).argsort(1)
    restore = shuffle.argsort(1)
    mask = torch.ones_like(restore, dtype=torch.float32)
    mask[:, :kept] = 0
    return shuffle[:, :kept], restore, mask.gather(1, restore)


def unit_masking(batch: int, side: int, unit: int, ratio: float) -> Tensor:
    """SimMIM's masks: a permutation of the units of each image, in the data loader."""
    units = side // unit
    masked = math.ceil(ratio * units**2)
    masks = np.zeros((batch, units**2), dtype=int)
    for mask in masks:
        mask[np.random.permutation(units**2)[:masked]] = 1
    square = masks.reshape(batch, units, units)
    return torch.from_numpy(square.repeat(unit, 1).repeat(unit, 2).reshape(batch, -1))


def mask_tokens(tokens: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """SimMIM's input: tokens [N, L, D] and the mask token [1, 1, D], blended by a mask [N, L]."""
    filled = mask_token.expand(*tokens.shape[:2], -1)
    weight = mask[..., None].type_as(filled)
    return tokens * (1 - weight) + filled * weight
