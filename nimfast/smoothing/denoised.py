# SPDX-License-Identifier: Apache-2.0
"""De3 as the base classifier of a smoothed one: the smoothing noise is De3's own.

De3 (You et al., 2023, section 4.3) adds noise, denoises, clamps and classifies. Under certification
the engine adds that noise, once; what is left is a deterministic function of the noisy image, as
the theorem wants it, and the vote over the noise takes the place of De3's combination of draws.
"""

from __future__ import annotations

from torch import Tensor, nn

from nimfast.defense import De3
from nimfast.errors import UserError
from nimfast.restoration import predict, restore


class Denoised(nn.Module):
    """Noisy images ``[N, C, H, W]``, pixels around [0, 1] -> logits: denoise, clamp, classify.

    Args:
        defence: whose networks and statistics are used; its noise, draws and seed are not.
        sigma: standard deviation of the noise in the images, pixel units; with statistics from the
            noisy image it enters the function.

    Attributes:
        body: the same for images that are normalised already, with `mean` and `std`.
        weights_hash: SHA-256 of the weights of both networks.

    Raises:
        UserError: statistics of the clean image, which no certificate allows, or a defence that is
            off.
    """

    def __init__(self, defence: De3, sigma: float) -> None:
        super().__init__()
        if defence.stats == "input":
            raise UserError(
                "De3 with stats=input shows the classifier numbers of the image without noise, so "
                "no certificate holds for it; certify it with stats=noisy"
            )
        if not defence.active:
            raise UserError("De3 with sigma=none is off; certify its classifier by itself")
        self.body = _Body(defence, sigma)
        self.mean, self.std = defence.mean, defence.std
        self.weights_hash = defence.weights_hash

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        mean = images.new_tensor(self.mean).view(-1, 1, 1)
        std = images.new_tensor(self.std).view(-1, 1, 1)
        logits: Tensor = self.body((images - mean) / std)
        return logits


class _Body(nn.Module):
    def __init__(self, defence: De3, sigma: float) -> None:
        super().__init__()
        self.denoiser, self.classifier = defence.denoiser, defence.classifier
        self.sigma, self.stats = sigma, defence.stats
        self.normalisation = {"mean": defence.mean, "std": defence.std}

    def forward(self, noisy: Tensor) -> Tensor:
        # `restore` looks at the clean images for stats "input" only, which is refused above.
        pixels = restore(
            predict(self.denoiser, noisy),
            noisy,
            noisy,
            self.sigma,
            stats=self.stats,
            **self.normalisation,
        )
        logits: Tensor = self.classifier(pixels.clamp(0, 1))
        return logits
