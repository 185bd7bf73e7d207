# SPDX-License-Identifier: Apache-2.0
"""CERTIFY of one image (n0 = 100, n = 10,000), and a set of images, against the published loop.

pytest benchmarks/bench_certify.py --results benchmarks/results/NAME.json
"""

import published
import pytest
import timm
import torch
from torch import nn

from nimfast import data as images
from nimfast import models
from nimfast.runtime import DTYPES, prepare
from nimfast.smoothing import Smooth
from nimfast.smoothing.batch import default_batch_size
from nimfast.smoothing.engine import Sampler, Work
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import judge
from nimfast.smoothing.run import most_requests

N0, N, ALPHA, SIGMA = 100, 10_000, 0.001, 0.5


def digits() -> tuple[nn.Module, torch.Tensor]:
    data = images.load("digits", "test")
    return models.load_classifier("digits", num_classes=10, shape=data.shape), data[0][0]


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


SET = 20  # images
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # up to 2.5 sigma, the command's default


@pytest.mark.parametrize("noise", ["gaussian", "grid"])
@pytest.mark.parametrize(
    "who", ["published", "cohen fp32", "cohen bf16", "exact fp32", "exact bf16"]
)
def test_certify_set(benchmark, device, finish, who: str, noise: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"CERTIFY {SET} digits, {noise} noise"
    data = images.load("digits", "test")
    model = models.load_classifier("digits", num_classes=10, shape=data.shape).to(device)
    chosen = range(0, len(data), 19)[:SET]  # 20 would be a multiple of the number of classes
    pictures = [data[i][0].to(device) for i in chosen]
    labels = [data[i][1] for i in chosen]
    samples = SET * (N0 + N)
    if who == "published":

        def certify() -> None:
            for image in pictures:
                published.certify(model, image, SIGMA, N0, N, ALPHA, 10)
            finish()
    else:
        protocol, precision = who.split()
        prepared = prepare(model, device, precision)  # type: ignore[arg-type]
        network = Network(prepared, 10, SIGMA, noise=noise, dtype=DTYPES[precision])  # type: ignore[arg-type]
        sampler = Sampler(network, seed=0)
        rows = default_batch_size(model, device, data.shape)
        n0 = N0 if protocol == "cohen" else 0

        def certify() -> None:
            nonlocal samples
            works = (
                Work(index, image, _judge(protocol, label, n0), most_requests({"n0": n0, "n": N}))
                for index, (image, label) in enumerate(zip(pictures, labels, strict=True))
            )
            found = sampler.run(works, rows)
            samples = sum(done.judge.decision().samples for done in found)
            finish()

    certify()  # warm up, plans included
    benchmark.pedantic(certify, rounds=5)
    benchmark.extra_info["samples/image"] = samples / SET
    benchmark.extra_info["us/sample"] = benchmark.stats.stats.median / samples * 1e6


def _judge(protocol: str, label: int, n0: int):  # type: ignore[no-untyped-def]
    return judge(
        protocol,  # type: ignore[arg-type]
        sigma=SIGMA,
        label=label,
        num_classes=10,
        n0=n0,
        n=N,
        alpha=ALPHA,
        radii=RADII,
    )
