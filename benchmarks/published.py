# SPDX-License-Identifier: Apache-2.0
"""What published code runs, written out plainly: the other side of every ratio.

Certification as the smoothing papers describe and as their released scripts do it: the image is
repeated, noise drawn and added in fp32, votes are counted on the host, 1,000 samples at a time.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from nimfast.models import MAE

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


def corrupt_patches(
    images: Tensor, sigma: float, patch: int, kept: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    """Denoising masked pretraining: noise on all of the images [N, C, H, W], patches gathered last.

    kept is [N, K], mean and std are [C, 1, 1]; the result is [N, K, p * p * C].
    """
    noisy = images + torch.randn_like(images) * sigma
    normalised = (noisy - mean) / std
    count, channels, height, width = images.shape
    grid = normalised.reshape(count, channels, height // patch, patch, width // patch, patch)
    rows = torch.einsum("nchpwq->nhwpqc", grid).reshape(count, -1, patch**2 * channels)
    return torch.gather(rows, 1, kept[:, :, None].repeat(1, 1, rows.shape[2]))


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


def ascend_linf(
    x: Tensor, origin: Tensor, gradient: Tensor, step: Tensor, eps: float, previous: Tensor | None
) -> Tensor:
    """One l_inf step of PGD, or of APGD with momentum 0.75; step [N, 1, 1, 1]."""

    def project(y: Tensor) -> Tensor:
        return torch.clamp(torch.min(torch.max(y, origin - eps), origin + eps), 0.0, 1.0)

    z = project(x + step * torch.sign(gradient))
    return z if previous is None else project(x + (z - x) * 0.75 + (x - previous) * 0.25)


def ascend_l2(
    x: Tensor, origin: Tensor, gradient: Tensor, step: Tensor, eps: float, previous: Tensor | None
) -> Tensor:
    """The same in l2."""

    def norm(y: Tensor) -> Tensor:
        return (y**2).sum(dim=(1, 2, 3), keepdim=True).sqrt()

    def project(y: Tensor) -> Tensor:
        away = y - origin
        length = norm(away)
        radius = torch.min(eps * torch.ones_like(length), length)
        return torch.clamp(origin + away / (length + 1e-12) * radius, 0.0, 1.0)

    z = project(x + step * gradient / (norm(gradient) + 1e-12))
    return z if previous is None else project(x + (z - x) * 0.75 + (x - previous) * 0.25)


def vote_loss(logits: Tensor, labels: Tensor, samples: int, loss: str) -> tuple[Tensor, Tensor]:
    """Mean loss [N] and misclassified draws [N] of logits [N * S, K], for autograd."""
    y = labels.repeat_interleave(samples)
    row = torch.arange(len(logits), device=logits.device)
    if loss == "ce":
        value = nn.functional.cross_entropy(logits, y, reduction="none")
    else:
        ordered, classes = logits.sort(dim=1)
        top = (classes[:, -1] == y).float()
        rival = ordered[:, -2] * top + ordered[:, -1] * (1.0 - top)
        value = -(logits[row, y] - rival) / (ordered[:, -1] - ordered[:, -3] + 1e-12)
    missed = logits.argmax(1) != y
    return value.view(-1, samples).mean(1), missed.view(-1, samples).sum(1)


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


def pretraining_loss(
    model: MAE,
    images: Tensor,
    sigma: Tensor,
    ratio: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Loss of a denoising masked autoencoder: all patches are embedded, then most are dropped.

    `model` is our MAE, whose layers are called as the published one calls its own; sigma is [N].
    """
    m, s = (images.new_tensor(value).view(-1, 1, 1) for value in (mean, std))
    noisy = images + torch.randn_like(images) * sigma.view(-1, 1, 1, 1)
    rows = model.rows((noisy - m) / s)
    tokens = model.patch_embed(rows) + model.positions[1:]
    restore = None
    if ratio:
        kept = int(tokens.shape[1] * (1 - ratio))
        shuffle = torch.rand(tokens.shape[:2], device=images.device).argsort(1)
        restore = shuffle.argsort(1)
        places = shuffle[:, :kept, None].repeat(1, 1, tokens.shape[2])
        tokens = tokens.gather(1, places)
    assert model.cls_token is not None
    start = (model.cls_token + model.positions[:1]).expand(len(tokens), -1, -1)
    tokens = torch.cat([start, tokens], 1)
    for layer in model.blocks:
        tokens = layer(tokens)
    tokens = model.decoder_embed(model.norm(tokens))
    if restore is not None:
        missing = restore.shape[1] - kept
        empty = model.mask_token.repeat(len(tokens), missing, 1).to(tokens.dtype)
        patches = torch.cat([tokens[:, 1:], empty], 1)
        patches = patches.gather(1, restore[:, :, None].repeat(1, 1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], patches], 1)
    tokens = tokens + model.decoder_positions
    for layer in model.decoder_blocks:
        tokens = layer(tokens)
    prediction = model.decoder_pred(model.decoder_norm(tokens))[:, 1:]
    return recon_loss(prediction, images, model.arch.patch, True, None, m, s)


def consistency_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    sigma: float,
    copies: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Cross-entropy and consistency of noisy copies, each made of a repeated batch, by soft labels.

    `model` is our ViT, which takes normalised images as the published one makes them inside.
    """
    m, s = (images.new_tensor(value).view(-1, 1, 1) for value in (mean, std))
    repeated = torch.cat([images + torch.randn_like(images) * sigma for _ in range(copies)])
    logits = model((repeated - m) / s)
    loss = nn.functional.cross_entropy(logits, labels.repeat(copies))
    chunks = [chunk.softmax(1) for chunk in logits.chunk(copies)]
    average = sum(chunks[1:], chunks[0]) / copies
    divergences = [
        nn.functional.kl_div(chunk.clamp(min=1e-20).log(), average, reduction="none").sum(1)
        for chunk in chunks
    ]
    divergence = sum(divergences[1:], divergences[0]) / copies
    entropy = -(average * average.clamp(min=1e-20).log()).sum(1)
    total: Tensor = loss + 2.0 * divergence.mean() + 0.5 * entropy.mean()
    return total
