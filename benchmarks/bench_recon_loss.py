# SPDX-License-Identifier: Apache-2.0
"""Reconstruction loss, forward and backward, against the published lines.

pytest benchmarks/bench_recon_loss.py --results benchmarks/results/NAME.json
"""

from functools import partial

import published
import pytest
import torch
from timing import backend_of, report, run

from nimfast.ops import recon_loss, use_backend

# [N, 3, side, side] and patch: ViT at CIFAR's size, at ImageNet's, DMAE's 32 -> 224 resize.
SIZES = {
    "1 CIFAR, patch 4": (1, 32, 4),
    "256 CIFAR, patch 4": (256, 32, 4),
    "1 ImageNet, patch 16": (1, 224, 16),
    "64 ImageNet, patch 16": (64, 224, 16),
    "64 ImageNet, patch 56": (64, 224, 56),
    "1000 ImageNet, patch 16": (1000, 224, 16),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTENDERS = (
    "published",
    "published, compiled",
    "nimfast",
    "nimfast, bf16",
    "triton",
    "triton, bf16",
)


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("region", ["all", "removed"])
def test_recon_loss(benchmark, device, finish, size: str, region: str, who: str) -> None:  # type: ignore[no-untyped-def]
    """Loss with norm_pix over all patches, or over three quarters of them, and its gradient."""
    count, side, patch = SIZES[size]
    benchmark.group = f"recon_loss {size}, {region} patches"
    images = torch.rand(count, 3, side, side, device=device)
    rows = (count, (side // patch) ** 2, patch * patch * 3)
    dtype = torch.bfloat16 if who.endswith("bf16") else torch.float32
    prediction = torch.randn(rows, device=device, dtype=dtype, requires_grad=True)
    mask = torch.rand(rows[:2], device=device) < 0.75 if region == "removed" else None
    if who.startswith("published"):
        lines = published.recon_loss if who == "published" else torch.compile(published.recon_loss)
        mean, std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (MEAN, STD))
        weight = None if mask is None else mask.float()

        def loss() -> torch.Tensor:
            return lines(prediction, images, patch, True, weight, mean, std)

        backend = "reference"  # not used
    else:
        backend = backend_of(who, "recon_loss", device)
        loss = partial(
            recon_loss,
            prediction,
            images,
            patch=patch,
            norm_pix=True,
            mask=mask,
            mean=MEAN,
            std=STD,
        )

    with use_backend(backend):
        # The gradient of the prediction itself: a leaf's would be copied once more.
        run(benchmark, finish, lambda: torch.autograd.grad(loss(), prediction))
    # Prediction and image read once, the gradient written once.
    moved = images.numel() * (4 + 2 * prediction.element_size())
    report(benchmark, device, moved)
