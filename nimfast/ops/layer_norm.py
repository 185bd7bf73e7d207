# SPDX-License-Identifier: Apache-2.0
"""layer_norm: from residual sums in float32 to rows in bfloat16, and back.

For training on a CPU, as `nimfast.ops.linear`; so without autograd and torch's dispatcher. One pass
each, where torch takes one for the norm and one for every change of type. Sums are ``[B, N,
width]``, dense float32, of a width that is a multiple of 16; rows are bfloat16 ``[K, N, width]``,
of the images `kept` (int64 ``[K]``, increasing), or ``[B, N, width]`` of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nimfast.ops.backend import CPU_ALONE, choose, large_empty, native_call

CPU_ALONE.add("layer_norm")

_ROWS_OF_PART = 64  # of csrc/layer_norm.h


def take_rows(x: Tensor, gain: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """``gain * x`` in bfloat16."""
    if not _native(x):
        return (gain * _part(x, kept)).bfloat16()
    out = _rows(x, kept)
    native_call(
        "take_rows", x.device, *_places(x, kept), x.data_ptr(), gain, out.data_ptr(),
        *_sizes(out),
    )  # fmt: skip
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of each row, in bfloat16, and the rows' means and inverse deviations."""
    if not _native(x):
        part = _part(x, kept)
        normed, mean, scale = torch.native_layer_norm(part, weight.shape, weight, bias, eps)
        return normed.bfloat16(), mean.squeeze(-1), scale.squeeze(-1)
    out = _rows(x, kept)
    mean, scale = x.new_empty(2, *out.shape[:2]).unbind()
    native_call(
        "layer_norm", x.device, *_places(x, kept), x.data_ptr(), weight.data_ptr(),
        bias.data_ptr(), eps, out.data_ptr(), mean.data_ptr(), scale.data_ptr(), *_sizes(out),
    )  # fmt: skip
    return out, mean, scale


def layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    residual: Tensor,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the normed rows: `residual` plus that of x, and of weight and bias.

    `residual` (float32 ``[B, N, width]``) is the gradient of the sum that x goes into besides.
    """
    if not _native(x):
        change, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            gradient.float(), _part(x, kept), weight.shape, mean[..., None], scale[..., None],
            weight, torch.zeros_like(weight), [True, True, True],
        )  # fmt: skip
        total = residual + change if kept is None else residual.index_add(0, kept, change)
        return total, of_weight, of_bias
    out = large_empty(x, x.shape, torch.float32)
    copy_others(out, residual, kept)
    rows, width = _sizes(gradient)
    sums = x.new_empty(-(-rows // _ROWS_OF_PART), 2, width)
    native_call(
        "layer_norm_backward", x.device, *_places(x, kept), gradient.data_ptr(), x.data_ptr(),
        weight.data_ptr(), mean.data_ptr(), scale.data_ptr(), residual.data_ptr(), out.data_ptr(),
        sums.data_ptr(), rows, width,
    )  # fmt: skip
    of_weight, of_bias = sums.sum(0).unbind()
    return out, of_weight, of_bias


def copy_others(out: Tensor, x: Tensor, kept: Tensor | None) -> None:
    """Copy the images of `x` that are not `kept`."""
    if kept is not None:
        for image in sorted(set(range(len(x))) - set(kept.tolist())):
            out[image] = x[image]


def _native(x: Tensor) -> bool:
    return choose("layer_norm", x.device) == "native"


def _part(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x.index_select(0, kept)


def _rows(x: Tensor, kept: Tensor | None) -> Tensor:
    count = len(x) if kept is None else len(kept)
    return large_empty(x, (count, *x.shape[1:]), torch.bfloat16)


def _places(x: Tensor, kept: Tensor | None) -> tuple[int, int]:
    return 0 if kept is None else kept.data_ptr(), x.shape[1]


def _sizes(rows: Tensor) -> tuple[int, int]:
    return rows.numel() // rows.shape[-1], rows.shape[-1]
