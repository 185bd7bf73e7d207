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

from nimfast.ops.backend import CPU_ALONE, TYPE_CODES, choose, large_empty, native, native_call
from nimfast.ops.linear import multiplies_bf16, pack

CPU_ALONE.add("transformer_block")

# Levels whose products are as fast as the library's or faster; of others that was never measured.
_WIDE = ("x86-64-v4-bf16", "x86-64-v4", "x86-64-v3")


def can_serve(dtype: torch.dtype) -> bool:
    """Whether the kernels take blocks over on a CPU, in this type, and are faster there.

    In float32 with AVX2 or more; in bfloat16 where the processor multiplies it in its vectors.
    """
    if choose("transformer_block", torch.device("cpu")) != "native":
        return False
    if dtype == torch.bfloat16:
        return multiplies_bf16()
    module: Any = native()
    return dtype == torch.float32 and module.cpu_level() in _WIDE


class Norm(NamedTuple):
    """Layer norm over the last axis."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Linear(NamedTuple):
    """``x weight' + bias``, weight being ``[width, depth]``."""

    weight: Tensor
    bias: Tensor | None


class FrozenBlock:
    """The layers of a block, packed for the processor when they are first used.

    Args:
        norm1, qkv, heads, scale, proj, norm2, fc1, fc2: as in the module's docstring; `scale` is
            that of the products of queries and keys. All widths are even.
        dtype: of tokens, float32 or bfloat16, to which weights are rounded.
    """

    def __init__(
        self, norm1: Norm, qkv: Linear, heads: int, scale: float, proj: Linear, norm2: Norm,
        fc1: Linear, fc2: Linear, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.dtype = dtype
        self.width, self.inner, self.hidden = len(fc2.weight), proj.weight.shape[1], len(fc1.weight)
        self._heads, self._scale = heads, scale
        self._norms, self._linears = (norm1, norm2), (qkv, proj, fc1, fc2)
        self._kept: dict[object, Any] = {}  # whatever the addresses given to kernels point to

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses: a copy packs for itself."""
        return {**self.__dict__, "_kept": {}}

    def address(self, gradient: bool) -> int:
        """Of the description that the kernels read; its gradient needs every matrix twice."""
        module: Any = native()
        key = (module.cpu_level(), gradient)
        if key not in self._kept:
            norms = [module.FrozenNorm(*self._norm(norm)) for norm in self._norms]
            qkv, proj, fc1, fc2 = (
                module.FrozenLinear(*self._linear(linear, *key)) for linear in self._linears
            )
            self._kept[key] = module.BlockLayers(
                norms[0], qkv, proj, norms[1], fc1, fc2, self._heads, self._scale
            )
        address: int = self._kept[key].address
        return address

    def _norm(self, norm: Norm) -> tuple[int, int, float]:
        weight = torch.ones(self.width) if norm.weight is None else norm.weight.float()
        bias = torch.zeros(self.width) if norm.bias is None else norm.bias.float()
        return self._keep(weight), self._keep(bias), norm.eps

    def _linear(self, linear: Linear, level: str, gradient: bool) -> tuple[int, int, int, int, int]:
        weight, bias = linear
        width, depth = weight.shape
        words, across = (
            self._packed(weight, level, way) if way <= gradient else 0 for way in (False, True)
        )
        padded = torch.zeros(width + -width % 16)
        if bias is not None:
            padded[:width] = bias
        return words, self._keep(padded), across, depth, width

    def _packed(self, weight: Tensor, level: str, across: bool) -> int:
        key = (id(weight), level, across)
        if key not in self._kept:
            self._kept[key] = pack(weight.float(), self.dtype, across=across)
        address: int = self._kept[key].data_ptr()
        return address

    def _keep(self, values: Tensor) -> int:
        self._kept[id(values)] = values = values.contiguous()
        return values.data_ptr()


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
