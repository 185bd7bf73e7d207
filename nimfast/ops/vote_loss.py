# SPDX-License-Identifier: Apache-2.0
"""vote_loss: an attack's loss over the draws of a randomised model, and its gradient, in one pass.

Of every image: the mean over its S draws of cross-entropy, DLR or targeted DLR (Croce & Hein 2020,
section 4), how many draws are misclassified, and the derivative of the mean by the logits.

There is no CUDA C++ of it: a row is read once and reduced, and Triton keeps it in registers; one of
more than 8,192 classes is read in parts, and once more for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nimfast.ops.backend import TYPE_CODES, choose, native_call, on_device, register, tl, triton
from nimfast.ops.check import FLOATING, check

LOSSES = ("ce", "dlr", "dlr-targeted")  # the codes of csrc/vote_loss.h
_LEAST_CLASSES = {"ce": 1, "dlr": 3, "dlr-targeted": 4}
_ONE_BLOCK = 8192  # classes of which Triton holds a whole row: 16,384 spill to local memory

# --- reference ------------------------------------------------------------------------------------


def _reference(
    logits: Tensor, labels: Tensor, targets: Tensor | None, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], draws missed [N] and gradient [N*S, K] of the mean."""
    rows, classes = logits.shape
    images = labels.shape[0]
    z = logits.float()
    label = labels.repeat_interleave(rows // images)
    target = label if targets is None else targets.repeat_interleave(rows // images)
    valid = z.isfinite().all(1)
    for index in (label, target):
        valid = valid & (index >= 0) & (index < classes)
    label, target = label.clamp(0, classes - 1), target.clamp(0, classes - 1)

    def one_hot(index: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(index, classes).float()

    def logit(index: Tensor) -> Tensor:
        return z.gather(1, index[:, None])[:, 0]

    order = z.argsort(dim=1, descending=True, stable=True)  # equals: the lowest class first
    if loss == "ce":
        value = z.logsumexp(1) - logit(label)
        gradient = z.softmax(1) - one_hot(label)
    else:
        first, third = order[:, 0], order[:, 2]
        if loss == "dlr":
            rival = torch.where(first == label, order[:, 1], first)
            low, low_gradient = logit(third), one_hot(third)
        else:
            fourth, rival = order[:, 3], target
            low = (logit(third) + logit(fourth)) / 2
            low_gradient = (one_hot(third) + one_hot(fourth)) / 2
        spread = (logit(first) - low + 1e-12)[:, None]
        value = -(logit(label) - logit(rival)) / spread[:, 0]
        gradient = (one_hot(rival) - one_hot(label)) / spread
        gradient = gradient - value[:, None] / spread * (one_hot(first) - low_gradient)
    value = torch.where(valid, value, torch.nan)
    gradient = torch.where(valid[:, None], gradient, torch.nan) * (images / rows)
    missed = ~valid | (order[:, 0] != label)
    return value.view(images, -1).mean(1), missed.view(images, -1).sum(1), gradient


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _take_largest(rest, k, CLASSES: tl.constexpr):
        """Largest of every row, the lowest class that has it, and the row without that one."""
        best = tl.max(rest, axis=1)
        at = tl.min(tl.where(rest == best[:, None], k[None, :], CLASSES), axis=1)
        return best, at, tl.where(k[None, :] == at[:, None], float("-inf"), rest)

    @triton.jit
    def _kernel(
        logits, labels, targets, loss, missed, gradient, rows, samples, classes, share,
        LOSS: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    ):  # fmt: skip
        # ROWS rows of at most CLASSES logits each, all at once; loss and missed of every row.
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        k = tl.arange(0, CLASSES)
        inside = (row < rows)[:, None] & (k < classes)[None, :]
        at = row[:, None] * classes + k[None, :]
        z = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        label = tl.load(labels + row // samples, mask=row < rows, other=0)
        valid = (row < rows) & (label >= 0) & (label < classes)
        if LOSS == 2:
            rival = tl.load(targets + row // samples, mask=row < rows, other=0)
            valid = valid & (rival >= 0) & (rival < classes)
        # z - z is 0 for finite numbers only; tl.max skips NaN, so such rows are found by this.
        valid = valid & (tl.max(tl.where(z - z == 0.0, 0, 1), axis=1) == 0)
        z = tl.where(inside & valid[:, None], z, float("-inf"))
        of_label = tl.load(logits + row * classes + label, mask=valid, other=0.0).to(tl.float32)

        best, first, rest = _take_largest(z, k, CLASSES)
        if LOSS == 0:
            power = tl.exp(z - tl.where(valid, best, 0.0)[:, None])
            total = tl.sum(power, axis=1)
            value = tl.log(total) + (best - of_label)
            if GRADIENT:
                slope = power * (1.0 / total)[:, None]
                slope -= tl.where(k[None, :] == label[:, None], 1.0, 0.0)
        else:
            _, second, rest = _take_largest(rest, k, CLASSES)
            low, third, rest = _take_largest(rest, k, CLASSES)
            fourth = third
            if LOSS == 1:
                rival = tl.where(first == label, second, first).to(tl.int64)
            else:
                lower, fourth, rest = _take_largest(rest, k, CLASSES)
                low = 0.5 * (low + lower)
            of_rival = tl.load(logits + row * classes + rival, mask=valid, other=0.0)
            inverse = 1.0 / (best - low + 1e-12)
            value = (of_rival.to(tl.float32) - of_label) * inverse
            if GRADIENT:
                # Some of the five may be one class, so each is added.
                turn = value * inverse
                half = (0.5 * turn)[:, None]
                slope = tl.where(k[None, :] == rival[:, None], inverse[:, None], 0.0)
                slope -= tl.where(k[None, :] == label[:, None], inverse[:, None], 0.0)
                slope -= tl.where(k[None, :] == first[:, None], turn[:, None], 0.0)
                slope += tl.where(k[None, :] == third[:, None], half, 0.0)
                slope += tl.where(k[None, :] == fourth[:, None], half, 0.0)
        tl.store(loss + row, tl.where(valid, value, float("nan")), mask=row < rows)
        wrong = tl.where(valid & (first == label), 0, 1).to(tl.int64)
        tl.store(missed + row, wrong, mask=row < rows)
        if GRADIENT:
            slope = tl.where(valid[:, None], slope * share, float("nan"))
            tl.store(gradient + at, slope, mask=inside)

    @triton.jit
    def _wide_kernel(
        logits, labels, targets, loss, missed, gradient, rows, samples, classes, share,
        LOSS: tl.constexpr, GRADIENT: tl.constexpr, PART: tl.constexpr,
    ):  # fmt: skip
        # One row, in parts of PART classes: read once for the loss, once more for the gradient.
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * classes
        label = tl.load(labels + row // samples)
        valid = (label >= 0) & (label < classes)
        rival = label
        if LOSS == 2:
            rival = tl.load(targets + row // samples)
            valid = valid & (rival >= 0) & (rival < classes)
        of_label = tl.load(start + label, mask=valid, other=0.0).to(tl.float32)

        # The largest so far and their classes, and the sum of exp(z - best).
        none = float("-inf")
        best, second_value, third_value, fourth_value = none, none, none, none
        first, second, third, fourth = 0, 0, 0, 0
        total, odd = 0.0, 0
        for part in range(0, classes, PART):
            k = part + tl.arange(0, PART)
            z = tl.load(start + k, mask=k < classes, other=0.0).to(tl.float32)
            finite = z - z == 0.0
            odd += tl.max(tl.where(finite, 0, 1))
            rest = tl.where((k < classes) & finite, z, float("-inf"))
            if LOSS == 0:
                highest = tl.maximum(best, tl.max(rest))
                total = total * tl.exp(best - highest) + tl.sum(tl.exp(rest - highest))
            for _ in tl.static_range(1 if LOSS == 0 else 2 + LOSS):
                value = tl.max(rest)
                at = tl.min(tl.where(rest == value, k, 2147483647))
                rest = tl.where(k == at, float("-inf"), rest)
                # Into its place; of equals, the one that stands there is the lower class.
                if LOSS == 2:
                    fourth = tl.where(value > third_value, third,
                                      tl.where(value > fourth_value, at, fourth))  # fmt: skip
                    fourth_value = tl.maximum(fourth_value, tl.minimum(third_value, value))
                third = tl.where(value > second_value, second,
                                 tl.where(value > third_value, at, third))  # fmt: skip
                third_value = tl.maximum(third_value, tl.minimum(second_value, value))
                second = tl.where(value > best, first,
                                  tl.where(value > second_value, at, second))  # fmt: skip
                second_value = tl.maximum(second_value, tl.minimum(best, value))
                first = tl.where(value > best, at, first)
                best = tl.maximum(best, value)
        valid = valid & (odd == 0)

        inverse, turn = 0.0, 0.0
        if LOSS == 0:
            value = tl.log(total) + (best - of_label)
        else:
            low = third_value
            if LOSS == 1:
                rival = tl.where(first == label, second, first).to(tl.int64)
                fourth = third
            else:
                low = 0.5 * (third_value + fourth_value)
            of_rival = tl.load(start + rival, mask=valid, other=0.0).to(tl.float32)
            inverse = 1.0 / (best - low + 1e-12)
            value = (of_rival - of_label) * inverse
            turn = value * inverse
        tl.store(loss + row, tl.where(valid, value, float("nan")))
        tl.store(missed + row, tl.where(valid & (first == label), 0, 1).to(tl.int64))
        if GRADIENT:
            for part in range(0, classes, PART):
                k = part + tl.arange(0, PART)
                if LOSS == 0:
                    z = tl.load(start + k, mask=k < classes, other=0.0).to(tl.float32)
                    slope = tl.exp(z - best) * (1.0 / total)
                    slope -= tl.where(k == label, 1.0, 0.0)
                else:
                    slope = tl.where(k == rival, inverse, 0.0) - tl.where(k == label, inverse, 0.0)
                    slope -= tl.where(k == first, turn, 0.0)
                    slope += tl.where(k == third, 0.5 * turn, 0.0)
                    slope += tl.where(k == fourth, 0.5 * turn, 0.0)
                slope = tl.where(valid, slope * share, float("nan"))
                tl.store(gradient + row * classes + k, slope, mask=k < classes)


def _triton(
    logits: Tensor, labels: Tensor, targets: Tensor | None, loss: str, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    images = labels.shape[0]
    of_row = logits.new_empty(rows, dtype=torch.float32)
    missed = labels.new_empty(rows)
    width = max(16, triton.next_power_of_2(classes))
    rows_at_once = max(1, 2048 // width)
    if classes <= _ONE_BLOCK:
        kernel, size = _kernel, {"ROWS": rows_at_once, "CLASSES": width}
        warps = max(4, width // 512)
    else:
        kernel, size, warps = _wide_kernel, {"PART": 4096}, 8
    with on_device(logits.device):
        kernel[(triton.cdiv(rows, rows_at_once),)](
            logits, labels, labels if targets is None else targets, of_row, missed, gradient, rows,
            rows // images, classes, images / rows, LOSS=LOSSES.index(loss),
            GRADIENT=gradient.numel() > 0, num_warps=warps, enable_fp_fusion=False, **size,
        )  # fmt: skip
    return of_row.view(images, -1).mean(1), missed.view(images, -1).sum(1)


# --- registration ---------------------------------------------------------------------------------


def _implementation(
    logits: Tensor, labels: Tensor, targets: Tensor | None, loss: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = logits.shape
    images = labels.shape[0]
    value, missed, gradient = _fake(logits, labels, targets, loss, with_gradient)
    if images == 0:
        return value, missed, gradient
    if logits.device.type == "cpu":  # on a GPU the question would wait for it
        for name, index in (("labels", labels), ("targets", targets)):
            if index is not None and not 0 <= int(index.min()) <= int(index.max()) < classes:
                raise ValueError(
                    f"{name} has values from {int(index.min())} to {int(index.max())}; they must "
                    f"be classes, 0 to {classes - 1}"
                )
    logits, labels = logits.contiguous(), labels.contiguous()
    targets = None if targets is None else targets.contiguous()
    backend = choose("vote_loss", logits.device)
    if backend == "reference":
        value, missed, slopes = _reference(logits, labels, targets, loss)
        gradient = slopes if with_gradient else gradient
    elif backend == "triton":
        value, missed = _triton(logits, labels, targets, loss, gradient)
    else:
        native_call(
            "vote_loss", logits.device, logits.data_ptr(), TYPE_CODES[logits.dtype],
            labels.data_ptr(), 0 if targets is None else targets.data_ptr(), value.data_ptr(),
            missed.data_ptr(), gradient.data_ptr() if with_gradient else 0, images, rows // images,
            classes, LOSSES.index(loss),
        )  # fmt: skip
    return value, missed, gradient


def _fake(logits, labels, targets, loss, with_gradient):
    images = labels.shape[0]
    return (
        logits.new_empty(images, dtype=torch.float32),
        labels.new_empty(images),
        logits.new_empty(
            (logits.shape[0] if with_gradient else 0, logits.shape[1]), dtype=torch.float32
        ),
    )


register(
    "vote_loss(Tensor logits, Tensor labels, Tensor? targets, str loss, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)

# --- gradient -------------------------------------------------------------------------------------


class _VoteLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, targets, loss):
        value, missed, gradient = torch.ops.nimfast.vote_loss(logits, labels, targets, loss, True)
        # In float32: half precision would lose the small ones before the loss scale reaches them.
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.samples = logits.dtype, len(logits) // max(len(labels), 1)
        ctx.mark_non_differentiable(missed)
        return value, missed

    @staticmethod
    @once_differentiable
    def backward(ctx, of_value, of_missed):
        (gradient,) = ctx.saved_tensors
        of_rows = gradient.view(len(of_value), ctx.samples, gradient.shape[1])
        scaled = of_rows * of_value.view(-1, 1, 1)
        return scaled.view_as(gradient).to(ctx.dtype), None, None, None


# --- public ---------------------------------------------------------------------------------------


def vote_loss(
    logits: Tensor, labels: Tensor, *, loss: str = "ce", targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean attack loss of every image over its draws, and how many draws are misclassified.

    With z a row of logits, y its label, t its target and z_(1) >= z_(2) >= ... (Croce & Hein 2020):
    "ce": ``-log softmax(z)_y``; "dlr": ``-(z_y - max_{i != y} z_i) / (z_(1) - z_(3) + 1e-12)``;
    "dlr-targeted": ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)``. A row's class is its
    largest logit, the lowest class among equals. A row that holds NaN or an infinity is
    misclassified, and its loss and gradient are NaN, so those of its image are.

    Args:
        logits: float32, bfloat16 or float16 [N * S, K], draws of one image next to each other.
        labels: int64 [N].
        loss: "ce", "dlr" or "dlr-targeted".
        targets: int64 [N], for "dlr-targeted".

    Returns:
        (loss float32 [N], misclassified draws int64 [N]); the loss is differentiable once with
        respect to `logits`, the terms of the sorted logits included.

    Raises:
        TypeError: a tensor has a type that is not allowed.
        ValueError: a shape, device or loss that is not allowed; too few classes for the loss;
            targets missing or not used; on the CPU a label or target that is no class. On CUDA
            such a one makes its image's loss NaN.
    """
    check("logits", logits, FLOATING, (None, None), "[N * S, K]")
    rows, classes = logits.shape
    check("labels", labels, torch.int64, (None,), "[N]", logits)
    images = labels.shape[0]
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(map(repr, LOSSES))}")
    if classes < _LEAST_CLASSES[loss]:
        fitting = [repr(name) for name in LOSSES if classes >= _LEAST_CLASSES[name]]
        raise ValueError(
            f"logits has {classes} classes; {loss!r} needs at least {_LEAST_CLASSES[loss]}"
            + (f": use {' or '.join(fitting)}" if fitting else "")
        )
    if rows % images if images else rows:
        raise ValueError(f"logits has {rows} rows, which do not divide into {images} labels")
    if images and not rows:
        raise ValueError(f"logits has no row; {images} labels need at least one draw each")
    if (targets is None) == (loss == "dlr-targeted"):
        needed = "needed for" if targets is None else "used only with"
        raise ValueError(
            f"targets is {'None' if targets is None else 'given'}; {needed} loss 'dlr-targeted'"
        )
    if targets is not None:
        check("targets", targets, torch.int64, (images,), f"[{images}], one per image", logits)
    if torch.is_grad_enabled() and logits.requires_grad:
        result: tuple[Tensor, Tensor] = _VoteLoss.apply(logits, labels, targets, loss)
        return result
    return torch.ops.nimfast.vote_loss(logits, labels, targets, loss, False)[:2]
