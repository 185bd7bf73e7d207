# SPDX-License-Identifier: Apache-2.0
"""attention: softmax(scale q k') v of every head, straight from the linear layer that made them.

On a CPU alone. torch's own attention there wants queries, keys and values as three tensors, and
in half precision it converts tile after tile to float32 and back; for the tens to hundreds of
tokens of a small ViT that costs more than the products (docs/kernels.md). On a GPU its fused
kernels read strided heads, are tuned for every generation, and serve here too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nimfast.ops.backend import TYPE_CODES, choose, large_empty, native_call, register
from nimfast.ops.check import FLOATING, check, check_count

# --- reference ------------------------------------------------------------------------------------


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [B, H, N, D] each, as views."""
    batch, tokens, width = qkv.shape
    split = qkv.view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q.float() @ k.float().mT * scale).softmax(-1)


def _reference(qkv: Tensor, heads: int, scale: float) -> Tensor:
    q, k, v = _parts(qkv, heads)
    mixed = _weights(q, k, scale) @ v.float()  # [B, H, N, D]
    return mixed.transpose(1, 2).flatten(2).to(qkv.dtype)


def _reference_backward(gradient: Tensor, qkv: Tensor, heads: int, scale: float) -> Tensor:
    q, k, v = _parts(qkv, heads)
    weights = _weights(q, k, scale)
    mixed = gradient.view(*gradient.shape[:2], heads, -1).transpose(1, 2).float()  # [B, H, N, D]
    slopes = mixed @ v.float().mT
    slopes = scale * weights * (slopes - (weights * slopes).sum(-1, keepdim=True))  # of the scores
    parts = torch.stack([slopes @ k.float(), slopes.mT @ q.float(), weights.mT @ mixed])
    return parts.permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)  # [B, N, 3 * H * D]


# --- registration ---------------------------------------------------------------------------------


def _native(
    operation: str, gradient: Tensor | None, qkv: Tensor, heads: int, scale: float, out: Tensor
) -> None:
    batch, tokens, width = qkv.shape
    native_call(
        operation, qkv.device, 0 if gradient is None else gradient.data_ptr(), qkv.data_ptr(),
        out.data_ptr(), qkv.stride(0), qkv.stride(1), batch, tokens, heads, width // (3 * heads),
        scale, TYPE_CODES[qkv.dtype],
    )  # fmt: skip


def _dense_rows(qkv: Tensor) -> Tensor:
    return qkv if qkv.stride(2) == 1 else qkv.contiguous()


def _implementation(qkv: Tensor, heads: int, scale: float) -> Tensor:
    out = large_empty(qkv, (*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype)
    if out.numel() == 0:
        return out
    if choose("attention", qkv.device) == "reference":
        return _reference(qkv, heads, scale)
    _native("attention", None, _dense_rows(qkv), heads, scale, out)
    return out


def _backward(gradient: Tensor, qkv: Tensor, heads: int, scale: float) -> Tensor:
    out = large_empty(qkv, qkv.shape, qkv.dtype)
    if out.numel() == 0:
        return out
    if choose("attention", qkv.device) == "reference":
        return _reference_backward(gradient.contiguous(), qkv, heads, scale)
    _native("attention_backward", gradient.contiguous(), _dense_rows(qkv), heads, scale, out)
    return out


register(
    "attention(Tensor qkv, int heads, float scale) -> Tensor",
    _implementation,
    lambda qkv, heads, scale: qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3)),
    cpu_alone=True,
)
register(
    "attention_backward(Tensor gradient, Tensor qkv, int heads, float scale) -> Tensor",
    _backward,
    lambda gradient, qkv, heads, scale: qkv.new_empty(qkv.shape),
)

# --- gradient -------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, heads, scale):
        ctx.save_for_backward(qkv)
        ctx.heads, ctx.scale = heads, scale
        return torch.ops.nimfast.attention(qkv, heads, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (qkv,) = ctx.saved_tensors
        return torch.ops.nimfast.attention_backward(gradient, qkv, ctx.heads, ctx.scale), None, None


# --- public ---------------------------------------------------------------------------------------


def attention(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Multi-head self-attention (Vaswani et al. 2017, equation 1) over all tokens.

    Sums, the softmax and its maximum are float32. In bfloat16 probabilities are rounded to it
    where the processor multiplies in it (AVX512_BF16), as a plain softmax would round them. On
    the CPU nothing but `qkv` is kept for the gradient, which computes the probabilities anew.

    Args:
        qkv: float32, bfloat16 or float16 [B, N, 3 * H * D]: queries of all heads, then keys, then
            values, as a linear layer leaves them; any strides.
        heads: H.
        scale: of the products of queries and keys; default 1 / sqrt(D).

    Returns:
        [B, N, H * D] in the type of `qkv`, heads next to each other; differentiable, on the CPU
        once.

    Raises:
        TypeError: a tensor has a type that is not allowed.
        ValueError: a width that is no multiple of 3 * heads, a scale that is not positive.
    """
    check("qkv", qkv, FLOATING, (None, None, None), "[B, N, 3 * H * D]")
    check_count("heads", heads)
    width = qkv.shape[2]
    if width % (3 * heads) or not width:
        raise ValueError(
            f"qkv has {width} values per token; they must be a positive multiple of 3 * heads = "
            f"{3 * heads}"
        )
    if scale is None:
        scale = 1 / math.sqrt(width // (3 * heads))
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    if qkv.device.type not in ("cpu", "meta"):
        mixed = torch.nn.functional.scaled_dot_product_attention(*_parts(qkv, heads), scale=scale)
        return mixed.transpose(1, 2).flatten(2)
    if torch.is_grad_enabled() and qkv.requires_grad:
        result: Tensor = _Attention.apply(qkv, heads, scale)
        return result
    result = torch.ops.nimfast.attention(qkv, heads, scale)
    return result
