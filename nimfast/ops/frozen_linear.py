# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight never changes: packed once, with a gradient by its input alone.

For attacks and certification on a CPU. A row's result does not depend on the rows beside it, so
batches of any size give the same bits, which the products of libraries do not promise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nimfast.ops.backend import TYPE_CODES, choose, large_empty, native, native_call
from nimfast.ops.linear import NOTHING, multiplies_bf16, pack

# Levels whose products are as fast as the library's or faster; of others that was never measured.
_WIDE = ("x86-64-v4-bf16", "x86-64-v4", "x86-64-v3")


def can_serve(dtype: torch.dtype) -> bool:
    """Whether frozen layers are the kernels' on a CPU, in this type: where those are faster.

    In float32 with AVX2 or more; in bfloat16 where the processor multiplies it in its vectors.
    """
    if choose("linear", torch.device("cpu")) != "native":
        return False
    if dtype == torch.bfloat16:
        return multiplies_bf16()
    module: Any = native()
    return dtype == torch.float32 and module.cpu_level() in _WIDE


class FrozenLinear:
    """``x weight' + bias``, packed for the processor when first used.

    Args:
        weight: ``[width, depth]``, both even.
        bias: ``[width]`` or None.
        dtype: of rows, float32 or bfloat16, to which the weight is rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.width, self.depth = weight.shape
        self.dtype = dtype
        self._weight = weight
        self.bias = torch.zeros(self.width + -self.width % 16)  # as the kernels read it
        if bias is not None:
            self.bias[: self.width] = bias
        self._words: dict[tuple[str, bool], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what was packed: a copy packs for itself."""
        return {**self.__dict__, "_words": {}}

    def words(self, level: str, across: bool) -> int:
        """Address of the packed weight, or of its transpose, on this instruction set."""
        key = (level, across)
        if key not in self._words:
            weight = self._weight.float().contiguous()
            # Where another thread was first, its result stays: kernels may be reading it.
            self._words.setdefault(key, pack(weight, self.dtype, across=across))
        return self._words[key].data_ptr()

    def product(self, x: Tensor, across: bool = False) -> Tensor:
        """``x weight' + bias``; or ``x weight``, which takes gradients of the result back."""
        module: Any = native()
        depth, width = (self.width, self.depth) if across else (self.depth, self.width)
        x = x.contiguous()
        out = large_empty(x, (*x.shape[:-1], width), x.dtype)
        native_call(
            "linear", x.device, TYPE_CODES[x.dtype], x.data_ptr(),
            self.words(module.cpu_level(), across), 0 if across else self.bias.data_ptr(), NOTHING,
            0, out.data_ptr(), 0, 0, 1, 1.0, x.numel() // depth, depth, width,
        )  # fmt: skip
        return out


def frozen_linear(x: Tensor, layer: FrozenLinear) -> Tensor:
    """Rows ``[..., depth]`` in the layer's type -> ``[..., width]``; differentiable once.

    Raises:
        TypeError: x is of another type.
        ValueError: x has rows of another length.
    """
    if x.dtype != layer.dtype:
        raise TypeError(f"x is {x.dtype}; the layer is of {layer.dtype}")
    if not x.ndim or x.shape[-1] != layer.depth:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [..., {layer.depth}]")
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Linear.apply(x, layer)
        return result
    return layer.product(x)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product(gradient, across=True), None
