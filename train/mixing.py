# SPDX-License-Identifier: Apache-2.0
"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of neighbours in a batch.

The law is timm's, but images 2i and 2i + 1 are mixed with each other, and draws are keyed by the
step or by the image: a batch comes out the same however many processes and parts it is cut into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from nimfast.corruption import Purpose, uniform
from nimfast.errors import UserError


@dataclass(frozen=True)
class Mixing:
    """What is mixed, how often, and where that stands relative to the noise."""

    mixup: float = 0.0
    """alpha of mixup: the images' shares are Beta(alpha, alpha); 0: none"""
    cutmix: float = 0.0
    """alpha of CutMix: a rectangle of the neighbour's; 0: none"""
    mix_probability: float = 1.0
    """how often anything is mixed"""
    mix_switch: float = 0.5
    """how often CutMix, where both are on"""
    mix_mode: Literal["batch", "elem"] = "batch"
    """one draw for the batch, or one for each image"""
    mix_order: Literal["after", "before"] = "after"
    """after the noise, whose deviation then shrinks (DMAE), or before it (NIM)"""

    @property
    def on(self) -> bool:
        """Whether anything is ever mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0

    def check(self) -> None:
        """Raise `UserError` for what cannot be used."""
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, not {getattr(self, name)}")
        for name in ("mix_probability", "mix_switch"):
            if not 0 <= getattr(self, name) <= 1:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} is a probability, in [0, 1], not {getattr(self, name)}")

    def draw(
        self, seed: int, step: int, indices: Tensor, epoch: int, size: tuple[int, int]
    ) -> Mix | None:
        """How a batch is mixed; None: not at all.

        Args:
            seed: of the run.
            step: number of the step, which keys the draws of mode ``batch``.
            indices: places of the images in the data, which key those of ``elem``, int64 ``[B]``.
            epoch: of the step.
            size: ``(H, W)`` of the images.
        """
        if not self.on:
            return None
        if len(indices) % 2:
            raise UserError(
                f"mixing pairs images, but {len(indices)} are handled at once; give an even "
                "--batch-size and --micro-batch"
            )
        if self.mix_mode == "batch":
            u = uniform(seed, Purpose.MIX, torch.tensor([step]), 5, 0)
        else:
            u = uniform(seed, Purpose.MIX, indices.cpu(), 5, epoch)
        mixed, which, share, down, across = u.numpy().T
        apply = mixed < self.mix_probability
        switch = self.mix_switch if self.mixup else 1.0
        cut = apply & (which < switch) if self.cutmix else np.zeros_like(apply)
        if not apply.any():
            return None
        alpha = np.where(cut, self.cutmix or 1.0, self.mixup or 1.0)
        own = np.where(apply, betaincinv(alpha, alpha, share), 1.0)
        height, width = size
        extent = np.where(cut, np.sqrt(1 - own), 0.0)
        top, bottom = _interval(extent, down, height)
        left, right = _interval(extent, across, width)
        area = (bottom - top) * (right - left) / (height * width)
        own = np.where(cut, 1 - area, own)
        box = [torch.from_numpy(side).view(-1, 1, 1) for side in (top, bottom, left, right)]
        y, x = torch.arange(height)[:, None], torch.arange(width)
        inside = (y >= box[0]) & (y < box[1]) & (x >= box[2]) & (x < box[3])  # [N, H, W]
        share_, cut_ = (torch.from_numpy(value).view(-1, 1, 1) for value in (own, cut))
        weight = torch.where(cut_, (~inside).double(), share_).float()
        if not cut.any():
            weight = weight[:, :1, :1]
        return Mix(weight.to(indices.device), share_.view(-1, 1).float().to(indices.device))


def _interval(extent: np.ndarray, place: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends of a stretch of `extent` (share) of `length` about a uniform centre, cut off outside."""
    half = (extent * length).astype(np.int64) // 2
    centre = (place * length).astype(np.int64)
    return np.clip(centre - half, 0, length), np.clip(centre + half, 0, length)


class Mix(NamedTuple):
    """How images 2i and 2i + 1 of a batch are mixed.

    Attributes:
        weight: of an image's own pixels, ``[N, 1 or H, 1 or W]``; N is 1 or the batch size.
        share: of its own label, ``[N, 1]``.
    """

    weight: Tensor
    share: Tensor

    def images(self, values: Tensor, copies: int = 1) -> Tensor:
        """Mix ``[B * m, C, H, W]``, copy by copy."""
        grouped = values.view(-1, copies, *values.shape[1:])
        weight = self.weight[:, None, None].to(values.dtype)
        return torch.lerp(_swapped(grouped), grouped, weight).view_as(values)

    def targets(self, probabilities: Tensor) -> Tensor:
        """Mix the labels, probabilities ``[B, K]``."""
        return torch.lerp(_swapped(probabilities), probabilities, self.share)


def _swapped(values: Tensor) -> Tensor:
    """Every image's neighbour: 1 0 3 2 ..."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).view_as(values)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels ``[B]`` -> probabilities ``[B, K]``."""
    return F.one_hot(labels, classes).float()
