# SPDX-License-Identifier: Apache-2.0
"""The noise kernel and the classifier behind it: from images and keys to logits."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nimfast.models import ViT
from nimfast.ops import check_grid, corrupt, corrupt_patches
from nimfast.options import Noise


class Network:
    """A classifier under noise of one sigma.

    Where the classifier has `body` (a module), `mean` and `std` (tuples, one value per channel),
    `body` is called and the noise kernel normalises. Where that takes patch rows (our `ViT`), the
    kernel makes those, and no image is ever assembled.

    Args:
        classifier: from images ``[N, C, H, W]`` to logits ``[N, num_classes]``.
        num_classes: K.
        sigma: standard deviation of the noise, pixel units of [0, 1].
        noise: ``gaussian``, or ``grid``: on the 8-bit grid, which images must then lie on.
        dtype: of the noisy images.
    """

    def __init__(
        self,
        classifier: nn.Module,
        num_classes: int,
        sigma: float,
        noise: Noise = "gaussian",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module = classifier
        self.num_classes = num_classes
        self.sigma = sigma
        self.noise = noise
        self.dtype = dtype
        body, mean, std = (getattr(classifier, name, None) for name in ("body", "mean", "std"))
        self._normalisation: dict[str, Any] = {}
        self._called = classifier
        if isinstance(body, nn.Module) and isinstance(mean, tuple) and isinstance(std, tuple):
            self._called, self._normalisation = body, {"mean": mean, "std": std}
        # Exactly this class: a subclass may want whole images.
        self._vit = self._called if type(self._called) is ViT else None

    @property
    def device(self) -> torch.device | None:
        """Where the classifier's weights lie; None for one without weights."""
        weight = next(self.module.parameters(), next(self.module.buffers(), None))
        return None if weight is None else weight.device

    def accept(self, image: Tensor) -> Tensor:
        """An image ``[C, H, W]`` in [0, 1] as the noise kernel takes it, where it lies.

        Raises:
            TypeError: whole numbers.
            ValueError: another shape than the network's, or a pixel off the grid of `grid` noise.
        """
        if image.ndim != 3:
            raise ValueError(f"image must be [C, H, W], not of shape {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"image is {image.dtype}; pixels must be floats in [0, 1], as sigma is")
        image = image.detach().to(torch.float32)
        if self._vit is not None:
            self._vit.check_images(image[None])
        if self.noise == "grid":
            check_grid(image)
        return image

    def __call__(self, images: Tensor, keys: Tensor, first: Tensor, samples: int) -> Tensor:
        """Logits of noisy copies.

        Args:
            images: from `accept`, ``[B, C, H, W]``.
            keys, first: int64 [B], whose noise, and from which sample on.
            samples: copies of each.

        Returns:
            ``[B * samples, K]``, copies of one image next to each other.

        Raises:
            ValueError: the classifier returns something else.
        """
        draw: Callable[..., Tensor] = corrupt
        if self._vit is not None:
            draw = functools.partial(corrupt_patches, patch=self._vit.arch.patch)
        noisy = draw(
            images,
            keys,
            self.sigma,
            samples=samples,
            first_sample=first,
            dtype=self.dtype,
            noise=self.noise,
            **self._normalisation,
        )
        logits: Tensor = self._called(noisy)
        wanted = (len(images) * samples, self.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"base_classifier must return logits of shape {wanted} "
                f"(num_classes = {self.num_classes}), not {found}"
            )
        return logits

    def compile(self, image: Tensor, rows: int) -> bool:
        """Translate the classifier by torch.compile, tried on `rows` rows of noisy `image`.

        Returns:
            Whether it worked. Where not, a warning says why and the classifier runs as before.
        """
        keys = torch.zeros(1, dtype=torch.int64, device=image.device)
        images = self.accept(image)[None]
        try:
            self._called.compile(dynamic=False)
            with torch.inference_mode():
                self(images, keys, keys, rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's errors have no common base
            self._called._compiled_call_impl = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(
                f"torch.compile does not take this model ({reason}); it runs eagerly", stacklevel=2
            )
            return False
        return True
