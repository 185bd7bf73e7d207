# SPDX-License-Identifier: Apache-2.0
"""Noise and mask as one small object: how a clean batch becomes a network's input.

Every draw depends on the seed, what it is for, the image's index in its data set and the number of
the sample, and on nothing else: batches are the same in any order, with any number of workers, and
after a restart. Noise comes from the stream TRAINING; masks, noise levels and what else training
draws come from the stream MASK, told apart by a `Purpose`.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nimfast.errors import UserError
from nimfast.ops import (
    Masks,
    Stream,
    corrupt,
    corrupt_patches,
    image_keys,
    random_bits,
    random_masks,
)
from nimfast.ops.patches import patchify

Kind = Literal["fixed", "uniform", "gamma"]
_NUMBER = r"[0-9]*\.?[0-9]+(?:e-?[0-9]+)?"
_SPEC = re.compile(rf"(?:({'|'.join(get_args(Kind))})\()?({_NUMBER})(?:,({_NUMBER}))?(\))?(/255)?")


class Purpose(IntEnum):
    """What a draw from the stream MASK is for."""

    MASK = 0
    SIGMA = 1
    AUGMENTATION = 2
    ORDER = 3
    CROP = 4
    SPLIT = 5
    COLOUR = 6
    MIX = 7
    ATTACK = 8


def uniform(seed: int, purpose: Purpose, indices: Tensor, count: int, sample: int) -> Tensor:
    """Uniform draws in (0, 1): fp64 ``[B, count]``, a function of the arguments alone.

    Args:
        indices: places of the images in their data set, int64 ``[B]``.
        sample: number of the draw, usually the epoch.
    """
    bits = random_bits(draw_keys(seed, purpose, indices), count, first=sample * count)
    return (bits.double() + 0.5) * 2.0**-32


def draw_keys(seed: int, purpose: Purpose, indices: Tensor) -> Tensor:
    """Keys of what training draws for `purpose`, int64 ``[B]`` as `indices`."""
    # The purpose stands above any index a data set can have, so no two purposes share a key.
    return image_keys(seed, Stream.MASK, indices + (int(purpose) << 48))


@dataclass(frozen=True)
class SigmaLaw:
    """Law of the noise's standard deviation, one value per image, in pixel units [0, 1].

    Attributes:
        kind: ``fixed``, ``uniform`` or ``gamma``.
        first: the value; the lower end; the shape.
        second: unused; the upper end; the scale.
    """

    kind: Kind
    first: float
    second: float = 0.0

    @staticmethod
    def parse(text: str) -> SigmaLaw:
        """``0.5``, ``uniform(0,0.75)``, ``gamma(25,3)``; with ``/255`` after it in units of 1/255.

        ``0`` is no noise at all, as in MAE.

        Raises:
            UserError: none of these, or a law without a spread.
        """
        match = _SPEC.fullmatch(text.replace(" ", ""))
        kind = (match[1] or "fixed") if match else "fixed"
        # A bracket opens with a name and must close; only the fixed law has one number.
        if not match or bool(match[1]) != bool(match[4]) or (kind == "fixed") == bool(match[3]):
            raise UserError(
                f"noise level {text!r} is not understood; "
                "give 0.5, 75/255, uniform(0,0.75) or gamma(25,3)/255"
            )
        unit = 255.0 if match[5] else 1.0
        first, second = float(match[2]), float(match[3] or 0)
        if kind == "gamma":  # the shape has no unit
            law = SigmaLaw("gamma", first, second / unit)
        else:
            law = SigmaLaw(kind, first / unit, second / unit)  # type: ignore[arg-type]
        if (kind == "gamma" and law.mean <= 0) or (kind == "uniform" and second <= first):
            raise UserError(f"noise level {text!r}: a range must grow, a gamma law be positive")
        given = second if kind == "uniform" else law.mean * unit
        warn_if_units_look_wrong(given, unit)
        return law

    @property
    def mean(self) -> float:
        """Mean standard deviation."""
        if self.kind == "fixed":
            return self.first
        if self.kind == "uniform":
            return (self.first + self.second) / 2
        return self.first * self.second

    def draw(self, seed: int, indices: Tensor, sample: int) -> Tensor:
        """Standard deviations of draw number `sample`: fp32 ``[B]``."""
        if self.kind == "fixed":
            return torch.full(indices.shape, self.first, device=indices.device)
        u = uniform(seed, Purpose.SIGMA, indices, 1, sample)[:, 0]
        if self.kind == "uniform":
            return (self.first + (self.second - self.first) * u).float()
        return (gamma_quantile(self.first, u) * self.second).float()


def gamma_quantile(shape: float, u: Tensor) -> Tensor:
    """Values below which a gamma law (scale 1) lies with probability `u`; fp64, as `u`.

    On the device and without waiting for it. Equals scipy's gammaincinv to 1e-9 for shapes from
    0.05 up and u in [2^-33, 1 - 2^-33] (tested).
    """
    a, upper = torch.full_like(u, shape), u > 0.5
    tail = torch.where(upper, 1 - u, u)
    # From Wilson and Hilferty's normal approximation, or below it by P(a, x) < x^a / a!, whichever
    # is larger; then Newton on the logarithm of the nearer tail as a function of y = log x, which
    # is close to a line. Four steps bring all to rounding; a fifth costs nothing to speak of.
    normal = 1 - 1 / (9 * shape) + torch.special.ndtri(u) / math.sqrt(9 * shape)
    y = torch.maximum(
        (u.log() + math.lgamma(shape + 1)) / shape,
        math.log(shape) + 3 * normal.clamp_min(1e-100).log(),
    )
    for _ in range(5):
        x = y.exp()
        found = torch.where(upper, torch.special.gammaincc(a, x), torch.special.gammainc(a, x))
        slope = torch.exp(shape * y - x - math.lgamma(shape)) / found
        step = (found / tail).log() / slope
        y = y + torch.where(upper, step, -step).clamp(-3, 3)
    return y.exp()


def warn_if_units_look_wrong(sigma: float, unit: float) -> None:
    """Warn of a noise level that makes more sense in the other unit; see `SigmaLaw.parse`.

    Args:
        sigma: the level as it was given.
        unit: 1 where it is in pixel units, 255 where in units of 1/255.
    """
    if unit == 1 and sigma > 2:
        read, other = f"{sigma:g} in pixel units", f"{sigma:g}/255 = {sigma / 255:.3g}"
    elif unit == 255 and 0 < sigma < 2:
        read, other = f"{sigma:g}/255 = {sigma / 255:.2g}", f"{sigma:g} in pixel units"
    else:
        return
    warnings.warn(
        f"sigma is read as {read} (pixels lie in [0, 1]); was {other} meant?", stacklevel=1
    )


@dataclass(frozen=True)
class Resize:
    """Bicubic enlargement after the noise, so that radii stay in pixels of the small image.

    Attributes:
        size: ``(H, W)`` of the result.
        antialias: as torchvision does by default now (kernel a = -0.5, wider where images shrink).
            The published runs had none (a = -0.75); outputs differ by up to 0.116.
    """

    size: tuple[int, int]
    antialias: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> ``[N, C, H, W]``; weights sum to 1, so normalisation commutes."""
        if tuple(images.shape[2:]) == self.size:
            return images
        return F.interpolate(images, self.size, mode="bicubic", antialias=self.antialias)


