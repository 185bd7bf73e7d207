# SPDX-License-Identifier: Apache-2.0
"""An autoencoder as it was trained, and what it makes of a batch of noisy images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nimfast.corruption import Corruption, SigmaLaw
from nimfast.models.patches import PatchModel
from nimfast.ops import Stream, corrupt, image_keys, recon_loss
from nimfast.ops.patches import patchify
from nimfast.restoration import Stats, predict, psnr, restore


class Subject(NamedTuple):
    """An autoencoder, how it was trained, and how it is looked at.

    Attributes:
        model: on its device, in its precision.
        mean, std: its normalisation.
        norm_pix, p, removed_only: its loss.
        law: noise of its training; None where that is not known.
        modes: statistics to reconstruct with.
        mask_ratio, unit: its mask, and the side in pixels of what is masked at once.
        device, dtype: of its input.
        seed: of noise and masks.
    """

    model: PatchModel
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm_pix: bool
    p: int
    removed_only: bool
    law: SigmaLaw | None
    modes: tuple[Stats, ...]
    mask_ratio: float
    unit: int
    device: torch.device
    dtype: torch.dtype
    seed: int


class Outcome(NamedTuple):
    """A batch of B images, corrupted and reconstructed.

    Attributes:
        shown: what the model saw, ``[B, C, H, W]`` in pixel units; removed patches are grey.
        pictures: by mode, the reconstruction, clamped to [0, 1].
        loss: that of the model's training, for each image.
        psnr: by name (`nimfast.report.reconstruction.LABELS`), in dB, for each image.
    """

    shown: Tensor
    pictures: dict[Stats, Tensor]
    loss: list[float]
    psnr: dict[str, list[float]]


@torch.inference_mode()
def look(subject: Subject, images: Tensor, indices: Tensor, sigma: float) -> Outcome:
    """Corrupt and reconstruct a batch.

    Args:
        subject: see there.
        images: fp32 ``[B, C, H, W]`` in [0, 1].
        indices: their places in the data, int64 ``[B]``; with the seed they decide noise and mask.
        sigma: noise level in pixel units.
    """
    images, indices = images.to(subject.device), indices.to(subject.device)
    mean, std = subject.mean, subject.std
    keys = image_keys(subject.seed, Stream.EVALUATION, indices)
    noisy = corrupt(images, keys, sigma, mean=mean, std=std, dtype=subject.dtype)
    removed = _removed(subject, indices)  # bool [B, H, W]
    model, keep, counted = subject.model, None, None
    if removed is not None:
        inside = patchify(removed[:, None], model.arch.patch)[..., 0]  # [B, L]
        keep = (~inside).nonzero()[:, 1].view(len(images), -1)
        if subject.removed_only:
            counted = patchify(removed[:, None], model.predicted_patch)[..., 0]
    prediction = predict(model, noisy, keep).float()
    loss = [  # one by one: the operation gives the mean of what it gets
        recon_loss(
            prediction[i : i + 1],
            images[i : i + 1],
            patch=model.predicted_patch,
            norm_pix=subject.norm_pix,
            p=subject.p,
            mask=None if counted is None else counted[i : i + 1],
            mean=mean,
            std=std,
        )
        for i in range(len(images))
    ]
    shown = corrupt(images, keys, sigma)
    found = {"noisy": shown, "noisy_clamped": shown.clamp(0, 1)}
    pictures: dict[Stats, Tensor] = {}
    for mode in subject.modes:
        pixels = restore(prediction, noisy, images, sigma, mean=mean, std=std, stats=mode)
        # Clamped, as a classifier behind it would get it.
        found[f"stats_{mode}"] = pictures[mode] = pixels.clamp(0, 1)
    if removed is not None:
        shown = torch.where(removed[:, None], 0.5, shown)
    measured = {name: psnr(images, other).tolist() for name, other in found.items()}
    return Outcome(shown, pictures, torch.stack(loss).tolist(), measured)


def _removed(subject: Subject, indices: Tensor) -> Tensor | None:
    """Which pixels the model does not see, bool ``[B, H, W]``; None: it sees all."""
    if not subject.mask_ratio:
        return None
    height, width = subject.model.arch.image_size
    rows, columns = height // subject.unit, width // subject.unit
    law = SigmaLaw("fixed", 0.0)
    mask = Corruption(law, subject.mask_ratio, subject.seed, subject.mean, subject.std)
    masks = mask.masks(indices, 0, 1, rows * columns)
    assert masks is not None
    units = masks.mask.view(-1, rows, columns)
    return units.repeat_interleave(subject.unit, 1).repeat_interleave(subject.unit, 2)
