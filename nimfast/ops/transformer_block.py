# SPDX-License-Identifier: Apache-2.0
"""A transformer block with frozen weights, and its gradient by the input, each in one call.

``m = x + proj(attention(qkv(norm1(x))))``, then ``m + fc2(gelu(fc1(norm2(m))))``, for attacks and
certification on a CPU. A thread takes an image or a few through the whole block, so that what the
steps hand on stays in its cache; torch takes a pass over memory for each. Sums, norms and the
residuals within the block are float32; what products read is rounded to the type of x. In bfloat16
that is less rounding than the layers one by one do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nimfast.ops.backend import TYPE_CODES, large_empty, native, native_call
from nimfast.ops.frozen_linear import FrozenLinear


class Norm(NamedTuple):
    """Layer norm over the last axis."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class FrozenBlock:
    """The layers of a block, described for the kernels when first used.

    Args:
        norm1, qkv, heads, scale, proj, norm2, fc1, fc2: as in the module's docstring; `scale` is
            that of the products of queries and keys.
    """

    def __init__(
        self, norm1: Norm, qkv: FrozenLinear, heads: int, scale: float, proj: FrozenLinear,
        norm2: Norm, fc1: FrozenLinear, fc2: FrozenLinear,
    ) -> None:  # fmt: skip
        self.dtype = fc2.dtype
        self.width, self.inner, self.hidden = fc2.width, proj.depth, fc1.width
        self._heads, self._scale = heads, scale
        self._norms = [self._rows(norm) for norm in (norm1, norm2)]
        self._linears = (qkv, proj, fc1, fc2)
        self._described: dict[tuple[str, bool], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses: a copy describes itself."""
        return {**self.__dict__, "_described": {}}

    def address(self, gradient: bool) -> int:
        """Of the description that the kernels read; for a gradient, of every matrix twice."""
        module: Any = native()
        level = module.cpu_level()
        if (level, gradient) not in self._described:
            norms = [
                module.FrozenNorm(weight.data_ptr(), bias.data_ptr(), eps)
                for weight, bias, eps in self._norms
            ]
            qkv, proj, fc1, fc2 = (
                module.FrozenLinear(
                    layer.words(level, False), layer.bias.data_ptr(),
                    layer.words(level, True) if gradient else 0, layer.depth, layer.width,
                )
                for layer in self._linears
            )  # fmt: skip
            found = module.BlockLayers(
                norms[0], qkv, proj, norms[1], fc1, fc2, self._heads, self._scale
            )
            self._described.setdefault((level, gradient), found)  # another thread's may be in use
        address: int = self._described[level, gradient].address
        return address

    def _rows(self, norm: Norm) -> tuple[Tensor, Tensor, float]:
        weight = torch.ones(self.width) if norm.weight is None else norm.weight.float()
        bias = torch.zeros(self.width) if norm.bias is None else norm.bias.float()
        return weight.contiguous(), bias.contiguous(), norm.eps


def transformer_block(x: Tensor, block: FrozenBlock) -> Tensor:
    """Tokens ``[B, N, width]`` in the block's type -> the same; differentiable once.

    Raises:
        TypeError: x is of another type.
        ValueError: x has another shape.
    """
    if x.dtype != block.dtype:
        raise TypeError(f"x is {x.dtype}; the block is of {block.dtype}")
    if x.ndim != 3 or x.shape[2] != block.width:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [B, N, {block.width}]")
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Block.apply(x, block)
        return result
    return _run("transformer_block", block, x.contiguous(), None, [None] * 3)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: FrozenBlock) -> Tensor:
        x = x.contiguous()
        kept = [
            large_empty(x, (*x.shape[:2], width), x.dtype)
            for width in (3 * block.inner, block.width, block.hidden)
        ]
        ctx.block = block
        ctx.save_for_backward(x, *kept)
        return _run("transformer_block", block, x, None, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, *kept = ctx.saved_tensors
        return _run("transformer_block_backward", ctx.block, x, gradient.contiguous(), kept), None


def _run(
    operation: str, block: FrozenBlock, x: Tensor, gradient: Tensor | None,
    kept: list[Tensor] | list[None],
) -> Tensor:  # fmt: skip
    out = large_empty(x, x.shape, x.dtype)
    if out.numel():
        native_call(
            operation, x.device, block.address(gradient is not None), _address(gradient),
            x.data_ptr(), out.data_ptr(), *map(_address, kept), len(x), x.shape[1],
            TYPE_CODES[x.dtype],
        )  # fmt: skip
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
