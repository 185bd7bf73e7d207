# SPDX-License-Identifier: Apache-2.0
"""mask_tokens against the published lines, eager and under torch.compile.

pytest benchmarks/bench_mask_tokens.py --results benchmarks/results/NAME.json
"""

import published
import pytest
import torch
from timing import report, run
from torch import Tensor

from nimfast.ops import mask_tokens, use_backend
from nimfast.ops.backend import why_not

# images, patches: one CIFAR image, a batch of them, batches of ImageNet images.
SIZES = {
    "1 x CIFAR (64 patches)": (1, 64),
    "256 x CIFAR (64 patches)": (256, 64),
    "256 x ImageNet (196 patches)": (256, 196),
    "1000 x ImageNet (196 patches)": (1000, 196),
}
WIDTH = 768  # ViT-B
CONTENDERS = (
    "published",
    "published, compiled",
    "published, bf16",
    "nimfast",
    "nimfast, bf16",
    "triton",
    "triton, bf16",
)


@pytest.mark.parametrize("who", CONTENDERS)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("size", SIZES)
def test_mask_tokens(benchmark, device, finish, size: str, gradients: bool, who: str) -> None:  # type: ignore[no-untyped-def]
    """60% of the tokens of a ViT-B replaced."""
    batch, patches = SIZES[size]
    benchmark.group = f"mask tokens{', and gradients' if gradients else ''}, {size}"
    dtype = torch.bfloat16 if who.endswith("bf16") else torch.float32
    tokens = torch.randn(batch, patches, WIDTH, device=device, dtype=dtype)
    token = torch.randn(WIDTH, device=device, dtype=dtype)
    mask = torch.rand(batch, patches, device=device) < 0.6
    upstream = torch.randn_like(tokens)
    tokens.requires_grad_(gradients)
    token.requires_grad_(gradients)

    def timed(lines) -> None:  # type: ignore[no-untyped-def]
        def function() -> Tensor | tuple[Tensor, ...]:
            out: Tensor = lines(tokens, token, mask)
            if not gradients:
                return out
            return torch.autograd.grad(out, (tokens, token), upstream)

        run(benchmark, finish, function)

    if who == "published, compiled":
        timed(torch.compile(published.mask_tokens))
    elif who.startswith("published"):
        timed(published.mask_tokens)
    else:
        backend = "triton" if who.startswith("triton") else "native"
        if why_not(backend, "mask_tokens", device):
            pytest.skip(why_not(backend, "mask_tokens", device))
        with use_backend(backend):
            timed(mask_tokens)
    # Forward: 40% read, all written. Backward: all read and written.
    report(benchmark, device, int(tokens.nbytes * (1.4 + 2 * gradients)))
