# SPDX-License-Identifier: Apache-2.0
"""What a classifier gets to see of an image: noise, a denoiser, mixing and size, in which order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nimfast.corruption import Corruption, SigmaLaw
from nimfast.data.base import ImageDataset
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, weights_hash
from nimfast.models.load import load_autoencoder
from nimfast.models.patches import PatchModel
from nimfast.ops import Stream, corrupt, image_keys
from nimfast.ops.corrupt import normalisation
from nimfast.restoration import Stats, reconstruct, statistics
from nimfast.runtime import DTYPES
from train.cpu import speed_up
from train.feed import Batch
from train.mixing import Mix, Mixing, one_hot
from train.settings import Settings

_Autocast = Callable[[], Any]
_NO_MIXING = Mixing()


class Denoiser:
    """A frozen autoencoder, as De3 uses it: noise, reconstruction, clamp to [0, 1].

    Args:
        path: its file.
        stats: where a patch's mean and variance come from; None: the honest choice, see
            `nimfast.restoration`.
        data: whose images it must take.

    Raises:
        UserError: no file with encoder and decoder, statistics that do not go with it, or an
            autoencoder of other images.
    """

    def __init__(self, path: Path, stats: Stats | None, data: ImageDataset) -> None:
        self.path = path
        model, self.header = load_autoencoder(path)
        self.model: PatchModel = model.requires_grad_(False)
        standardised = self.header.get("settings", {}).get("norm_pix")
        if standardised is None and stats is None:
            raise UserError(f"{path} does not hold its training's settings; give --stats")
        modes = statistics(bool(standardised))
        if stats is not None and standardised is not None and stats not in modes:
            raise UserError(f"--stats {stats} does not go with {path}; choose {' or '.join(modes)}")
        self.stats: Stats = stats or modes[-1]
        arch = model.arch
        if (arch.channels, *arch.image_size) != data.shape:
            takes = "x".join(map(str, (arch.channels, *arch.image_size)))
            raise UserError(f"--denoiser {path} takes {takes} images; choose such --data")

    def __call__(
        self,
        images: Tensor,
        keys: Tensor,
        sigma: float | Tensor,
        samples: int,
        first: int,
        autocast: _Autocast,
    ) -> Tensor:
        """Samples ``[B * S, C, H, W]`` in [0, 1] of images ``[B, C, H, W]``, image-major."""
        with torch.no_grad(), autocast():
            pixels = reconstruct(
                self.model,
                images,
                keys,
                sigma,
                mean=self.header["mean"],
                std=self.header["std"],
                stats=self.stats,
                samples=samples,
                first_sample=first,
            )
        return pixels.clamp(0, 1)

    def entries(self) -> Header:
        """For the classifier's header: which autoencoder it was made for."""
        return {
            "path": str(self.path),
            "weights_hash": weights_hash(self.model),
            "stats": self.stats,
        }


