# SPDX-License-Identifier: Apache-2.0
"""corrupt against the published lines, eager and under torch.compile.

pytest benchmarks/bench_corrupt.py --results benchmarks/results/NAME.json
"""

from collections.abc import Callable
from functools import partial

import published
import pytest
import torch
from timing import backend_of, report, run

from nimfast.ops import Stream, corrupt, image_keys, use_backend

SIZES = {  # samples and shape; 1,000 samples are a batch of the published certification
    "1 x CIFAR 3x32x32": (1, (3, 32, 32)),
    "1000 x digit 1x32x32": (1000, (1, 32, 32)),
    "1000 x CIFAR 3x32x32": (1000, (3, 32, 32)),
    "100 x ImageNet 3x224x224": (100, (3, 224, 224)),
    "1000 x ImageNet 3x224x224": (1000, (3, 224, 224)),
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
@pytest.mark.parametrize("normalise", [False, True], ids=["noise", "normalise"])
def test_corrupt(benchmark, device, finish, size: str, normalise: bool, who: str) -> None:  # type: ignore[no-untyped-def]
    """Noisy copies of one image."""
    samples, shape = SIZES[size]
    benchmark.group = f"corrupt {size}{', normalised' if normalise else ''}"
    image = torch.rand(shape, device=device)
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
        backend = backend_of(who, "corrupt", device)
        keys = image_keys(0, Stream.ESTIMATION, torch.zeros(1, dtype=torch.int64, device=device))
        draw = partial(
            corrupt,
            samples=samples,
            dtype=torch.bfloat16 if who.endswith("bf16") else torch.float32,
            noise="grid" if who.endswith("grid") else "gaussian",
        )
        if normalise:
            draw = partial(draw, mean=mean, std=std)
        with use_backend(backend):
            run(benchmark, finish, lambda: draw(image[None], keys, 0.5))
    normals = samples * image.numel()
    size_out = 2 if who.endswith("bf16") else 4
    report(benchmark, device, image.nbytes + normals * size_out, normals)
