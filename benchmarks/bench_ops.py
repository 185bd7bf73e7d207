# SPDX-License-Identifier: Apache-2.0
"""Operations against the published lines, eager and under torch.compile.

pytest benchmarks/bench_ops.py --results benchmarks/results/NAME.json
"""

from collections.abc import Callable
from functools import partial

import published
import pytest
import torch
from timing import run

from nimfast.ops import Stream, corrupt, image_keys, use_backend, votes
from nimfast.ops.backend import why_not

SAMPLES = 1000
SIZES = {
    "digit 1x32x32": (1, 32, 32),
    "CIFAR 3x32x32": (3, 32, 32),
    "ImageNet 3x224x224": (3, 224, 224),
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


@pytest.mark.parametrize("who", CONTENDERS)  # first: both sides of a ratio run side by side
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalise", [False, True], ids=["noise", "normalise"])
def test_corrupt(benchmark, device, finish, size: str, normalise: bool, who: str) -> None:  # type: ignore[no-untyped-def]
    """1,000 noisy copies of one image, a batch of the published certification."""
    samples = SAMPLES if device.type == "cuda" or size != "ImageNet 3x224x224" else SAMPLES // 10
    benchmark.group = f"{samples} x {size}: noise{', normalised' if normalise else ''}"
    image = torch.rand(SIZES[size], device=device)
    mean, std = MEAN[: len(image)], STD[: len(image)]
    if who.startswith("published"):
        lines: Callable[..., torch.Tensor] = published.corrupt
        constants = []
        if normalise:
            lines = published.corrupt_and_normalise
            constants = [torch.tensor(value, device=device).view(-1, 1, 1) for value in (mean, std)]
        if who == "published, compiled":
            lines = torch.compile(lines)
        run(benchmark, finish, lambda: lines(image, 0.5, samples, *constants))
    else:
        backend = "triton" if who.startswith("triton") else "native"
        if why_not(backend, "corrupt", device):
            pytest.skip(why_not(backend, "corrupt", device))
        keys = image_keys(0, Stream.ESTIMATION, torch.zeros(1, dtype=torch.int64, device=device))
        draw = partial(
            corrupt,
            samples=samples,
            dtype=torch.bfloat16 if who.endswith("bf16") else torch.float32,
        )
        if normalise:
            draw = partial(draw, mean=mean, std=std)
        with use_backend(backend):
            run(benchmark, finish, lambda: draw(image[None], keys, 0.5))
    normals = samples * image.numel()
    benchmark.extra_info["Gnormals/s"] = normals / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("who", ["published", "nimfast", "triton"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_votes(benchmark, device, finish, classes: int, who: str) -> None:  # type: ignore[no-untyped-def]
    """Counting 1,000 rows of logits."""
    benchmark.group = f"votes {SAMPLES} x {classes}"
    logits = torch.randn(SAMPLES, classes, device=device)
    if who == "published":
        run(benchmark, finish, lambda: published.votes(logits, classes))
    else:
        backend = "triton" if who == "triton" else "native"
        if why_not(backend, "votes", device):
            pytest.skip(why_not(backend, "votes", device))
        counts = torch.zeros(1, classes + 1, dtype=torch.int64, device=device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        valid = torch.full((1,), SAMPLES, device=device)
        with use_backend(backend):
            run(benchmark, finish, lambda: votes(logits, counts, index=index, valid=valid))
    benchmark.extra_info["GB/s"] = logits.numel() * 4 / benchmark.stats.stats.median / 1e9