class Corrupted(NamedTuple):
    """A corrupted batch: S samples of each of B images, image-major.

    Attributes:
        rows: patch rows that are kept, normalised, ``[B*S, K, p*p*C]``; all L without a mask.
        keep: their places, int64 ``[B*S, K]``, in increasing order; None when nothing is masked.
        removed: bool ``[B*S, L]``, the other patches; None when nothing is masked.
    """

    rows: Tensor
    keep: Tensor | None
    removed: Tensor | None


@dataclass(frozen=True)
class Corruption:
    """Gaussian noise and random patch mask.

    Attributes:
        sigma: law of the noise level; the samples of an image share one.
        mask_ratio: share of the L patches that is removed; ``int(L * (1 - ratio))`` are kept.
        seed: of all draws.
        mean, std: normalisation applied after the noise, one value per channel.
        resize: applied to noisy images, before any mask (DMAE on CIFAR-10); None: none.
    """

    sigma: SigmaLaw
    mask_ratio: float
    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie in [0, 1), not {self.mask_ratio}")

    def __call__(
        self,
        images: Tensor,
        indices: Tensor,
        epoch: int,
        patch: int,
        *,
        copies: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Corrupted:
        """Corrupt a batch of clean images; noise is drawn for the patches that are kept only.

        A resize needs every pixel, so with one noise is drawn for all.

        Args:
            images: ``[B, C, H, W]`` fp32 in [0, 1].
            indices: their places in the data set, int64 ``[B]``, on the same device.
            epoch: pass over the data; the noise's sample numbers are ``epoch * copies + copy``.
            patch: side p of a patch in pixels.
            copies: samples S of each image.
            dtype: of the returned rows.
        """
        height, width = self.resize.size if self.resize else images.shape[2:]
        masks = self.masks(indices, epoch, copies, (height // patch) * (width // patch))
        keep, removed = (None, None) if masks is None else (masks.kept, masks.mask)
        if self.resize:
            rows = patchify(self.noisy(images, indices, epoch, copies=copies, dtype=dtype), patch)
            if keep is not None:
                rows = rows.gather(1, keep[..., None].expand(-1, -1, rows.shape[2]))
        else:
            noise = self._noise(indices, epoch, copies)
            rows = corrupt_patches(images, patch=patch, kept=keep, dtype=dtype, **noise)
        return Corrupted(rows, keep, removed)

    def noisy(
        self,
        images: Tensor,
        indices: Tensor,
        epoch: int,
        *,
        copies: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The same noise on whole images, without a mask: normalised ``[B*S, C, H, W]``."""
        return self.enlarged(corrupt(images, dtype=dtype, **self._noise(indices, epoch, copies)))

    def enlarged(self, images: Tensor) -> Tensor:
        """Images ``[N, C, h, w]`` at the size of the result."""
        return self.resize(images) if self.resize else images

    def masks(self, indices: Tensor, epoch: int, copies: int, patches: int) -> Masks | None:
        """Masks of the S samples of each image, as `random_masks` draws them; None without."""
        if self.mask_ratio == 0:
            return None
        kept = int(patches * (1 - self.mask_ratio))
        if kept < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} keeps none of {patches} patches")
        keys = draw_keys(self.seed, Purpose.MASK, indices)
        return random_masks(keys, patches, kept, samples=copies, first_sample=epoch * copies)

    def _noise(self, indices: Tensor, epoch: int, copies: int) -> dict[str, Any]:
        """What `corrupt` and `corrupt_patches` have to know of the noise."""
        return {
            "keys": image_keys(self.seed, Stream.TRAINING, indices),
            "sigma": self.sigma.draw(self.seed, indices, epoch),
            "samples": copies,
            "first_sample": epoch * copies,
            "mean": self.mean,
            "std": self.std,
        }
