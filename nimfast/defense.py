# SPDX-License-Identifier: Apache-2.0
"""Defences by reconstruction: corrupt the image, let an autoencoder undo it, classify the result.

`De3` adds noise (You et al., 2023, Eq. 9): y = c(clamp(g(f(x + sigma * eps)))), fresh noise at
every call. `DeMask` removes patches instead, as that paper's comparison with MAE does.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nimfast.corruption import warn_if_units_look_wrong
from nimfast.models.checkpoint import weights_hash
from nimfast.models.load import Classifier
from nimfast.models.mae import MAE
from nimfast.models.patches import PatchModel
from nimfast.models.simmim import SimMIM
from nimfast.models.vit import ViT
from nimfast.ops import Stream, image_keys, unit_masks
from nimfast.ops.corrupt import Normalisation, normalisation
from nimfast.restoration import Stats, reconstruct, reconstruct_rows

Combine = Literal["mean", "vote"]


class Reconstructing(nn.Module):
    """What `De3` and `DeMask` share: a random reconstruction, clamped to [0, 1], then classified.

    Frozen and in eval mode, also after ``train()``; differentiable with respect to the images.

    Args:
        denoiser: `MAE` or `SimMIM`: an autoencoder, with its decoder.
        classifier: any module from images ``[N, C, H, W]`` in [0, 1] to logits.
        stats: where a patch's mean and variance come from, see `nimfast.restoration`.
        mean, std: the denoiser's normalisation, one value per channel.
        draws: random reconstructions that are combined into one answer.
        combine: of several draws; ``mean`` is the logarithm of the mean probabilities, ``vote``
            the share of the draws whose largest logit the class is. The gradient of a vote is that
            of the mean probabilities: an attack should not meet a staircase.
        seed: of the fresh draws of `forward`; None: torch's own generator.

    Raises:
        TypeError: an encoder without a decoder, or a classifier, in the denoiser's place.
        ValueError: draws, combine or stats out of range.
    """

    def __init__(
        self,
        denoiser: PatchModel,
        classifier: nn.Module,
        *,
        stats: Stats,
        mean: Sequence[float],
        std: Sequence[float],
        draws: int,
        combine: Combine,
        seed: int | None,
    ) -> None:
        super().__init__()
        if not isinstance(denoiser, (MAE, SimMIM)):
            raise TypeError(
                f"denoiser is {type(denoiser).__name__}, which has no decoder and reconstructs "
                "nothing; it must be an autoencoder: MAE or SimMIM"
            )
        if stats not in get_args(Stats):
            raise ValueError(f"stats is {stats!r}; it must be one of {', '.join(get_args(Stats))}")
        if draws < 1:
            raise ValueError(f"draws is {draws}; it must be at least 1")
        if combine not in get_args(Combine):
            raise ValueError(f"combine is {combine!r}; it must be mean or vote")
        self.denoiser, self.classifier = denoiser, classifier
        self.stats, self.draws, self.combine = stats, draws, combine
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed
        self.calls = 0  # so that calls with a seed differ from each other
        self.name = type(self).__name__
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Reconstructing:
        """Stay in eval mode, whatever a training loop around this does."""
        super().train(False)
        return self

    @property
    def active(self) -> bool:
        """Whether anything is drawn; a defence that is off is its classifier."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's input."""
        return next(self.denoiser.parameters()).dtype

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the weights of both networks."""
        return weights_hash(self)

    @abstractmethod
    def reconstructed(
        self, images: Tensor, keys: Tensor, samples: int, first_sample: int
    ) -> Tensor:
        """S random reconstructions of each image: fp32 ``[B * S, C, H, W]``, not clamped."""

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` in [0, 1] -> logits ``[B, K]``, with fresh draws at every call.

        With a seed, call number c of this object draws what call number c of another one does.
        """
        device = images.device
        if self.seed is None:
            keys = torch.randint(-(2**63), 2**63 - 1, (len(images),), device=device)
        else:
            self.calls += 1
            # Far from the places of any data set: no call shares its draws with a named image.
            places = torch.arange(len(images), device=device) + (self.calls << 40)
            keys = image_keys(self.seed, Stream.EVALUATION, places)
        return self.draw(images, keys)

    def draw(self, images: Tensor, keys: Tensor, samples: int = 1, first_sample: int = 0) -> Tensor:
        """The keyed form: the same keys, the same draws, whatever stands beside them in a batch.

        Args:
            images: fp32 ``[B, C, H, W]`` in [0, 1].
            keys: int64 ``[B]``, from `image_keys`.
            samples: S, answers for each image, each of `draws` reconstructions.
            first_sample: number of the first answer.

        Returns:
            Logits ``[B * S, K]``, the answers for one image next to each other.
        """
        if not self.active:
            return self._classify(images).repeat_interleave(samples, 0)
        draws = self.draws
        pixels = self.reconstructed(images, keys, samples * draws, first_sample * draws)
        return self.answers(pixels.clamp(0, 1))

    def answers(self, pixels: Tensor) -> Tensor:
        """Reconstructions ``[N * draws, C, H, W]`` in [0, 1] -> logits ``[N, K]``."""
        return self._of_draws(self._classify(pixels))

    @property
    def _reads_rows(self) -> bool:
        """Whether the classifier cuts an image into the very patches that the denoiser predicts."""
        classifier, denoiser = self.classifier, self.denoiser
        if not (isinstance(classifier, Classifier) and isinstance(classifier.body, ViT)):
            return False
        read, predicted = classifier.body.arch, denoiser.arch
        alike = (read.image_size, read.channels) == (predicted.image_size, predicted.channels)
        return alike and read.patch == denoiser.predicted_patch

    def _answers_rows(self, rows: Tensor) -> Tensor:
        """`answers` from patch rows ``[N * draws, L, p*p*C]`` in the denoiser's units."""
        classifier = self.classifier
        assert isinstance(classifier, Classifier)
        size, device = rows.shape[2], rows.device
        ours = _of_rows(self.mean, self.std, size, device)
        theirs = _of_rows(classifier.mean, classifier.std, size, device)
        # hardtanh is clamp, whose backward pass takes thirty times as long on a CPU (5.2 ms for
        # 1,280 draws of the embedded model).
        pixels = F.hardtanh(torch.addcmul(ours.mean, rows, ours.std), 0.0, 1.0)
        rows = torch.addcmul(theirs.shift, pixels, theirs.scale)
        weight = next(classifier.body.parameters(), rows)
        return self._of_draws(classifier.body(rows.to(weight.dtype)))

    def _of_draws(self, logits: Tensor) -> Tensor:
        if self.draws == 1:
            return logits
        return _combined(logits.view(-1, self.draws, logits.shape[1]), self.combine)

    def _classify(self, pixels: Tensor) -> Tensor:
        # Ours normalises in fp32 and casts then; any other takes what its weights are.
        weight = next(self.classifier.parameters(), None)
        if weight is not None and not isinstance(self.classifier, Classifier):
            pixels = pixels.to(weight.dtype)
        logits: Tensor = self.classifier(pixels)
        return logits


