# SPDX-License-Identifier: Apache-2.0
"""Noisy patch rows against the published lines, eager and under torch.compile.

pytest benchmarks/bench_corrupt_patches.py --results benchmarks/results/NAME.json
"""

from functools import partial

import published
import pytest
import torch
from timing import report, run

from nimfast.ops import Stream, corrupt_patches, image_keys, use_backend
from nimfast.ops.backend import why_not

# images, channels, side, patch: one image, then batches as pretraining draws them.
SIZES = {
    "1 x CIFAR 3x32x32, patch 4": (1, 3, 32, 4),
    "1000 x CIFAR 3x32x32, patch 4": (1000, 3, 32, 4),
    "100 x ImageNet 3x224x224, patch 16": (100, 3, 224, 16),
    "100 x ImageNet 3x224x224, patch 14": (100, 3, 224, 14),
    "1000 x ImageNet 3x224x224, patch 16": (1000, 3, 224, 16),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTENDERS = (
    "published",
    "published, compiled",
    "nimfast",
    "nimfast, bf16",
    "nimfast on the grid",
    "triton",
    "triton, bf16",
    "triton on the grid",
)


@pytest.mark.parametrize("who", CONTENDERS)  # first: both sides of a ratio run side by side
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dropped", [0.75, 0.0], ids=["75% dropped", "none dropped"])
def test_corrupt_patches(benchmark, device, finish, size: str, dropped: float, who: str) -> None:  # type: ignore[no-untyped-def]
    """One noisy copy of each image of a batch, as normalised patch rows."""
    count, channels, side, patch = SIZES[size]
    if device.type == "cpu" and count * side > 100_000 and (dropped == 0 or "compiled" in who):
        pytest.skip("several GB; the smaller batch shows the same ratio")
    benchmark.group = f"{size}, {dropped:.0%} dropped"
    images, patches = torch.rand(count, channels, side, side, device=device), (side // patch) ** 2
    keep = round(patches * (1 - dropped))
    kept = torch.rand(count, patches, device=device).argsort(1)[:, :keep]
    mean, std = MEAN[:channels], STD[:channels]
    if who.startswith("published"):
        lines = published.corrupt_patches
        if who == "published, compiled":
            lines = torch.compile(lines)
        constants = [torch.tensor(value, device=device).view(-1, 1, 1) for value in (mean, std)]
        run(benchmark, finish, lambda: lines(images, 0.25, patch, kept, *constants))
    else:
        backend = "triton" if who.startswith("triton") else "native"
        if why_not(backend, "corrupt_patches", device):
            pytest.skip(why_not(backend, "corrupt_patches", device))
        keys = image_keys(0, Stream.TRAINING, torch.arange(count, device=device))
        half = torch.bfloat16 if who.endswith("bf16") else torch.float32
        draw = partial(corrupt_patches, patch=patch, kept=kept, mean=mean, std=std, dtype=half)
        if who.endswith("grid"):
            draw = partial(draw, noise="grid")
        with use_backend(backend):
            run(benchmark, finish, lambda: draw(images, keys, 0.25))
    normals = count * keep * patch**2 * channels  # of those that are used; as many pixels are read
    report(benchmark, device, normals * (6 if who.endswith("bf16") else 8), normals)
