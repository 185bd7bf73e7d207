# SPDX-License-Identifier: Apache-2.0
"""A frozen transformer block in one call, against timm's in float64, on every instruction set."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from nimfast.ops.backend import native
from nimfast.ops.frozen_linear import FrozenLinear, frozen_linear
from nimfast.ops.transformer_block import FrozenBlock, Norm, transformer_block

LEVELS = ["portable", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16"]
TYPES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # relative error of a whole tensor

pytestmark = [
    pytest.mark.usefixtures("cpu_level"),
    pytest.mark.parametrize("cpu_level", LEVELS, indirect=True),
]


def make(width: int, heads: int, **options: Any) -> Block:
    torch.manual_seed(width + heads)
    block = Block(width, heads, **{"qkv_bias": True, **options}).eval().requires_grad_(False)
    for weight in block.parameters():
        if weight.ndim == 1:  # norms and biases are ones and zeros otherwise
            weight.add_(0.1 * torch.randn_like(weight))
    return block


def frozen(block: Any) -> FrozenBlock:
    norms = [Norm(norm.weight, norm.bias, norm.eps) for norm in (block.norm1, block.norm2)]
    qkv, proj, fc1, fc2 = (
        FrozenLinear(layer.weight, layer.bias, layer.weight.dtype)
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    )
    return FrozenBlock(
        norms[0], qkv, block.attn.num_heads, block.attn.scale, proj, norms[1], fc1, fc2
    )


def distance(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("width", "heads", "images", "tokens", "options"),
    [
        (192, 3, 3, 65, {}),
        (32, 1, 61, 4, {}),  # several images a thread, the last group not full
        (40, 2, 7, 4, {}),  # widths that are no multiple of a vector
        (20, 2, 2, 5, {"mlp_ratio": 1.5}),
        (64, 4, 1, 130, {"qkv_bias": False, "proj_bias": False}),
        (48, 1, 2, 1, {}),
    ],
)
def test_it_is_timms_block(
    dtype: torch.dtype, width: int, heads: int, images: int, tokens: int, options: dict[str, Any]
) -> None:
    block = make(width, heads, **options).to(dtype)
    x, gradient = torch.randn(2, images, tokens, width).to(dtype).unbind()
    exact = x.double().requires_grad_()
    wanted = copy.deepcopy(block).double()(exact)
    (wanted_slope,) = torch.autograd.grad(wanted, exact, gradient.double())

    kernel, leaf = frozen(block), x.clone().requires_grad_()
    found = transformer_block(leaf, kernel)
    (slope,) = torch.autograd.grad(found, leaf, gradient)
    assert found.dtype == slope.dtype == dtype
    assert distance(found, wanted) < TYPES[dtype]
    assert distance(slope, wanted_slope) < TYPES[dtype]
    assert torch.equal(transformer_block(x, kernel), found)  # with or without a gradient


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("depth", "width"), [(256, 32), (40, 10), (768, 200), (6, 2)])
def test_a_linear_layer(dtype: torch.dtype, depth: int, width: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(depth, width).to(dtype).requires_grad_(False)
    kernel = FrozenLinear(layer.weight, layer.bias, dtype)
    x, gradient = torch.randn(5, 7, depth).to(dtype), torch.randn(5, 7, width).to(dtype)
    leaf = x.clone().requires_grad_()
    found = frozen_linear(leaf, kernel)
    (slope,) = torch.autograd.grad(found, leaf, gradient)
    exact, weight = x.double(), layer.weight.double()
    assert distance(found, exact @ weight.T + layer.bias.double()) < TYPES[dtype]
    assert distance(slope, gradient.double() @ weight) < TYPES[dtype]
    for part in (slice(1), (slice(3, None), 2), (0, 0)):  # the same bits in every batch
        assert torch.equal(frozen_linear(x[part], kernel), found[part])


def test_an_image_does_not_depend_on_its_batch(set_threads: Callable[[int], None]) -> None:
    kernel = frozen(make(32, 1))
    x = torch.randn(50, 4, 32)
    together = transformer_block(x, kernel)
    for threads in (1, 3):
        set_threads(threads)
        assert torch.equal(transformer_block(x, kernel), together)
    for first, last in ((0, 1), (7, 31), (49, 50)):
        assert torch.equal(transformer_block(x[first:last], kernel), together[first:last])


def test_copies_and_any_strides() -> None:
    kernel = frozen(make(32, 1))
    x = torch.randn(4, 3, 32).transpose(0, 1)
    wanted = transformer_block(x, kernel)
    assert torch.equal(transformer_block(x, copy.deepcopy(kernel)), wanted)
    assert transformer_block(x[:0], kernel).shape == (0, 4, 32)


def test_another_instruction_set_packs_anew(cpu_level: str) -> None:
    module: Any = native()
    kernel, x = frozen(make(32, 1).bfloat16()), torch.randn(3, 4, 32).bfloat16()
    wanted = transformer_block(x, kernel)
    module.set_cpu_level("portable")  # which has another layout than AVX512_BF16
    assert distance(transformer_block(x, kernel), wanted.double()) < TYPES[torch.bfloat16]
    module.set_cpu_level(cpu_level)
    assert torch.equal(transformer_block(x, kernel), wanted)


def test_nan_stays_in_its_image() -> None:
    x = torch.randn(30, 4, 32)
    x[11, 2, 5] = float("nan")
    found = transformer_block(x, frozen(make(32, 1)))
    assert found.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [11]


def test_refusals() -> None:
    kernel = frozen(make(32, 1))
    with pytest.raises(TypeError, match="x is torch.bfloat16; the block is of torch.float32"):
        transformer_block(torch.zeros(1, 4, 32).bfloat16(), kernel)
    layer = FrozenLinear(torch.zeros(4, 6), None, torch.float32)
    with pytest.raises(TypeError, match="x is torch.bfloat16; the layer is of torch.float32"):
        frozen_linear(torch.zeros(2, 6).bfloat16(), layer)
    with pytest.raises(ValueError, match=r"x has shape \[2, 4\]; it must be \[..., 6\]"):
        frozen_linear(torch.zeros(2, 4), layer)
    with pytest.raises(ValueError, match=r"x has shape \[4, 32\]; it must be \[B, N, 32\]"):
        transformer_block(torch.zeros(4, 32), kernel)