@lru_cache(maxsize=64)
def _of_rows(
    mean: tuple[float, ...], std: tuple[float, ...], size: int, device: torch.device
) -> Normalisation:
    """The normalisation of each value of a patch row, where channels stand innermost."""
    of_channels = normalisation(mean, std, device)
    with torch.inference_mode(False):
        return Normalisation(*(values.repeat(size // len(mean)) for values in of_channels))


def _combined(logits: Tensor, combine: Combine) -> Tensor:
    """Logits ``[N, draws, K]`` -> one answer each, ``[N, K]``; see `Reconstructing`."""
    log_p = logits.float().log_softmax(-1)
    if combine == "mean":
        return log_p.logsumexp(1) - math.log(logits.shape[1])
    share = F.one_hot(logits.argmax(-1), logits.shape[-1]).float().mean(1)
    soft = log_p.exp().mean(1)
    return share + (soft - soft.detach())


class De3(Reconstructing):
    """Denoise and classify (You et al., 2023, section 4.3); see the module's text.

    Args:
        sigma: noise level in units of 1/255, as the paper has it (70, 140); None: defence off.
        denoiser, classifier, stats, mean, std, draws, combine, seed: see `Reconstructing`.

    Raises:
        TypeError, ValueError: see `Reconstructing`; a sigma that is not positive.
    """

    def __init__(
        self,
        denoiser: PatchModel,
        classifier: nn.Module,
        *,
        sigma: float | None,
        stats: Stats,
        mean: Sequence[float],
        std: Sequence[float],
        draws: int = 1,
        combine: Combine = "mean",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            denoiser,
            classifier,
            stats=stats,
            mean=mean,
            std=std,
            draws=draws,
            combine=combine,
            seed=seed,
        )
        if sigma is not None:
            if not 0 < sigma < math.inf:
                raise ValueError(f"sigma is {sigma}; it must be positive, or None for no defence")
            warn_if_units_look_wrong(sigma, 255)
        self.sigma = sigma

    @property
    def active(self) -> bool:
        """Whether there is noise."""
        return self.sigma is not None

    def reconstructed(
        self, images: Tensor, keys: Tensor, samples: int, first_sample: int
    ) -> Tensor:
        """See `Reconstructing`."""
        pixels: Tensor = self._denoised(reconstruct, images, keys, samples, first_sample)
        return pixels

    def draw(self, images: Tensor, keys: Tensor, samples: int = 1, first_sample: int = 0) -> Tensor:
        """See `Reconstructing`; where both networks cut images alike, none is ever assembled."""
        if not (self.active and self._reads_rows):
            return super().draw(images, keys, samples, first_sample)
        first = first_sample * self.draws
        return self._answers_rows(
            self._denoised(reconstruct_rows, images, keys, samples * self.draws, first)
        )

    def _denoised(
        self, form: Any, images: Tensor, keys: Tensor, samples: int, first_sample: int
    ) -> Any:
        assert self.sigma is not None
        return form(
            self.denoiser, images, keys, self.sigma / 255, mean=self.mean, std=self.std,
            stats=self.stats, samples=samples, first_sample=first_sample, dtype=self.dtype,
        )  # fmt: skip


class DeMask(Reconstructing):
    """De-masking, the defence that MAE and SimMIM offer: mask, reconstruct, classify.

    Args:
        mask_ratio: share of the squares that are removed, as in pretraining.
        unit: side in pixels of what is removed at once; None: the denoiser's patch.
        paste: whether the pixels that were kept replace their reconstruction.
        stats: ``input`` or ``none``; there is no noise.
        denoiser, classifier, mean, std, draws, combine, seed: see `Reconstructing`.

    Raises:
        TypeError, ValueError: see `Reconstructing`; a mask that removes nothing, leaves nothing, or
            whose squares do not fit image and patches.
    """

    def __init__(
        self,
        denoiser: PatchModel,
        classifier: nn.Module,
        *,
        mask_ratio: float,
        stats: Stats,
        mean: Sequence[float],
        std: Sequence[float],
        unit: int | None = None,
        paste: bool = False,
        draws: int = 1,
        combine: Combine = "mean",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            denoiser,
            classifier,
            stats=stats,
            mean=mean,
            std=std,
            draws=draws,
            combine=combine,
            seed=seed,
        )
        if stats == "noisy":
            raise ValueError("stats is 'noisy', but de-masking adds no noise; use input or none")
        arch = denoiser.arch
        self.unit, self.paste, self.mask_ratio = unit or arch.patch, paste, mask_ratio
        height, width = arch.image_size
        if self.unit % arch.patch or height % self.unit or width % self.unit:
            raise ValueError(
                f"unit {unit} must divide the {height}x{width} image and be a multiple of the "
                f"patch, {arch.patch}"
            )
        squares = (height // self.unit) * (width // self.unit)
        if not 0 < math.ceil(mask_ratio * squares) < squares:
            raise ValueError(
                f"mask_ratio {mask_ratio} of {squares} squares must remove some and keep some"
            )

    def reconstructed(
        self, images: Tensor, keys: Tensor, samples: int, first_sample: int
    ) -> Tensor:
        """See `Reconstructing`."""
        arch = self.denoiser.arch
        hidden = unit_masks(  # [B * S, L]
            keys,
            arch.grid,
            self.unit // arch.patch,
            self.mask_ratio,
            samples=samples,
            first_sample=first_sample,
        )
        keep = (~hidden).nonzero()[:, 1].view(len(hidden), -1)
        pixels = reconstruct(
            self.denoiser,
            images,
            keys,
            0.0,
            mean=self.mean,
            std=self.std,
            stats=self.stats,
            keep=keep,
            samples=samples,
            first_sample=first_sample,
            dtype=self.dtype,
        )
        if self.paste:
            squares = hidden.view(-1, 1, *arch.grid)
            removed = squares.repeat_interleave(arch.patch, 2).repeat_interleave(arch.patch, 3)
            pixels = torch.where(removed, pixels, images.repeat_interleave(samples, 0))
        return pixels
