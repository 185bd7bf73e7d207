# SPDX-License-Identifier: Apache-2.0
"""CERTIFY of one image (n0 = 100, n = 10,000), whole, against the published loop.

pytest benchmarks/bench_certify.py --results benchmarks/results/NAME.json
"""

import published
import pytest
import timm
import torch
from torch import nn

from nimfast import data, models
from nimfast.runtime import prepare
from nimfast.smoothing import Smooth
from nimfast.smoothing.engine import default_batch_size

N0, N, ALPHA, SIGMA = 100, 10_000, 0.001, 0.5


def digits() -> tuple[nn.Module, torch.Tensor]:
    images = data.load("digits", "test")
    return models.load_classifier("digits", num_classes=10, shape=images.shape), images[0][0]


def vit_tiny() -> tuple[nn.Module, torch.Tensor]:
    # Speed does not depend on the weights, so none are downloaded.
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)
    return model, torch.rand(3, 32, 32)


# How often each is timed: a round of the published loop with the second takes 1.5 minutes on two
# cores, so that rounds average over the machine's noise by themselves.
CASES = {"embedded model": (digits, 15), "timm vit_tiny, 32x32, patch 4": (vit_tiny, 1)}


@pytest.mark.parametrize("who", ["published", "fp32", "bf16", "tf32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_certify(benchmark, device, finish, case: str, who: str) -> None:  # type: ignore[no-untyped-def]
    if who in ("tf32", "fp16") and device.type != "cuda":
        pytest.skip(f"{who} is for CUDA devices")
    benchmark.group = f"CERTIFY {case}"
    torch.manual_seed(0)
    make, rounds = CASES[case]
    model, image = make()
    model, image = model.eval().to(device), image.to(device)
    if who == "published":

        def certify() -> None:
            published.certify(model, image, SIGMA, N0, N, ALPHA, 10)
            finish()
    else:
        prepared = prepare(model, device) if who == "fp32" else model
        smooth = Smooth(prepared, 10, SIGMA, precision=who)  # type: ignore[arg-type]
        batch = default_batch_size(model, device, tuple(image.shape))

        def certify() -> None:
            smooth.certify(image, N0, N, ALPHA, batch)
            finish()

    if rounds > 1:
        certify()  # warm up
    benchmark.pedantic(certify, rounds=rounds)
    benchmark.extra_info["us/sample"] = benchmark.stats.stats.median / (N0 + N) * 1e6
