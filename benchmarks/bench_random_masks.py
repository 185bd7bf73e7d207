# SPDX-License-Identifier: Apache-2.0
"""random_masks and unit_masks against the published lines, eager and under torch.compile.

pytest benchmarks/bench_random_masks.py --results benchmarks/results/NAME.json
"""

import published
import pytest
import torch
from timing import report, run

from nimfast.ops import Stream, image_keys, random_masks, unit_masks, use_backend
from nimfast.ops.backend import why_not

# images, patches: one CIFAR image, a batch of them, batches of ImageNet images.
SIZES = {
    "1 x CIFAR (64 patches)": (1, 64),
    "256 x CIFAR (64 patches)": (256, 64),
    "256 x ImageNet (196 patches)": (256, 196),
    "1000 x ImageNet (196 patches)": (1000, 196),
}


@pytest.mark.parametrize("who", ["published", "published, compiled", "nimfast", "triton"])
@pytest.mark.parametrize("size", SIZES)
def test_random_masks(benchmark, device, finish, size: str, who: str) -> None:  # type: ignore[no-untyped-def]
    """A quarter of the patches kept: kept, restore and mask."""
    batch, patches = SIZES[size]
    benchmark.group = f"random masks, {size}"
    if who.startswith("published"):
        lines = published.random_masking
        if who == "published, compiled":
            lines = torch.compile(lines)
        with torch.device(device):
            run(benchmark, finish, lambda: lines(batch, patches, patches // 4))
    else:
        keys = image_keys(0, Stream.MASK, torch.arange(batch, device=device))
        backend = "triton" if who.startswith("triton") else "native"
        if why_not(backend, "random_masks", device):
            pytest.skip(why_not(backend, "random_masks", device))
        with use_backend(backend):
            run(benchmark, finish, lambda: random_masks(keys, patches, patches // 4))
    report(benchmark, device, batch * (patches // 4 * 8 + patches * 9))


@pytest.mark.parametrize("who", ["published", "nimfast", "triton"])
def test_unit_masks(benchmark, device, finish, who: str) -> None:  # type: ignore[no-untyped-def]
    """SimMIM's setting: 192 pixels, patches of 4, units of 32 pixels, 60% of them masked."""
    batch, side, unit, ratio = 256, 48, 8, 0.6
    benchmark.group = f"unit masks, {batch} x {side} x {side} patches"
    if who == "published":
        function = lambda: published.unit_masking(batch, side, unit, ratio).to(device)  # noqa: E731
        run(benchmark, finish, function)
    else:
        keys = image_keys(0, Stream.MASK, torch.arange(batch, device=device))
        backend = "triton" if who.startswith("triton") else "native"
        if why_not(backend, "random_masks", device):
            pytest.skip(why_not(backend, "random_masks", device))
        with use_backend(backend):
            run(benchmark, finish, lambda: unit_masks(keys, (side, side), unit, ratio))
    report(benchmark, device, batch * side * side)
