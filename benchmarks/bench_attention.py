# SPDX-License-Identifier: Apache-2.0
"""attention against torch's scaled_dot_product_attention and against the plain lines, on a CPU.

pytest benchmarks/bench_attention.py --results benchmarks/results/NAME.json

The published row is timm's attention as published code runs it: fused, on the three parts of what
its linear layer returns.
"""

import pytest
import torch
from timing import run
from torch import Tensor
from torch.nn import functional

from nimfast.ops import attention, use_backend

CASES = {  # rows, tokens, heads, values of a head
    "embedded model": (1024, 4, 1, 32),
    "ViT-tiny, patch 4": (64, 65, 3, 64),
    "ViT-small, a quarter of 196 patches": (32, 50, 6, 64),
    "ViT-base, 196 patches": (16, 197, 12, 64),
}


def parts(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    split = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def fused(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = parts(qkv, heads)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def plain(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = parts(qkv, heads)
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


CONTENDERS = {"published": fused, "plain": plain, "nimfast": attention}


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("what", ["forward", "forward and gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_attention(benchmark, device, finish, case: str, dtype, what: str, who: str) -> None:  # type: ignore[no-untyped-def]
    if device.type != "cpu":
        pytest.skip("on other devices attention is torch's own")
    rows, tokens, heads, values = CASES[case]
    benchmark.group = f"attention, {case}, {str(dtype).removeprefix('torch.')}, {what}"
    qkv = torch.randn(rows, tokens, 3 * heads * values).to(dtype)
    incoming = torch.randn(rows, tokens, heads * values).to(dtype)
    function = CONTENDERS[who]

    def forward() -> None:
        with torch.inference_mode():
            function(qkv, heads)

    def both() -> None:
        leaf = qkv.detach().requires_grad_()
        torch.autograd.grad(function(leaf, heads), leaf, incoming)

    with use_backend("native"):
        run(benchmark, finish, forward if what == "forward" else both)
    products = 2 if what == "forward" else 7
    operations = 2 * products * rows * heads * tokens * tokens * values
    benchmark.extra_info["GFLOP/s"] = operations / benchmark.stats.stats.median / 1e9
