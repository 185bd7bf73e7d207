# SPDX-License-Identifier: Apache-2.0
"""mask_tokens: tokens with the masked ones replaced by a learned one, in one pass.

On a GPU Triton serves: forward and backward only move rows of D values, whole and in order, which
its compiler turns into the 16-byte accesses that CUDA C++ would be written with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nimfast.ops.backend import (
    TYPE_CODES,
    choose,
    large_empty,
    native_call,
    on_device,
    register,
    tl,
    triton,
)
from nimfast.ops.check import FLOATING, check

# --- reference ------------------------------------------------------------------------------------


def _reference(tokens: Tensor, mask_token: Tensor, mask: Tensor, out: Tensor) -> None:
    out.copy_(torch.where(mask[..., None], mask_token, tokens))


def _reference_backward(gradient: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    zero = gradient.new_zeros(())
    out.copy_(torch.where(mask[..., None], zero, gradient))
    return torch.where(mask[..., None], gradient, zero).sum((0, 1), dtype=torch.float32)


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _kernel(
        tokens, mask_token, mask, out, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        masked = (tl.load(mask + row, mask=row < rows, other=0) != 0)[:, None]
        at = row[:, None] * columns + column[None, :]
        # A masked token is not read. Floats, because the interpreter cannot select bfloat16.
        token = tl.load(tokens + at, mask=inside & (masked == 0), other=0.0).to(tl.float32)
        learned = tl.load(mask_token + column, mask=column < columns, other=0.0).to(tl.float32)
        value = tl.where(masked, learned[None, :], token)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        gradient, mask, out, partial, rows, rows_per_part, columns,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        # One program: COLUMNS columns of one part. Parts are added up later, in order, so the sum
        # is the same each time; atomic additions would not be.
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first = tl.program_id(0).to(tl.int64) * rows_per_part
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(0, rows_per_part, ROWS):
            offset = step + tl.arange(0, ROWS)
            row = first + offset
            here = (row < rows) & (offset < rows_per_part)
            inside = here[:, None] & (column < columns)[None, :]
            masked = (tl.load(mask + row, mask=here, other=0) != 0)[:, None]
            at = row[:, None] * columns + column[None, :]
            value = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(masked, value, 0.0)
            kept = tl.where(masked, 0.0, value)
            tl.store(out + at, kept.to(out.dtype.element_ty), mask=inside)
        at = tl.program_id(0).to(tl.int64) * columns + column
        tl.store(partial + at, tl.sum(total, axis=0), mask=column < columns)


def _tile(columns: int) -> dict[str, int]:
    width = min(triton.next_power_of_2(columns), 1024)
    return {"ROWS": max(1, 2048 // width), "COLUMNS": width}


def _triton(tokens: Tensor, mask_token: Tensor, mask: Tensor, out: Tensor) -> None:
    rows, columns = mask.numel(), tokens.shape[2]
    tile = _tile(columns)
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(columns, tile["COLUMNS"]))
    with on_device(tokens.device):
        _kernel[grid](
            tokens, mask_token, mask.view(torch.uint8), out, rows, columns, **tile,
            enable_fp_fusion=False,
        )  # fmt: skip


def _triton_backward(
    gradient: Tensor, mask: Tensor, out: Tensor, partial: Tensor, rows_per_part: int
) -> None:
    rows, columns = mask.numel(), gradient.shape[2]
    tile = _tile(columns)
    grid = (partial.shape[0], triton.cdiv(columns, tile["COLUMNS"]))
    with on_device(gradient.device):
        _backward_kernel[grid](
            gradient, mask.view(torch.uint8), out, partial, rows, rows_per_part, columns, **tile,
            enable_fp_fusion=False,
        )  # fmt: skip


# --- registration ---------------------------------------------------------------------------------


def _fake(tokens, mask_token, mask):
    return tokens.new_empty(tokens.shape)


def _implementation(tokens: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    out = large_empty(tokens, tokens.shape, tokens.dtype)
    if out.numel() == 0:
        return out
    tokens, mask = tokens.contiguous(), mask.contiguous()
    mask_token = mask_token.to(tokens.dtype).contiguous()
    backend = choose("mask_tokens", tokens.device)
    if backend == "reference":
        _reference(tokens, mask_token, mask, out)
    elif backend == "triton":
        _triton(tokens, mask_token, mask, out)
    else:
        native_call(
            "mask_tokens", tokens.device, tokens.data_ptr(), mask_token.data_ptr(),
            mask.data_ptr(), out.data_ptr(), TYPE_CODES[tokens.dtype], mask.numel(),
            tokens.shape[2],
        )  # fmt: skip
    return out


def _fake_backward(gradient, mask):
    total = gradient.new_empty(gradient.shape[2:], dtype=torch.float32)
    return gradient.new_empty(gradient.shape), total


def _backward(gradient: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    out = large_empty(gradient, gradient.shape, gradient.dtype)
    total = gradient.new_empty(gradient.shape[2:], dtype=torch.float32)
    if out.numel() == 0:
        return out, total.zero_()
    gradient, mask = gradient.contiguous(), mask.contiguous()
    rows, columns = mask.numel(), gradient.shape[2]
    backend = choose("mask_tokens", gradient.device)
    if backend == "reference":
        return out, _reference_backward(gradient, mask, out)
    # 512 parts keep a GPU busy; the size of the batch alone settles them, so that a sum does not
    # depend on threads.
    rows_per_part = max(32, -(-rows // 512))
    partial = total.new_empty((-(-rows // rows_per_part), columns))
    if backend == "triton":
        _triton_backward(gradient, mask, out, partial, rows_per_part)
    else:
        native_call(
            "mask_tokens_backward", gradient.device, gradient.data_ptr(), mask.data_ptr(),
            out.data_ptr(), partial.data_ptr(), TYPE_CODES[gradient.dtype], rows, rows_per_part,
            columns,
        )  # fmt: skip
    return out, partial.sum(0)


register(
    "mask_tokens(Tensor tokens, Tensor mask_token, Tensor mask) -> Tensor", _implementation, _fake
)
register(
    "mask_tokens_backward(Tensor gradient, Tensor mask) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)

# --- gradient -------------------------------------------------------------------------------------


class _MaskTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, mask_token, mask):
        ctx.save_for_backward(mask)
        ctx.kind = mask_token.dtype
        return torch.ops.nimfast.mask_tokens(tokens, mask_token, mask)

    @staticmethod
    def backward(ctx, gradient):
        tokens, total = torch.ops.nimfast.mask_tokens_backward(gradient, *ctx.saved_tensors)
        return tokens, total.to(ctx.kind), None


# --- public ---------------------------------------------------------------------------------------


def mask_tokens(tokens: Tensor, mask_token: Tensor, mask: Tensor) -> Tensor:
    """Replace the masked tokens by the mask token.

    Differentiable with respect to both: a masked token has gradient zero, the mask token the sum
    over the masked places, taken in float32 and in an order that threads do not change.

    Args:
        tokens: float32, bfloat16 or float16 [N, L, D].
        mask_token: [D], of any of these types; it is cast to that of the tokens, its gradient is
            not.
        mask: bool [N, L], True where the token is replaced.

    Returns:
        [N, L, D] in the type of the tokens.

    Raises:
        TypeError: a tensor has a type that is not allowed.
        ValueError: shapes or devices that do not fit together.
    """
    check("tokens", tokens, FLOATING, (None,) * 3, "[N, L, D]")
    batch, patches, width = tokens.shape
    check("mask_token", mask_token, FLOATING, (width,), f"[{width}], as wide as tokens", tokens)
    meaning = f"[{batch}, {patches}], one value per token"
    check("mask", mask, torch.bool, (batch, patches), meaning, tokens)
    if torch.is_grad_enabled() and (tokens.requires_grad or mask_token.requires_grad):
        result: Tensor = _MaskTokens.apply(tokens, mask_token, mask)
        return result
    return torch.ops.nimfast.mask_tokens(tokens, mask_token, mask)
