# SPDX-License-Identifier: Apache-2.0
"""What a classifier gets to see of an image: noise, a denoiser, mixing and size, in which order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from train.feed import Batch
from train.mixing import one_hot

if TYPE_CHECKING:
    from train.finetune import Finetune

_Autocast = Callable[[], Any]


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
        settings: noise, copies, denoiser, mixing, size.
        data: training images.

    Raises:
        UserError: data of one class; see `Denoiser`.
    """

    def __init__(self, settings: Finetune, data: ImageDataset) -> None:
        s = self.settings = settings
        self.classes = len(data.classes)
        self.data_size, self.size = data.shape[1:], s.image_shape(data)[1:]
        self.law = SigmaLaw.parse(s.sigma)
        self.noise = self.law.mean > 0
        if s.copies > 1 and not self.noise:
            raise UserError(f"--copies {s.copies} without noise are equal; give --copies 1")
        if s.denoise and not self.noise:
            raise UserError("--denoise needs noise to take away; give --sigma")
        self.level = s.validation_sigma if s.validation_sigma is not None else self.law.mean
        if self.noise and not self.level > 0:
            raise UserError(f"--validation-sigma must be positive, not {self.level}")
        self.corruption = Corruption(self.law, 0.0, s.seed, s.mean, s.std, s.enlarge)
        self.denoiser: Denoiser | None = None
        if s.denoise:
            path = s.denoiser or s.init
            if path is None:
                raise UserError("--denoise needs an autoencoder: give --denoiser, or --init")
            self.denoiser = Denoiser(path, s.stats, data)

    def to(self, device: torch.device) -> None:
        """Move the denoiser to the run's device."""
        if self.denoiser:
            self.denoiser.model.to(device)

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
            Normalised images ``[B * m, C, H, W]``, copies of one image next to each other, and the
            probabilities of the classes ``[B, K]``.
        """
        s = self.settings
        images, labels, indices = batch
        targets = one_hot(labels, self.classes)
        before = s.mixing.mix_order == "before"
        size = self.data_size if before else self.size
        mix = s.mixing.draw(s.seed, step, indices, epoch, size)
        if mix is not None:
            targets = mix.targets(targets)
            if before:
                images = mix.images(images)
        if self.denoiser:
            keys = image_keys(s.seed, Stream.TRAINING, indices)
            sigma = self.law.draw(s.seed, indices, epoch)
            images = self.denoiser(images, keys, sigma, s.copies, epoch * s.copies, autocast)
            shown = self.clean(images)
        elif self.noise:
            shown = self.corruption.noisy(images, indices, epoch, copies=s.copies)
        else:
            shown = self.clean(images)
        if mix is not None and not before:
            shown = mix.images(shown, s.copies)
        return shown, targets

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
