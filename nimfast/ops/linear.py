# SPDX-License-Identifier: Apache-2.0
"""linear: the products of a linear layer in bfloat16, and what stands next to them in a network.

For training on a CPU that multiplies bfloat16 in its vectors. torch adds the bias, applies GELU and
adds residuals in passes of their own, rounds in between and casts weights at every step; here that
happens while the sums are in the cache. They are steps of `train.blocks`, which writes out their
gradients, and so neither differentiable nor operations of torch's dispatcher.

Rows are bfloat16 ``[..., depth]``, dense; weights and biases float32, as an optimiser keeps them.
Weights are rounded to bfloat16, as autocast does; biases are not. Sums are float32, and rounded
once. Widths and depths are multiples of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nimfast.ops.backend import CPU_ALONE, TYPE_CODES, choose, large_empty, native, native_call
from nimfast.ops.layer_norm import copy_others

CPU_ALONE.add("linear")

NOTHING, _GELU, _TIMES, _ADD = range(4)  # the codes of csrc/linear.h


def multiplies_bf16() -> bool:
    """Whether our products of bfloat16 are worth it here: AVX512_BF16, and not AMX's tiles.

    For tiles torch has products that are several times as fast.
    """
    module, cpu = native(), torch.cpu
    tiles: bool = cpu._is_amx_tile_supported()
    return module is not None and module.cpu_level() == "x86-64-v4-bf16" and not tiles


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, across: bool = False
) -> Tensor:
    """``x weight' + bias``, or ``x weight`` where `across`: rows of bfloat16 ``[..., width]``."""
    if not _native(x):
        return _product(x, weight, bias, across).bfloat16()
    out = _rows(x, weight.shape[across])
    _run(x, weight, bias, across, NOTHING, out)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``gelu(x weight' + bias)`` and the derivative of gelu there, both ``[..., width]``."""
    if not _native(x):
        before = _product(x, weight, bias, False)
        slope = torch.ops.aten.gelu_backward(torch.ones_like(before), before)
        return F.gelu(before).bfloat16(), slope.bfloat16()
    out, slope = (_rows(x, weight.shape[0]) for _ in range(2))
    _run(x, weight, bias, False, _GELU, out, slope=slope)
    return out, slope


def linear_times(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """``(x weight) * factor``, rows of bfloat16 ``[..., width]`` as `factor` is."""
    if not _native(x):
        return (_product(x, weight, None, True) * factor).bfloat16()
    out = _rows(x, weight.shape[1])
    _run(x, weight, None, True, _TIMES, out, other=factor)
    return out


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gain: float = 1.0,
    kept: Tensor | None = None,
) -> Tensor:
    """``residual + gain (x weight' + bias)`` in float32 ``[B, N, width]``, as `residual`.

    With `kept` (int64 ``[K]``, increasing) x is ``[K, N, depth]``, of these images alone; the
    others are those of `residual`.
    """
    if not _native(x):
        change = gain * _product(x, weight, bias, False)
        return residual + change if kept is None else residual.index_add(0, kept, change)
    out = large_empty(residual, residual.shape, torch.float32)
    copy_others(out, residual, kept)
    _run(x, weight, bias, False, _ADD, out, other=residual, gain=gain, kept=kept)
    return out


def pack(weight: Tensor, dtype: torch.dtype, *, across: bool = False) -> Tensor:
    """``weight`` [width, depth] float32, or [depth, width] where `across`, as the kernels read it.

    For rows of `dtype`, float32 or bfloat16, to which it is rounded, and for the instruction set in
    use now. Both sides are filled up to multiples of 16 with zeros.
    """
    missing = [-side % 16 for side in weight.shape]
    if any(missing):
        weight = F.pad(weight, (0, missing[1], 0, missing[0]))
    depth, width = weight.shape if across else weight.shape[::-1]
    packed = torch.empty(depth * width, dtype=torch.float32)
    native_call(
        "pack", weight.device, weight.data_ptr(), packed.data_ptr(), depth, width, across,
        TYPE_CODES[dtype],
    )  # fmt: skip
    return packed


def weight_gradient(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``gradient' x`` and the sums of gradient's columns over all rows, float32.

    The gradients of weight ``[width, depth]`` and bias ``[width]`` of a layer that took `x` and
    whose result has `gradient`.
    """
    width, depth = gradient.shape[-1], x.shape[-1]
    if not _native(x):
        g = gradient.reshape(-1, width).float()
        with torch.autocast(x.device.type, enabled=False):
            return g.T @ x.reshape(-1, depth).float(), g.sum(0)
    weight, bias = (x.new_empty(shape, dtype=torch.float32) for shape in ((width, depth), (width,)))
    native_call(
        "weight_gradient", x.device, gradient.data_ptr(), x.data_ptr(), weight.data_ptr(),
        bias.data_ptr(), x.numel() // depth, depth, width,
    )  # fmt: skip
    return weight, bias


def _native(x: Tensor) -> bool:
    return choose("linear", x.device) == "native"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, across: bool) -> Tensor:
    """The same sums by torch, before rounding."""
    w = weight.bfloat16().float()
    with torch.autocast(x.device.type, enabled=False):  # it would have the sums rounded
        return F.linear(x.float(), w.T if across else w, bias)


def _rows(x: Tensor, width: int) -> Tensor:
    return large_empty(x, (*x.shape[:-1], width), torch.bfloat16)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    across: bool,
    after: int,
    out: Tensor,
    *,
    other: Tensor | None = None,
    slope: Tensor | None = None,
    gain: float = 1.0,
    kept: Tensor | None = None,
) -> None:
    packed = pack(weight, x.dtype, across=across)
    native_call(
        "linear", x.device, TYPE_CODES[x.dtype], x.data_ptr(), packed.data_ptr(), _address(bias),
        after, _address(other), out.data_ptr(), _address(slope), _address(kept),
        x.shape[1] if kept is not None else 1, gain, x.numel() // x.shape[-1], x.shape[-1],
        out.shape[-1],
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
