# SPDX-License-Identifier: Apache-2.0
"""votes: argmax of every row of logits, added to integer counts that stay on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from nimfast.ops.backend import TYPE_CODES, choose, native_call, on_device, register, tl, triton
from nimfast.ops.check import FLOATING, check

# --- reference ------------------------------------------------------------------------------------


def _reference(logits: Tensor, counts: Tensor, index: Tensor, valid: Tensor) -> None:
    classes = logits.shape[1]
    slots = index.shape[0]
    finite = logits.isfinite().all(1)
    best = logits.amax(1, keepdim=True)
    # argmax may return any of several maxima; the first one is the lowest class.
    winner = torch.where(finite, (logits == best).int().argmax(1), classes).view(slots, -1)
    row = torch.arange(winner.shape[1], device=logits.device)
    counted = (row < valid[:, None]) & ((index >= 0) & (index < counts.shape[0]))[:, None]
    cell = torch.where(counted, index[:, None] * (classes + 1) + winner, 0)
    counts.view(-1).index_add_(0, cell.view(-1), counted.view(-1).long())


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _kernel(
        logits, counts, index, valid, rows, rows_per_slot, classes, groups,
        ROWS: tl.constexpr, CLASSES: tl.constexpr,
    ):  # fmt: skip
        # ROWS rows of at most CLASSES logits each, all at once.
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        k = tl.arange(0, CLASSES)
        inside = (row < rows)[:, None] & (k < classes)[None, :]
        value = tl.load(logits + row[:, None] * classes + k[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        # x - x is 0 for finite numbers only. Triton's argmax skips NaN, so such rows are taken out
        # by this.
        broken = tl.max(tl.where(value - value == 0.0, 0, 1), axis=1)
        value = tl.where(inside & (value - value == 0.0), value, float("-inf"))
        best = tl.max(value, axis=1)
        winner = tl.min(tl.where(inside & (value == best[:, None]), k[None, :], CLASSES), axis=1)
        slot = row // rows_per_slot
        group = tl.load(index + slot, mask=row < rows, other=-1)
        limit = tl.load(valid + slot, mask=row < rows, other=0)
        counted = (row < rows) & (row % rows_per_slot < limit) & (group >= 0) & (group < groups)
        cell = group * (classes + 1) + tl.where(broken > 0, classes, winner)
        tl.atomic_add(counts + cell, tl.full([ROWS], 1, tl.int64), mask=counted)


def _triton(logits: Tensor, counts: Tensor, index: Tensor, valid: Tensor) -> None:
    rows, classes = logits.shape
    width = triton.next_power_of_2(classes)
    rows_at_once = max(1, 4096 // width)
    with on_device(logits.device):
        _kernel[(triton.cdiv(rows, rows_at_once),)](
            logits, counts, index, valid, rows, rows // index.shape[0], classes, counts.shape[0],
            ROWS=rows_at_once, CLASSES=width,
        )  # fmt: skip


# --- registration ---------------------------------------------------------------------------------


def _implementation(logits: Tensor, counts: Tensor, index: Tensor, valid: Tensor) -> None:
    if logits.numel() == 0 or index.numel() == 0:
        return
    logits, index, valid = logits.contiguous(), index.contiguous(), valid.contiguous()
    backend = choose("votes", logits.device)
    if backend == "reference":
        _reference(logits, counts, index, valid)
    elif backend == "triton":
        _triton(logits, counts, index, valid)
    else:
        rows, classes = logits.shape
        native_call(
            "votes", logits.device, logits.data_ptr(), TYPE_CODES[logits.dtype], counts.data_ptr(),
            index.data_ptr(), valid.data_ptr(), index.shape[0], rows // index.shape[0], classes,
            counts.shape[0],
        )  # fmt: skip


register(
    "votes(Tensor logits, Tensor(a!) counts, Tensor index, Tensor valid) -> ()",
    _implementation,
    lambda logits, counts, index, valid: None,
)


# --- public ---------------------------------------------------------------------------------------


def votes(
    logits: Tensor, counts: Tensor, *, index: Tensor | None = None, valid: Tensor | None = None
) -> None:
    """Add every row's vote to `counts`, in place, without waiting for the device.

    The rows are cut into equal consecutive slots, one for each entry of `index`. A row votes for
    its largest logit, for the lowest class among equals. A row that holds NaN or an infinity is no
    vote: it is counted in the last column.

    Args:
        logits: float32, bfloat16 or float16 [N, K].
        counts: int64 [G, K + 1], contiguous.
        index: int64 [slots], the row of `counts` that each slot adds to; default 0 .. G - 1. Slots
        that name no
            row of `counts` are not counted.
        valid: int64 [slots], how many leading rows of each slot count, the others being padding;
        default all.

    Raises:
        TypeError: a tensor has a type that is not allowed.
        ValueError: shapes or devices that do not fit together.
    """
    check("logits", logits, FLOATING, (None, None), "[N, K]")
    rows, classes = logits.shape
    if classes < 1:
        raise ValueError("logits has no column; it must be [N, K] with at least one class")
    columns = (
        f"contiguous [G, {classes + 1}]: one column for each class and one for rows that are not "
        f"finite"
    )
    check("counts", counts, torch.int64, (None, classes + 1), columns, logits)
    if not counts.is_contiguous():
        raise ValueError(f"counts has strides {counts.stride()}; it must be {columns}")
    if index is None:
        index = torch.arange(counts.shape[0], device=logits.device)
    check("index", index, torch.int64, (None,), "[slots]", logits)
    slots = index.shape[0]
    if valid is None:
        valid = torch.full((slots,), rows, dtype=torch.int64, device=logits.device)
    check("valid", valid, torch.int64, (slots,), f"[{slots}], one value per slot", logits)
    if rows and (slots == 0 or rows % slots):
        raise ValueError(f"logits has {rows} rows, which do not divide into {slots} equal slots")
    torch.ops.nimfast.votes(logits.detach(), counts, index, valid)
