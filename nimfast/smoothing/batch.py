# SPDX-License-Identifier: Apache-2.0
"""How many rows a batch gets where nobody says: a rule, and what the device's memory allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nimfast.errors import UserError
from nimfast.smoothing.network import Network
from nimfast.smoothing.schedule import SLOT


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


@torch.inference_mode()
def fitting_batch_size(network: Network, image: Tensor, rows: int) -> int:
    """`rows`, halved until a batch of that many noisy copies of `image` fits into the memory.

    Halving rather than measuring: the answer is the same on every device of a kind, whatever else
    has taken a little of its memory.

    Args:
        network: classifier and noise.
        image: ``[C, H, W]`` on the device.
        rows: where to begin.

    Raises:
        UserError: not even one slot fits.
    """
    key = torch.zeros(1, dtype=torch.int64, device=image.device)
    images = network.accept(image)[None]
    while True:
        try:
            network(images, key, key, rows)
            return rows
        except torch.OutOfMemoryError:
            if rows <= SLOT:
                raise UserError(
                    f"the device has no memory for {rows} rows of this model; "
                    "give a smaller --batch-size, a lower --precision, or another --device"
                ) from None
        torch.cuda.empty_cache()  # outside the handler, which still holds the failed batch
        rows = max(SLOT, rows // 2 // SLOT * SLOT)
