# SPDX-License-Identifier: Apache-2.0
"""The same model seen otherwise: with known noise, or with a gradient that goes around a step.

Each is a module that attacks take in the model's place. A defence whose own gradient misleads falls
to one of them; the strongest attack of all is the number to report.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nimfast.defense import Reconstructing


class Fixed(nn.Module):
    """A randomised classifier whose noise was drawn once for each image, and is known.

    Attacked and judged with the same keys (those of the attack), it answers: how robust is the
    classifier if its randomness is no secret? Only for keyed modules; see `De3.draw`.

    Args:
        model: with ``draw(images, keys, samples, first_sample)``.
        sample: which draw is the known one.
    """

    def __init__(self, model: nn.Module, sample: int = 0) -> None:
        super().__init__()
        if not callable(getattr(model, "draw", None)):
            raise TypeError("the noise of a module without `draw` cannot be fixed image by image")
        self.model = model
        self.sample = sample
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        """Logits under fresh noise, as the model itself."""
        logits: Tensor = self.model(images)
        return logits

    def draw(self, images: Tensor, keys: Tensor, samples: int = 1, first_sample: int = 0) -> Tensor:
        """Logits ``[B * samples, K]`` under the known noise, whatever `first_sample`."""
        logits: Tensor = self.model.draw(images, keys, 1, self.sample)  # type: ignore[operator]
        return logits.repeat_interleave(samples, 0)


class Bpda(nn.Module):
    """A defence whose reconstruction counts as the identity in the backward pass.

    Backward pass differentiable approximation (Athalye et al., 2018): the loss is that of the
    defence, the gradient that of the classifier at the reconstructed image.

    Args:
        defense: a defence by reconstruction.
    """

    def __init__(self, defense: Reconstructing) -> None:
        super().__init__()
        self.defense = defense
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits under fresh noise, as the defence itself."""
        logits: Tensor = self.defense(images)
        return logits

    def draw(self, images: Tensor, keys: Tensor, samples: int = 1, first_sample: int = 0) -> Tensor:
        """Logits ``[B * samples, K]``; see `De3.draw`."""
        draws = self.defense.draws
        copies = images.repeat_interleave(samples * draws, 0)
        with torch.no_grad():
            pixels = self.defense.reconstructed(
                images, keys, samples * draws, first_sample * draws
            ).clamp(0, 1)
        return self.defense.answers(copies + (pixels - copies).detach())