class Inputs:
    """From batches of clean images to batches for the classifier.

    DMAE mixes after the noise; NIM mixes, adds noise, denoises and clamps.

    Args:
        settings: noise law, normalisation, size, seed.
        data: training images.
        copies: m, noisy copies of each image.
        mixing: mixup and CutMix.
        denoiser: through which noisy images go first; None: none.
        level: noise of `samples` in pixel units; None: the mean of the law.
        patch: of the classifier. Where nothing needs pixels between noise and classifier, training
            draws its patch rows, in the type of its products; None: always images.

    Raises:
        UserError: copies or a denoiser without noise, a level that is not positive.
    """

    def __init__(
        self,
        settings: Settings,
        data: ImageDataset,
        *,
        copies: int = 1,
        mixing: Mixing = _NO_MIXING,
        denoiser: Denoiser | None = None,
        level: float | None = None,
        patch: int | None = None,
    ) -> None:
        s = self.settings = settings
        self.copies, self.mixing, self.denoiser = copies, mixing, denoiser
        self.classes = len(data.classes)
        self.data_size, self.size = data.shape[1:], s.image_shape(data)[1:]
        self.law = SigmaLaw.parse(s.sigma)
        self.noise = self.law.mean > 0
        if copies > 1 and not self.noise:
            raise UserError(f"--copies {copies} without noise are equal; give --copies 1")
        if denoiser and not self.noise:
            raise UserError("--denoise needs noise to take away; give --sigma")
        self.level = self.law.mean if level is None else level
        if self.noise and not self.level > 0:
            raise UserError(f"--validation-sigma must be positive, not {self.level}")
        mixed = mixing.on and mixing.mix_order == "after"
        self.patch = None if denoiser or mixed or s.enlarge else patch
        self.corruption = Corruption(self.law, 0.0, s.seed, s.mean, s.std, s.enlarge)

    def to(self, device: torch.device) -> None:
        """Move the denoiser to the run's device."""
        if self.denoiser:
            speed_up(self.denoiser.model.to(device), device, self.settings.precision)

    def entries(self) -> Header:
        """For the checkpoint's header."""
        if self.denoiser:  # noise that the classifier itself never sees
            return {"denoiser": self.denoiser.entries()}
        return {"sigma": self.law.mean} if self.noise else {}

    def __call__(
        self, batch: Batch, epoch: int, step: int, autocast: _Autocast
    ) -> tuple[Tensor, Tensor]:
        """What the classifier is trained on.

        Returns:
            Normalised images ``[B * m, C, H, W]``, or rows of their patches, copies of one image
            next to each other, and the probabilities of the classes ``[B, K]``.
        """
        images, targets, mix = self._mixed(batch, epoch, step)
        shown = self.noisy(images, batch.indices, epoch, autocast)
        if mix is not None and self.mixing.mix_order == "after":
            shown = mix.images(shown, self.copies)
        return shown, targets

    def mixed(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, H, W]`` in [0, 1], mixed, and probabilities of the classes ``[B, K]``."""
        return self._mixed(batch, epoch, step)[:2]

    def _mixed(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor, Mix | None]:
        images, labels, indices = batch
        targets = one_hot(labels, self.classes)
        before = self.mixing.mix_order == "before"
        size = self.data_size if before else self.size
        mix = self.mixing.draw(self.settings.seed, step, indices, epoch, size)
        if mix is not None:
            targets = mix.targets(targets)
            images = mix.images(images) if before else images
        return images, targets, mix

    def noisy(
        self, images: Tensor, indices: Tensor, epoch: int, autocast: _Autocast = nullcontext
    ) -> Tensor:
        """Images under the noise of training, denoised where that is asked for.

        Args:
            images: ``[B, C, H, W]`` in [0, 1].
            indices: their places in the data, int64 ``[B]``.
            epoch: which noise.
            autocast: of the denoiser.

        Returns:
            Normalised images ``[B * m, C, H, W]``, or rows of their patches ``[B * m, L, p*p*C]``;
            without noise the images, normalised.
        """
        if not self.noise:
            return self.clean(images)
        if self.patch:
            dtype = DTYPES[self.settings.precision]
            drawn = self.corruption(
                images, indices, epoch, self.patch, copies=self.copies, dtype=dtype
            )
            return drawn.rows
        if self.denoiser is None:
            return self.corruption.noisy(images, indices, epoch, copies=self.copies)
        keys = image_keys(self.settings.seed, Stream.TRAINING, indices)
        sigma = self.law.draw(self.settings.seed, indices, epoch)
        first = epoch * self.copies
        return self.clean(self.denoiser(images, keys, sigma, self.copies, first, autocast))

    def clean(self, images: Tensor) -> Tensor:
        """Images as they are, normalised and at the network's size."""
        mean, std = (value.view(-1, 1, 1) for value in self._scales(images.device))
        return self.corruption.enlarged((images - mean) / std)

    def samples(
        self, images: Tensor, indices: Tensor, count: int, first: int, autocast: _Autocast
    ) -> Tensor:
        """Samples `first` to ``first + count - 1`` under the noise of evaluation."""
        s = self.settings
        keys = image_keys(s.seed, Stream.EVALUATION, indices)
        if self.denoiser:
            pixels = self.denoiser(images, keys, self.level, count, first, autocast)
            return self.clean(pixels)
        noisy = corrupt(
            images, keys, self.level, samples=count, first_sample=first, mean=s.mean, std=s.std
        )
        return self.corruption.enlarged(noisy)

    def _scales(self, device: torch.device) -> tuple[Tensor, ...]:
        return normalisation(self.settings.mean, self.settings.std, device)[2:]
