# SPDX-License-Identifier: Apache-2.0
"""The sampling engine: votes of a classifier over noisy copies of an image.

All samples of an image run in batches of one fixed shape, made of slots. A slot is up to 32
consecutive samples of one request, so that different requests share a batch. What does not fill a
slot is padding, computed and not counted: matrix products round differently in other shapes, and
the classifier under test must be one function. Votes stay on the device until the image is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nimfast.models import ViT
from nimfast.ops import corrupt, corrupt_patches, image_keys, votes
from nimfast.smoothing.protocols import Request

SLOT = 32


def default_batch_size(classifier: nn.Module, device: torch.device, shape: tuple[int, ...]) -> int:
    """Rows per batch where none are asked for: a fixed rule, so that a run can be repeated.

    Args:
        classifier: whose number of weights decides on a CPU, where activations should stay in the
            cache. Two AVX-512 cores took, per sample, for 6 M weights (ViT-tiny, 64 tokens, fp32)
            5.2 ms with 32 rows and 8.4 ms with 1,000; for 0.1 M weights (the embedded model,
            bf16) 0.010 ms with 256 rows and 0.006 ms with 1,024.
        device: where it runs. A GPU needs many rows to be busy.
        shape: of an image, ``(C, H, W)``.
    """
    if device.type == "cpu":
        weights = sum(weight.numel() for weight in classifier.parameters())
        rows, least, most = 2**27 // max(1, weights), 32, 1024
    else:
        rows, least, most = 2**24 // (shape[1] * shape[2]), 128, 4096
    return min(most, max(least, rows // SLOT * SLOT))


def batch_rows(batch_size: int, requests: Sequence[Request]) -> int:
    """Rows of the fixed compute shape: at most `batch_size`, split evenly over the batches."""
    slot = min(SLOT, batch_size)
    slots = sum(-(-request.n // slot) for request in requests)
    batches = -(-slots // (batch_size // slot))
    return -(-slots // batches) * slot


class _Plan(NamedTuple):
    """How the samples of `requests` fall into slots; the same for every image."""

    slot: int  # samples per slot
    slots: int  # slots per batch
    request: Tensor  # [batches, slots] int64: which request a slot works for
    first: Tensor  # [batches, slots] int64: its first sample
    valid: Tensor  # [batches, slots] int64: how many of its samples count
    samples: tuple[int, ...]  # per batch: how many samples count


@functools.lru_cache(maxsize=8)
def _plan(requests: tuple[Request, ...], batch_size: int, device: torch.device) -> _Plan:
    slot = min(SLOT, batch_size)
    slots = batch_rows(batch_size, requests) // slot
    rows = [
        (index, first, min(slot, request.n - first))
        for index, request in enumerate(requests)
        for first in range(0, request.n, slot)
    ]
    rows += [(0, 0, 0)] * (-len(rows) % slots)
    table = torch.tensor(rows).view(-1, slots, 3)
    request, first, valid = table.to(device).unbind(-1)
    samples = tuple(table[:, :, 2].sum(1).tolist())
    return _Plan(slot, slots, request.contiguous(), first.contiguous(), valid.contiguous(), samples)


class Sampler:
    """Counts the votes of one classifier under Gaussian noise of one sigma.

    Args:
        classifier: any module from images ``[N, C, H, W]`` to logits ``[N, num_classes]``, on its
            device and in its precision. Where it has `body` (a module), `mean` and `std` (tuples,
            one value per channel), `body` is called and the noise kernel normalises. Where that
            takes patch rows (our `ViT`), the kernel makes those, and no image is ever assembled.
        num_classes: K.
        sigma: standard deviation of the noise, pixel units of [0, 1].
        seed: of all noise; with it, every count is a function of the image and its index.
        dtype: type of the noisy images that the classifier gets.
    """

    def __init__(
        self,
        classifier: nn.Module,
        num_classes: int,
        sigma: float,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_classes = num_classes
        self.sigma = sigma
        self.seed = seed
        self.dtype = dtype
        self._module = classifier
        body, mean, std = (getattr(classifier, name, None) for name in ("body", "mean", "std"))
        if isinstance(body, nn.Module) and isinstance(mean, tuple) and isinstance(std, tuple):
            self._network, self._normalisation = body, {"mean": mean, "std": std}
        else:
            self._network, self._normalisation = classifier, {}

    @property
    def device(self) -> torch.device | None:
        """Where the classifier's weights lie; None for one without weights."""
        weight = next(self._module.parameters(), next(self._module.buffers(), None))
        return None if weight is None else weight.device

    @torch.inference_mode()
    def counts(
        self,
        image: Tensor,
        index: int,
        requests: Sequence[Request],
        batch_size: int,
        progress: Callable[[int], None] = lambda samples: None,
    ) -> list[list[int]]:
        """Votes of the noisy copies of one image.

        Args:
            image: ``[C, H, W]``, pixels in [0, 1], on any device.
            index: which image this is; another index, other noise.
            requests: what to draw; each request is counted on its own.
            batch_size: most rows per forward pass; the result does not depend on it, but for
                samples whose two largest logits lie within rounding of each other.
            progress: called after every batch with the number of samples it counted.

        Returns:
            For each request K + 1 counts: votes for each class, then the samples whose logits held
            NaN or infinity, which are votes for no class.

        Raises:
            ValueError: an argument out of range, or logits that are not ``[N, K]``.
        """
        if image.ndim != 3:
            raise ValueError(f"image must be [C, H, W], not of shape {tuple(image.shape)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not requests or any(request.n < 1 for request in requests):
            raise ValueError(f"every request must ask for at least 1 sample, not {list(requests)}")
        self._module.eval()
        device = self.device or image.device
        plan = _plan(tuple(requests), batch_size, device)
        # A view with stride 0: the image is read once per slot and never copied.
        images = (
            image.detach().to(device, torch.float32).contiguous().expand(plan.slots, *image.shape)
        )
        of_image = torch.tensor([index], device=device)
        keys = torch.cat([image_keys(self.seed, request.stream, of_image) for request in requests])
        counts = torch.zeros(len(requests), self.num_classes + 1, dtype=torch.int64, device=device)
        draw: Callable[..., Tensor] = corrupt
        if type(self._network) is ViT:  # a subclass may want whole images
            self._network.check_images(images)
            draw = functools.partial(corrupt_patches, patch=self._network.arch.patch)
        for batch, samples in enumerate(plan.samples):
            request = plan.request[batch]
            logits = self._network(
                draw(
                    images,
                    keys[request],
                    self.sigma,
                    samples=plan.slot,
                    first_sample=plan.first[batch],
                    dtype=self.dtype,
                    **self._normalisation,
                )
            )
            rows = plan.slots * plan.slot
            if logits.shape != (rows, self.num_classes):
                raise ValueError(
                    f"base_classifier must return logits of shape {(rows, self.num_classes)} "
                    f"(num_classes = {self.num_classes}), not {tuple(logits.shape)}"
                )
            votes(logits, counts, index=request, valid=plan.valid[batch])
            progress(samples)
        return counts.tolist()
