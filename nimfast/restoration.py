# SPDX-License-Identifier: Apache-2.0
"""Reconstruction of an image from its noisy copy: noise, mask, autoencoder, pixels.

This is g(f(x + sigma * eps)) of De3 (You et al., 2023, Eq. 9). An autoencoder trained with norm_pix
predicts every patch standardised, so mean and variance must come from somewhere:

- ``input``: from the image before the noise, as the published code has it. Two numbers per patch
  then bypass noise and denoiser; under attack they carry the perturbation, and a gradient without
  noise. It is not the paper's Eq. 9.
- ``noisy``: from the noisy image. Noise adds sigma^2 to the variance, which is taken off again.
- ``none``: for an autoencoder that predicts pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nimfast.models.mae import MAE, removed_mask
from nimfast.models.patches import PatchModel, take
from nimfast.ops import corrupt
from nimfast.ops.corrupt import normalisation
from nimfast.ops.patches import patchify, unpatchify

Stats = Literal["input", "noisy", "none"]

_EPS = 1e-6  # inside the root, as in the loss these networks are trained with


def statistics(norm_pix: bool) -> tuple[Stats, ...]:
    """The modes that make sense for an autoencoder trained with or without norm_pix."""
    return ("input", "noisy") if norm_pix else ("none",)


def reconstruct(
    model: PatchModel,
    images: Tensor,
    keys: Tensor,
    sigma: float | Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    stats: Stats,
    keep: Tensor | None = None,
    samples: int = 1,
    first_sample: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Add noise, encode and decode, and come back to pixels; differentiable in `images`.

    Args:
        model: `MAE` or `SimMIM`.
        images: fp32 ``[B, C, H, W]`` in [0, 1].
        keys: one per image, from `image_keys`.
        sigma: noise level in pixel units, one number or fp32 ``[B]``.
        mean, std: the model's normalisation, one value per channel.
        stats: see the module's text.
        keep: kept patches, int64 ``[B * S, K]``; None keeps all.
        samples: S, noisy copies of each image.
        first_sample: which noise, see `corrupt`.
        dtype: of the model's input.

    Returns:
        fp32 ``[B * S, C, H, W]`` in pixel units, image-major, not clamped.
    """
    noisy = corrupt(
        images,
        keys,
        sigma,
        samples=samples,
        first_sample=first_sample,
        mean=mean,
        std=std,
        dtype=dtype,
    )
    prediction = predict(model, noisy, keep)
    if samples > 1:
        images = images.repeat_interleave(samples, 0)
        if isinstance(sigma, Tensor) and sigma.ndim:
            sigma = sigma.repeat_interleave(samples)
    return restore(prediction, noisy, images, sigma, mean=mean, std=std, stats=stats)


def predict(model: PatchModel, noisy: Tensor, keep: Tensor | None = None) -> Tensor:
    """Normalised images ``[B, C, H, W]`` -> predicted patch rows ``[B, L', P*P*C]``.

    Patches not in `keep` are left out (`MAE`) or replaced by the mask token (`SimMIM`).
    """
    rows = model.rows(noisy)
    if isinstance(model, MAE):
        shown, hidden = take(rows, keep), keep
    else:
        shown = rows
        hidden = None if keep is None else removed_mask(keep, rows.shape[1])
    prediction: Tensor = model(shown, hidden)
    return prediction


def restore(
    prediction: Tensor,
    noisy: Tensor,
    images: Tensor,
    sigma: float | Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    stats: Stats,
) -> Tensor:
    """Predicted patch rows -> pixels, the last step of `reconstruct`.

    Args:
        prediction: ``[B, L', P*P*C]``.
        noisy: what the model saw, normalised, ``[B, C, H, W]``.
        images, sigma, mean, std, stats: see `reconstruct`, for these B rows.

    Returns:
        fp32 ``[B, C, H, W]`` in pixel units, not clamped.
    """
    height, width = images.shape[2:]
    rows = prediction.float()
    patch = round((height * width / rows.shape[1]) ** 0.5)
    values = normalisation(tuple(mean), tuple(std), images.device)
    channel_mean, channel_std = (value.view(-1, 1, 1) for value in values[2:])
    if stats == "input":
        clean = patchify((images - channel_mean) / channel_std, patch)
        variance, average = torch.var_mean(clean, -1, keepdim=True)
        rows = rows * (variance + _EPS).sqrt() + average
    elif stats == "noisy":
        variance, average = torch.var_mean(patchify(noisy.float(), patch), -1, keepdim=True)
        # A row holds every channel equally often, each with noise of sigma / std.
        level = torch.as_tensor(sigma, dtype=rows.dtype, device=rows.device).view(-1, 1, 1)
        added = level.square() * channel_std.square().reciprocal().mean()
        # In a flat patch the estimate may fall below zero.
        rows = rows * ((variance - added).clamp(min=0) + _EPS).sqrt() + average
    return unpatchify(rows, patch, (height, width)) * channel_std + channel_mean


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, ``[B]``: 10 log10(1 / mean squared error).

    Args:
        images, others: ``[B, C, H, W]`` in pixel units, where the peak is 1.
    """
    error = (images - others).double().square().flatten(1).mean(1)
    return -10 * error.log10()
