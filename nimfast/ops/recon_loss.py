# SPDX-License-Identifier: Apache-2.0
"""recon_loss: error of predicted patch rows against the clean image, and its gradient, in one pass.

``loss = sum over counted patches of sum_d |prediction - target|^p / (counted patches * D)``

The target, a patch of the normalised image and perhaps standardised, is made where it is compared
and never stored. There are no CUDA kernels: the operation reads and writes each value once and
computes next to nothing, so on a GPU the memory limits it and Triton serves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
from nimfast.ops.check import FLOATING, check, check_count, check_normalisation
from nimfast.ops.corrupt import normalisation

EPSILON = 1e-6  # added to a patch's variance, as MAE does
MOST_CHANNELS = 4096  # the CPU kernel's buffer holds at least one pixel

# --- reference ------------------------------------------------------------------------------------


def _reference(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    losses: Tensor,
    gradient: Tensor,
    patch: int,
    norm_pix: bool,
    p: int,
) -> None:
    batch, channels, height, width = images.shape
    pixels = images.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    cut = pixels.view(batch, channels, height // patch, patch, width // patch, patch)
    target = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)
    if norm_pix:
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        target = (target - mean) / (variance + EPSILON).sqrt()
    difference = prediction.double() - target.repeat_interleave(len(prediction) // batch, 0)
    counted = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    difference = torch.where(counted[..., None], difference, 0.0)
    losses.copy_(difference.abs().pow(p).sum(-1))
    if gradient.numel():
        slope = 2 * difference if p == 2 else difference.sign()
        gradient.copy_(weight.double() * slope)


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _target(
        corner, scale, shift, start, end, width, plane,
        PATCH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Values start .. start + BLOCK of a patch row, not standardised; which are before end."""
        e = start + tl.arange(0, BLOCK)
        inside = e < end
        pixel, channel = e // CHANNELS, e % CHANNELS
        place = channel * plane + (pixel // PATCH) * width + pixel % PATCH
        value = tl.load(corner + place, mask=inside, other=0.0)
        gain = tl.load(scale + channel, mask=inside, other=0.0)
        return tl.fma(value, gain, tl.load(shift + channel, mask=inside, other=0.0)), inside

    @triton.jit
    def _kernel(
        prediction, images, mask, scale, shift, weight, losses, gradient,
        prediction_stride, image_stride, samples, height, width,
        PATCH: tl.constexpr, CHANNELS: tl.constexpr, NORM_PIX: tl.constexpr, P: tl.constexpr,
        MASKED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # One program: one patch of one row. Where BLOCK holds it, the loops have one turn and the
        # compiler keeps the target in registers; larger patches are read again from the cache.
        values: tl.constexpr = PATCH * PATCH * CHANNELS
        across = width // PATCH
        patches = (height // PATCH) * across
        item = tl.program_id(0).to(tl.int64)
        n, patch = item // patches, item % patches
        corner = images + (n // samples) * image_stride
        corner += (patch // across) * PATCH * width + (patch % across) * PATCH
        plane = height * width
        end = values
        if MASKED:  # a patch that is not counted reads nothing
            end = tl.where(tl.load(mask + item) != 0, values, 0)
        mean, gain = 0.0, 1.0
        if NORM_PIX:
            # The first value as the origin: no cancellation, and exactly 0 for a constant patch.
            origin = tl.fma(tl.load(corner), tl.load(scale), tl.load(shift))
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, values, BLOCK):
                target, inside = _target(
                    corner, scale, shift, start, end, width, plane, PATCH, CHANNELS, BLOCK
                )
                total += tl.where(inside, target - origin, 0.0)
            mean = origin + tl.sum(total) / values
            squares = tl.zeros([BLOCK], tl.float32)
            for start in range(0, values, BLOCK):
                target, inside = _target(
                    corner, scale, shift, start, end, width, plane, PATCH, CHANNELS, BLOCK
                )
                distance = tl.where(inside, target - mean, 0.0)
                squares = tl.fma(distance, distance, squares)
            gain = 1.0 / tl.sqrt(tl.sum(squares) / (values - 1) + 1e-6)
        slope = tl.load(weight) * P
        loss = tl.zeros([BLOCK], tl.float32)
        for start in range(0, values, BLOCK):
            target, inside = _target(
                corner, scale, shift, start, end, width, plane, PATCH, CHANNELS, BLOCK
            )
            e = start + tl.arange(0, BLOCK)
            row = prediction + n * prediction_stride + patch * values
            found = tl.load(row + e, mask=inside, other=0.0).to(tl.float32)
            difference = tl.where(inside, found - (target - mean) * gain, 0.0)
            if P == 2:
                loss = tl.fma(difference, difference, loss)
                direction = difference
            else:
                loss += tl.abs(difference)
                sign = tl.where(difference < 0, -1.0, 0.0)
                direction = tl.where(difference > 0, 1.0, sign)
            if GRADIENT:
                out = (slope * direction).to(gradient.dtype.element_ty)
                tl.store(gradient + item * values + e, out, mask=e < values)
        tl.store(losses + item, tl.sum(loss))


def _triton(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    losses: Tensor,
    gradient: Tensor,
    patch: int,
    norm_pix: bool,
    p: int,
) -> None:
    batch, channels, height, width = images.shape
    values = prediction.shape[2]
    block = min(1024, triton.next_power_of_2(values))
    # One warp holds a patch of 1,024 values in its registers: no barriers in the three sums, half
    # the instructions of four warps. Larger patches want more loads in flight.
    warps = 1 if values <= block else 4
    with on_device(images.device):
        _kernel[(losses.numel(),)](
            prediction, images, losses if mask is None else mask.view(torch.uint8), scale, shift,
            weight, losses, gradient, prediction.stride(0), images.stride(0),
            len(prediction) // batch, height, width, PATCH=patch, CHANNELS=channels,
            NORM_PIX=norm_pix, P=p, MASKED=mask is not None, GRADIENT=gradient.numel() > 0,
            BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


# --- registration ---------------------------------------------------------------------------------


def _number(value: float, device: torch.device) -> Tensor:
    """A number where kernels read it."""
    # Held on the CPU only: there, making it takes as long as a small loss; on a GPU a captured
    # graph could own its memory.
    return _held(value, device) if device.type == "cpu" else _held.__wrapped__(value, device)


@functools.lru_cache(maxsize=64)
def _held(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def _rest(prediction: Tensor) -> Tensor:
    """Room for the factor that the gradient is still to be multiplied by: float32 [0] or [1].

    A float16 gradient would underflow: it is multiplied by its share of the mean only in the
    backward pass, together with the loss scale. Others are complete.
    """
    return prediction.new_empty((int(prediction.dtype == torch.float16),), dtype=torch.float32)


def _implementation(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch: int,
    norm_pix: bool,
    p: int,
    mean: Sequence[float],
    std: Sequence[float],
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, patches, values = prediction.shape
    losses = prediction.new_empty((rows, patches), dtype=torch.float32)
    gradient = large_empty(
        prediction, prediction.shape if with_gradient else (0,), prediction.dtype
    )
    if losses.numel() == 0:
        return losses.mean(), gradient, _rest(prediction)
    if mask is None:
        total: int | Tensor = rows * patches * values
        share = _number(1.0 / (rows * patches * values), prediction.device)
    else:
        mask = mask.contiguous()
        total = mask.sum() * values
        # On a GPU the question would wait for the device; there the loss becomes 0 / 0.
        if mask.device.type == "cpu" and not total:
            raise ValueError("mask counts no patch; at least one must be True")
        share = total.reciprocal()  # float32
    rest, weight = _rest(prediction), share
    if rest.numel():
        rest, weight = rest.copy_(share), _number(1.0, prediction.device)
    if not prediction[0].is_contiguous():  # a row must be dense: one without its class token is
        prediction = prediction.contiguous()
    if not images[0].is_contiguous():
        images = images.contiguous()
    scale, shift = normalisation(tuple(mean), tuple(std), images.device)[:2]
    backend = choose("recon_loss", prediction.device)
    if backend == "native":
        batch, channels, height, width = images.shape
        native_call(
            "recon_loss", prediction.device, prediction.data_ptr(), prediction.stride(0),
            images.data_ptr(), images.stride(0), 0 if mask is None else mask.data_ptr(),
            scale.data_ptr(), shift.data_ptr(), weight.data_ptr(), losses.data_ptr(),
            gradient.data_ptr() if with_gradient else 0, TYPE_CODES[prediction.dtype], batch,
            rows // batch, channels, height, width, patch, int(norm_pix), p,
        )  # fmt: skip
    else:
        run = _triton if backend == "triton" else _reference
        run(
            prediction, images, mask, scale, shift, weight, losses, gradient, patch, norm_pix, p
        )  # fmt: skip
    # In float64, so that the order in which torch adds does not show.
    return (losses.sum(dtype=torch.float64) / total).float(), gradient, rest


def _fake(prediction, images, mask, patch, norm_pix, p, mean, std, with_gradient):
    gradient = prediction.new_empty(prediction.shape if with_gradient else (0,))
    return prediction.new_empty((), dtype=torch.float32), gradient, _rest(prediction)


register(
    "recon_loss(Tensor prediction, Tensor images, Tensor? mask, int patch, bool norm_pix, int p, "
    "float[] mean, float[] std, bool with_gradient) -> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)

# --- gradient -------------------------------------------------------------------------------------


class _ReconLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, *options):
        loss, gradient, rest = torch.ops.nimfast.recon_loss(prediction, *options, True)
        ctx.save_for_backward(gradient, rest)
        return loss

    @staticmethod
    def backward(ctx, incoming):
        # once_differentiable would pass in silence where only `incoming` is a constant.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("recon_loss is differentiable once; create_graph must be False")
        gradient, rest = ctx.saved_tensors
        none = (None,) * 7
        # [1] and not []: a scalar on a GPU would first be rounded to the gradient's type.
        factor = incoming.view(1) * rest if rest.numel() else incoming.view(1)
        # Only the CPU can look at the number without waiting for it.
        seen = factor.device.type == "cpu" and not torch.compiler.is_compiling()
        if seen and factor.item() == 1:
            return gradient, *none
        # Not in place: a graph that is kept is walked again.
        return torch.mul(gradient, factor, out=torch.empty_like(gradient)), *none


# --- public ---------------------------------------------------------------------------------------


def recon_loss(
    prediction: Tensor,
    images: Tensor,
    *,
    patch: int,
    norm_pix: bool = False,
    p: int = 2,
    mask: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Mean of |prediction - target|^p over the values of the counted patches.

    The target is the clean image, normalised by `mean` and `std` and cut into patches; with
    `norm_pix` each patch is standardised by its own mean and unbiased variance (plus 1e-6 inside
    the root). MAE (He et al., 2022, section 3): p = 2 over the removed patches; DMAE (Wu et al.,
    2023) and NIM: p = 2 over all; SimMIM (Xie et al., 2022, section 3.4): p = 1 over the masked.

    Args:
        prediction: float32, bfloat16 or float16 [N, L, D] with L = (H / patch) * (W / patch)
            row-major and D = patch * patch * C in (row, column, channel) order.
        images: float32 [B, C, H, W] in [0, 1]; N = B * S, the S predictions of one image next to
            each other. A constant: no gradient reaches it.
        patch: side of a patch in pixels.
        norm_pix: standardise every patch of the target.
        p: 1 or 2.
        mask: bool [N, L], True where a patch counts; default all.
        mean, std: per channel; default 0 and 1.

    Returns:
        Scalar float32, differentiable once with respect to `prediction` (where p is 1 and both are
        equal the gradient is 0). NaN when there is no patch at all, and on CUDA devices, where
        looking would wait, when the mask counts none.

    Raises:
        TypeError: a tensor has a type that is not allowed.
        ValueError: sizes, devices, patch, p, mean or std that are not allowed; a mask on the CPU
            that counts no patch.
        RuntimeError: from the backward pass, with ``create_graph=True``.
    """
    check("prediction", prediction, FLOATING, (None,) * 3, "[N, L, D]")
    check("images", images, torch.float32, (None,) * 4, "[B, C, H, W]", prediction)
    check_count("patch", patch)
    rows, (batch, channels, height, width) = len(prediction), images.shape
    if not 1 <= channels <= MOST_CHANNELS:
        raise ValueError(f"images have {channels} channels; there must be 1 to {MOST_CHANNELS}")
    if height % patch or width % patch:
        raise ValueError(f"patch is {patch}; it must divide the images' {height} x {width} pixels")
    patches, values = (height // patch) * (width // patch), patch * patch * channels
    check("prediction", prediction, FLOATING, (None, patches, values), (
        f"[N, {patches}, {values}] for images of shape {tuple(images.shape)} and patch {patch}"
    ))  # fmt: skip
    if rows % batch if batch else rows:
        raise ValueError(
            f"prediction has {rows} rows; there must be a multiple of {batch}, one per image"
        )
    if p not in (1, 2):
        raise ValueError(f"p is {p}; it must be 1 or 2")
    if norm_pix and values < 2:
        raise ValueError("norm_pix is True; a patch of one value has no variance")
    if mask is not None:
        meaning = f"[{rows}, {patches}], one value per patch"
        check("mask", mask, torch.bool, (rows, patches), meaning, prediction)
    mean, std = check_normalisation(mean, std, channels)
    options = (images, mask, patch, norm_pix, p, mean, std)
    if torch.is_grad_enabled() and prediction.requires_grad:
        loss: Tensor = _ReconLoss.apply(prediction, *options)
    else:
        loss = torch.ops.nimfast.recon_loss(prediction, *options, False)[0]
    return loss
