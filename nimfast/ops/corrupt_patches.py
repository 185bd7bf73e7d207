# SPDX-License-Identifier: Apache-2.0
"""corrupt_patches: patch rows of noisy copies; patches that are not kept are never drawn.

``out[n, k]`` is patch ``kept[n, k]`` of ``corrupt(...)[n]``, as a row in (row, column, channel)
order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nimfast.ops.backend import (
    TYPE_CODES,
    choose,
    interpreting,
    large_empty,
    native_call,
    on_device,
    register,
    tl,
    triton,
)
from nimfast.ops.check import check, check_count
from nimfast.ops.corrupt import (
    Noise,
    Normalisation,
    corrupt_reference,
    divide_by_std,
    grid_pointers,
    noise_arguments,
    normalisation,
)
from nimfast.ops.grid import grid_law
from nimfast.ops.patches import patchify, unpatchify

# --- reference ------------------------------------------------------------------------------------


def _reference(
    images: Tensor,
    keys: Tensor,
    first: Tensor,
    sigma: Tensor,
    kept: Tensor | None,
    patch: int,
    out: Tensor,
    units: Normalisation,
    grid: float | None,
) -> None:
    full = out.new_empty((out.shape[0], *images.shape[1:]))
    corrupt_reference(images, keys, first, sigma, full, units, grid)
    rows = patchify(full, patch)
    if kept is None:
        out.copy_(rows)
        return
    inside = (kept >= 0) & (kept < rows.shape[1])
    places = torch.where(inside, kept, 0)[:, :, None].expand_as(out)
    out.copy_(rows.gather(1, places).masked_fill_(~inside[:, :, None], float("nan")))


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:
    from nimfast.ops.grid import grid_add, grid_one, grid_quad
    from nimfast.ops.noise import box_muller, philox_words

    @triton.jit
    def _in_turn(a, b, c, d):
        """a b c d of the first place, then those of the next."""
        return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))

    @triton.jit
    def _kernel(
        images, keys, first, sigma, scale, shift, kept, out, thresholds, table, cell_shift, count,
        image_stride, samples, values, width, plane, grid_width, patches, kept_count,
        PATCH: tl.constexpr, CHANNELS: tl.constexpr, GATHER: tl.constexpr, QUADS: tl.constexpr,
        GROUPS: tl.constexpr, GRID: tl.constexpr, HARDWARE: tl.constexpr,
    ):  # fmt: skip
        # One program: GROUPS groups of neighbouring pixels of one row of the result, every channel.
        # A group is a quad where all quads begin at multiples of four pixels (QUADS), else a pixel,
        # which draws its quad for itself alone.
        SIZE: tl.constexpr = 4 if QUADS else 1
        row = tl.program_id(0).to(tl.int64)
        image = row // samples
        start = (tl.load(first + image) + row % samples).to(tl.uint64) * values
        key = tl.load(keys + image).to(tl.uint64, bitcast=True)

        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        pixel = group * SIZE
        k, y, x = pixel // (PATCH * PATCH), pixel // PATCH % PATCH, pixel % PATCH
        inside = k < kept_count
        if GATHER:
            place = tl.load(kept + row * kept_count + k, mask=inside, other=0)
        else:
            place = k.to(tl.int64)
        # A patch out of range becomes NaN: neither read outside the image nor waited for.
        known = (place >= 0) & (place < patches)
        cell = tl.where(known, place, 0).to(tl.int32)
        at = (cell // grid_width * PATCH + y) * width + cell % grid_width * PATCH + x
        if GRID:
            level = tl.where(known, 1.0, float("nan"))
        else:
            level = tl.where(known, tl.load(sigma + image), float("nan"))

        if QUADS:
            pixel = _in_turn(pixel, pixel + 1, pixel + 2, pixel + 3)
            level = _in_turn(level, level, level, level)
            read = _in_turn(at, at + 1, at + 2, at + 3)
        else:
            read = at
        inside = pixel < kept_count * PATCH * PATCH
        for c in tl.static_range(CHANNELS):
            gain, offset = tl.load(scale + c), tl.load(shift + c)
            position = start + (c * plane + at).to(tl.uint64)
            x0, x1, x2, x3 = philox_words(key, position // 4)
            if QUADS:
                if GRID:
                    a, b, d, e = grid_quad(
                        key, position // 4, x0, x1, x2, x3, thresholds, table, cell_shift, count
                    )
                else:
                    a, b = box_muller(x0, x1, HARDWARE)
                    d, e = box_muller(x2, x3, HARDWARE)
                noise = _in_turn(a, b, d, e)
            elif GRID:
                noise = grid_one(
                    key, position // 4, position % 4, x0, x1, x2, x3, thresholds, table, cell_shift,
                    count,
                )  # fmt: skip
            else:
                upper = position % 4 >= 2
                a, b = box_muller(tl.where(upper, x2, x0), tl.where(upper, x3, x1), HARDWARE)
                noise = tl.where(position % 2 == 1, b, a)
            clean = tl.load(
                images + image * image_stride + c * plane + read, mask=inside, other=0.0
            )
            if GRID:
                noisy = grid_add(noise * level, clean, gain, offset)
            else:
                noisy = tl.fma(noise, level * gain, tl.fma(clean, gain, offset))
            to = out + row * kept_count * PATCH * PATCH * CHANNELS + pixel * CHANNELS + c
            tl.store(to, noisy.to(out.dtype.element_ty), mask=inside)


def _triton(
    images: Tensor,
    keys: Tensor,
    first: Tensor,
    sigma: Tensor,
    units: Normalisation,
    kept: Tensor | None,
    patch: int,
    out: Tensor,
    grid: float | None,
) -> None:
    batch, channels, height, width = images.shape
    rows, kept_count, _ = out.shape
    quads = patch % 4 == 0  # then so is the width, and every row of a patch begins with a quad
    groups = 128 if quads else 256
    hardware = torch.version.hip is None and not interpreting()
    programs = (rows, triton.cdiv(kept_count * patch * patch, groups * (4 if quads else 1)))
    with on_device(images.device):
        _kernel[programs](
            images, keys, first, sigma, units.scale, units.shift, keys if kept is None else kept,
            out, *grid_pointers(grid, keys), images.stride(0), rows // batch,
            channels * height * width, width, height * width, width // patch,
            height // patch * (width // patch), kept_count, PATCH=patch,
            CHANNELS=channels, GATHER=kept is not None, QUADS=quads, GROUPS=groups,
            GRID=grid is not None, HARDWARE=hardware, enable_fp_fusion=False,
        )  # fmt: skip


# --- registration ---------------------------------------------------------------------------------


def _shape(images: Tensor, samples: int, patch: int, kept: Tensor | None) -> tuple[int, int, int]:
    batch, channels, height, width = images.shape
    patches = (height // patch) * (width // patch)
    return batch * samples, patches if kept is None else kept.shape[1], patch * patch * channels


def _implementation(
    images: Tensor,
    keys: Tensor,
    first: Tensor,
    sigma: Tensor,
    samples: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    patch: int,
    kept: Tensor | None,
    grid: float | None = None,
) -> Tensor:
    batch, channels, height, width = images.shape
    out = large_empty(images, _shape(images, samples, patch, kept), dtype)
    if out.numel() == 0:
        return out
    if not images[0].is_contiguous():  # an image must be dense; the batch may be an expanded view
        images = images.contiguous()
    units = normalisation(tuple(mean), tuple(std), images.device, 1.0 if grid is None else 255.0)
    keys, first, sigma = keys.contiguous(), first.contiguous(), sigma.contiguous()
    if kept is not None:
        kept = kept.contiguous()
        if kept.device.type == "cpu":  # elsewhere one would have to wait for the answer
            _check_range(kept, (height // patch) * (width // patch))
    backend = choose("corrupt_patches", images.device)
    if backend == "reference":
        _reference(images, keys, first, sigma, kept, patch, out, units, grid)
    elif backend == "triton":
        _triton(images, keys, first, sigma, units, kept, patch, out, grid)
    else:
        packed = 0 if grid is None else grid_law(grid, images.device).packed.data_ptr()
        native_call(
            "corrupt_patches", images.device, images.data_ptr(), images.stride(0), keys.data_ptr(),
            first.data_ptr(), sigma.data_ptr(), packed, units.scale.data_ptr(),
            units.shift.data_ptr(), 0 if kept is None else kept.data_ptr(), out.data_ptr(),
            TYPE_CODES[dtype], batch, samples, channels, height, width, patch, out.shape[1],
        )  # fmt: skip
    return out


def _check_range(kept: Tensor, patches: int) -> None:
    least, most = (int(value) for value in kept.aminmax())
    if least < 0 or most >= patches:
        wrong = least if least < 0 else most
        raise ValueError(f"kept holds {wrong}; images have patches 0 to {patches - 1}")


def _fake(images, keys, first, sigma, samples, mean, std, dtype, patch, kept, grid=None):
    return images.new_empty(_shape(images, samples, patch, kept), dtype=dtype)


register(
    "corrupt_patches(Tensor images, Tensor keys, Tensor first, Tensor sigma, int samples, "
    "float[] mean, float[] std, ScalarType dtype, int patch, Tensor? kept, "
    "float? grid=None) -> Tensor",
    _implementation,
    _fake,
)

# --- gradient -------------------------------------------------------------------------------------


class _CorruptPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, keys, first, sigma, samples, mean, std, dtype, patch, kept, grid):
        ctx.save_for_backward(kept)
        ctx.shape, ctx.std, ctx.patch = images.shape, std, patch
        return torch.ops.nimfast.corrupt_patches(
            images, keys, first, sigma, samples, mean, std, dtype, patch, kept, grid
        )

    @staticmethod
    def backward(ctx, gradient):
        # d out[b, s, k] / d patch kept[b, s, k] of image[b] = 1 / std, in fp32; a patch may be kept
        # more than once, by one sample or by several.
        (kept,) = ctx.saved_tensors
        batch, _, height, width = ctx.shape
        patches = (height // ctx.patch) * (width // ctx.patch)
        by_image = gradient.reshape(batch, -1, gradient.shape[2])  # [B, S * K, p * p * C]
        if kept is None:
            total = by_image.unflatten(1, (-1, patches)).sum(1, dtype=torch.float32)
        else:
            inside = (kept >= 0) & (kept < patches)  # the others go to a patch that is left out
            place = torch.where(inside, kept, patches).view(batch, -1)
            place = place + torch.arange(batch, device=kept.device)[:, None] * (patches + 1)
            total = gradient.new_zeros(
                (batch * (patches + 1), gradient.shape[2]), dtype=torch.float32
            ).index_add(0, place.flatten(), by_image.flatten(0, 1).float())
            total = total.unflatten(0, (batch, patches + 1))[:, :patches]
        images = unpatchify(total, ctx.patch, (height, width))
        return divide_by_std(images, ctx.std), *(None,) * 10


# --- public ---------------------------------------------------------------------------------------


def corrupt_patches(
    images: Tensor,
    keys: Tensor,
    sigma: float | Tensor,
    *,
    patch: int,
    kept: Tensor | None = None,
    samples: int = 1,
    first_sample: int | Tensor = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    noise: Noise = "gaussian",
) -> Tensor:
    """Patch rows of noisy copies of images, as a masked autoencoder's encoder reads them.

    The same bits as `corrupt`, then patchify (MAE, He et al., 2022), then the gathering of the kept
    patches, but neither the copies nor the noise of the other patches are ever made.

    Args:
        images: float32 [B, C, H, W] in [0, 1]; the batch may be an expanded view.
        keys: int64 [B], from `image_keys`.
        sigma: noise level in pixel units of [0, 1], one number or float32 [B]; on the grid one
            number in (0, 8].
        patch: p, side of a patch in pixels; it divides H and W.
        kept: int64 [B * S, K], the patches of each copy in any order, each in ``0 .. L - 1`` with
            ``L = (H / p) * (W / p)``, row by row; default all of them in order.
        samples: S, copies of each image.
        first_sample: number of the first copy, an int or int64 [B].
        mean, std: per channel, applied after the noise; default 0 and 1.
        dtype: of the result: float32, bfloat16 or float16.
        noise: ``gaussian`` or ``grid``, as of `corrupt`.

    Returns:
        [B * S, K or L, p * p * C], each row in (row, column, channel) order; differentiable with
        respect to `images`. On a GPU a patch out of range gives a row of NaN.

    Raises:
        TypeError: a tensor or the result has a type that is not allowed.
        ValueError: a shape, device, sigma, patch, S, mean, std or noise that is not allowed; on
            the CPU, a patch out of range.
    """
    first, level, mean, std, grid = noise_arguments(
        images, keys, sigma, samples, first_sample, mean, std, dtype, noise
    )
    check_count("patch", patch)
    height, width = images.shape[2:]
    if height % patch or width % patch:
        raise ValueError(f"patch is {patch}; it must divide the images' sides, {height} x {width}")
    if kept is not None:
        rows = images.shape[0] * samples
        check("kept", kept, torch.int64, (rows, None), f"[{rows}, K], one row per copy", images)
    arguments = (images, keys, first, level, samples, mean, std, dtype, patch, kept, grid)
    if torch.is_grad_enabled() and images.requires_grad:
        result: Tensor = _CorruptPatches.apply(*arguments)
        return result
    return torch.ops.nimfast.corrupt_patches(*arguments)
