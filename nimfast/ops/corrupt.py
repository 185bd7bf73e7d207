# SPDX-License-Identifier: Apache-2.0
"""corrupt: S noisy, normalised, cast copies of every image, in one pass.

``out[b, s] = (image[b] + sigma[b] * normal(key[b], first[b] + s) - mean) / std``

or, on the 8-bit grid, for sound certificates (module `nimfast.ops.grid`),

``out[b, s] = ((255 image[b] + whole number(key[b], first[b] + s)) / 255 - mean) / std``

where the sum is one of whole numbers and the result a function of it alone, the same bits anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, get_args

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
from nimfast.ops.check import (
    check,
    check_count,
    check_dtype,
    check_normalisation,
    per_image,
    per_image_count,
)
from nimfast.ops.grid import check_grid_sigma, grid_law, grid_reference
from nimfast.ops.noise import normals_reference
from nimfast.options import Noise


class Normalisation(NamedTuple):
    """Per channel, float32 [C]: scale = 1 / std or, of whole numbers, 1 / (255 std)."""

    scale: Tensor
    shift: Tensor  # -mean / std
    mean: Tensor
    std: Tensor


# --- reference ------------------------------------------------------------------------------------


def corrupt_reference(
    images: Tensor,
    keys: Tensor,
    first: Tensor,
    sigma: Tensor,
    out: Tensor,
    normalisation: Normalisation,
    grid: float | None,
) -> None:
    """Into `out` [B * S, C, H, W], from checked arguments."""
    values = images[0].numel()
    samples = out.shape[0] // images.shape[0]
    scale, shift, mean, std = (value.view(-1, 1, 1) for value in normalisation)
    # A few rows at a time: the float64 and 64-bit integer intermediates take some 30 times the
    # output's memory.
    for rows in torch.arange(out.shape[0], device=out.device).split(max(1, (1 << 20) // values)):
        image = rows // samples
        number = first[image] + rows % samples
        positions = number[:, None] * values + torch.arange(values, device=out.device)
        if grid is None:
            noise = normals_reference(keys[image, None], positions).view(-1, *images.shape[1:])
            noisy = images[image].double() + sigma[image].double().view(-1, 1, 1, 1) * noise
            out[rows] = ((noisy - mean.double()) / std.double()).to(out.dtype)
        else:
            drawn = grid_reference(keys[image, None], positions, grid).view(-1, *images.shape[1:])
            # Whole numbers in float32, exactly; then a product and a sum, each rounded.
            whole = (images[image] * 255).round() + drawn
            out[rows] = (whole * scale + shift).to(out.dtype)


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:
    from nimfast.ops.grid import grid_add, grid_quad
    from nimfast.ops.noise import box_muller, philox_words

    @triton.jit
    def _kernel(
        images, keys, first, sigma, scale, shift, out, thresholds, table, cell_shift, count,
        image_stride, samples, values, plane,
        QUADS: tl.constexpr, GRID: tl.constexpr, HARDWARE: tl.constexpr,
    ):  # fmt: skip
        # One program: QUADS quads of one row. Quads are those of the position, so a row whose
        # length is no multiple of four begins inside one; the lanes of its neighbours are masked
        # off.
        row = tl.program_id(0).to(tl.int64)
        image = row // samples
        start = (tl.load(first + image) + row % samples).to(tl.uint64) * values
        quad = start // 4 + (tl.program_id(1) * QUADS + tl.arange(0, QUADS)).to(tl.uint64)
        key = tl.load(keys + image).to(tl.uint64, bitcast=True)
        x0, x1, x2, x3 = philox_words(key, quad)
        if GRID:
            a, b, c, d = grid_quad(key, quad, x0, x1, x2, x3, thresholds, table, cell_shift, count)
        else:
            a, b = box_muller(x0, x1, HARDWARE)
            c, d = box_muller(x2, x3, HARDWARE)
        # a b c d of the first quad, then those of the next.
        noise = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))

        e = tl.program_id(1) * QUADS * 4 + tl.arange(0, QUADS * 4) - (start % 4).to(tl.int32)
        inside = (e >= 0) & (e < values)
        channel = tl.where(inside, e // plane, 0)
        gain, offset = tl.load(scale + channel), tl.load(shift + channel)
        clean = tl.load(images + image * image_stride + e, mask=inside, other=0.0)
        if GRID:
            noisy = grid_add(noise, clean, gain, offset)
        else:
            noisy = tl.fma(noise, tl.load(sigma + image) * gain, tl.fma(clean, gain, offset))
        tl.store(out + row * values + e, noisy.to(out.dtype.element_ty), mask=inside)


def grid_pointers(grid: float | None, like: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Thresholds, table, shift and count for a kernel; of Gaussian noise, which reads none, any."""
    if grid is None:
        return like, like, 0, 0
    law = grid_law(grid, like.device)
    return law.packed[2:], law.table, law.shift, law.size


def _triton(
    images: Tensor,
    keys: Tensor,
    first: Tensor,
    sigma: Tensor,
    units: Normalisation,
    out: Tensor,
    grid: float | None,
) -> None:
    rows, channels, height, width = out.shape
    values = channels * height * width
    quads = 256
    hardware = torch.version.hip is None and not interpreting()
    programs = (rows, triton.cdiv(values + 3 * (values % 4 != 0), 4 * quads))
    with on_device(images.device):
        _kernel[programs](
            images, keys, first, sigma, units.scale, units.shift, out, *grid_pointers(grid, keys),
            images.stride(0), rows // images.shape[0], values, height * width, QUADS=quads,
            GRID=grid is not None, HARDWARE=hardware, enable_fp_fusion=False,
        )  # fmt: skip


# --- registration ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, unit: float = 1.0
) -> Normalisation:
    """Of pixels in [0, 1] (unit 1) or whole numbers (255), kept on the device: sending waits."""
    # Whoever comes first may be in inference mode; a gradient may be asked of a later caller.
    with torch.inference_mode(False):
        m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        return Normalisation(*(v.float().to(device) for v in (1 / (unit * s), -m / s, m, s)))


def _implementation(
    images: Tensor,
    keys: Tensor,
    first: Tensor,
    sigma: Tensor,
    samples: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    grid: float | None = None,
) -> Tensor:
    batch, channels, height, width = images.shape
    out = large_empty(images, (batch * samples, channels, height, width), dtype)
    if out.numel() == 0:
        return out
    if not images[0].is_contiguous():  # an image must be dense; the batch may be an expanded view
        images = images.contiguous()
    units = normalisation(tuple(mean), tuple(std), images.device, 1.0 if grid is None else 255.0)
    keys, first, sigma = keys.contiguous(), first.contiguous(), sigma.contiguous()
    backend = choose("corrupt", images.device)
    if backend == "reference":
        corrupt_reference(images, keys, first, sigma, out, units, grid)
    elif backend == "triton":
        _triton(images, keys, first, sigma, units, out, grid)
    else:
        packed = 0 if grid is None else grid_law(grid, images.device).packed.data_ptr()
        native_call(
            "corrupt", images.device, images.data_ptr(), images.stride(0), keys.data_ptr(),
            first.data_ptr(), sigma.data_ptr(), packed, units.scale.data_ptr(),
            units.shift.data_ptr(), out.data_ptr(), TYPE_CODES[dtype], batch, samples, channels,
            height * width,
        )  # fmt: skip
    return out


def _fake(images, keys, first, sigma, samples, mean, std, dtype, grid=None):
    return images.new_empty((images.shape[0] * samples, *images.shape[1:]), dtype=dtype)


register(
    "corrupt(Tensor images, Tensor keys, Tensor first, Tensor sigma, int samples, "
    "float[] mean, float[] std, ScalarType dtype, float? grid=None) -> Tensor",
    _implementation,
    _fake,
)

# --- gradient -------------------------------------------------------------------------------------


class _Corrupt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, keys, first, sigma, samples, mean, std, dtype, grid):
        ctx.samples, ctx.std = samples, std
        return torch.ops.nimfast.corrupt(
            images, keys, first, sigma, samples, mean, std, dtype, grid
        )

    @staticmethod
    def backward(ctx, gradient):
        # d out[b, s] / d image[b] = 1 / std for every s; the sum over samples is taken in fp32.
        total = gradient.unflatten(0, (-1, ctx.samples)).sum(1, dtype=torch.float32)
        return divide_by_std(total, ctx.std), *(None,) * 8


def divide_by_std(gradient: Tensor, std: Sequence[float]) -> Tensor:
    """[B, C, H, W] over [C], by channel: a tensor made of `std` would be sent and waited for."""
    if all(value == 1 for value in std):
        return gradient
    return torch.stack(
        [plane / value for plane, value in zip(gradient.unbind(1), std, strict=True)], 1
    )


# --- public ---------------------------------------------------------------------------------------


def corrupt(
    images: Tensor,
    keys: Tensor,
    sigma: float | Tensor,
    *,
    samples: int = 1,
    first_sample: int | Tensor = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    noise: Noise = "gaussian",
) -> Tensor:
    """Noisy copies of images, never clamped; normalised and cast.

    The draw of a value depends on its key, its sample number and its place in CHW order only
    (module `nimfast.ops.noise`), so any split of the samples over calls, devices or processes gives
    the same bits on one kind of device and the same values within 1e-5 (1 + |z|) on every other.

    Args:
        images: float32 [B, C, H, W] in [0, 1]; the batch may be an expanded view.
        keys: int64 [B], from `image_keys`.
        sigma: noise level in pixel units of [0, 1], one number or float32 [B]; on the grid one
            number in (0, 8].
        samples: S, copies of each image.
        first_sample: number of the first copy, an int or int64 [B].
        mean, std: per channel, applied after the noise; default 0 and 1.
        dtype: of the result: float32, bfloat16 or float16.
        noise: ``gaussian``; or ``grid``, whole numbers of 1/255 with the law of a rounded Gaussian
            but for `grid_slack`, the same bits on every device. Images are then taken to the
            nearest 8-bit ones; `check_grid` refuses others.

    Returns:
        [B * S, C, H, W], copies of one image next to each other; differentiable with respect to
        `images`, where a rounding counts as the identity.

    Raises:
        TypeError: a tensor or the result has a type that is not allowed.
        ValueError: a shape, device, sigma, S, mean, std or noise that is not allowed.
    """
    first, level, mean, std, grid = noise_arguments(
        images, keys, sigma, samples, first_sample, mean, std, dtype, noise
    )
    arguments = (images, keys, first, level, samples, mean, std, dtype, grid)
    if torch.is_grad_enabled() and images.requires_grad:
        result: Tensor = _Corrupt.apply(*arguments)
        return result
    return torch.ops.nimfast.corrupt(*arguments)


def noise_arguments(
    images: Tensor,
    keys: Tensor,
    sigma: float | Tensor,
    samples: int,
    first_sample: int | Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
    noise: Noise,
) -> tuple[Tensor, Tensor, list[float], list[float], float | None]:
    """Check what `corrupt` and `corrupt_patches` take.

    Returns:
        first [B], sigma [B], mean [C], std [C], and sigma of noise on the grid, else None.
    """
    check("images", images, torch.float32, (None,) * 4, "[B, C, H, W]")
    batch, channels = images.shape[:2]
    check("keys", keys, torch.int64, (batch,), f"[{batch}], one value per image", images)
    check_dtype(dtype)
    check_count("samples", samples)
    mean, std = check_normalisation(mean, std, channels)
    first = per_image_count("first_sample", first_sample, images)
    if noise not in get_args(Noise):
        raise ValueError(f"noise is {noise!r}; it must be one of {', '.join(get_args(Noise))}")
    grid = None
    if noise == "grid":
        check_grid_sigma(sigma)
        grid = float(sigma)
    return first, per_image("sigma", sigma, images), mean, std, grid
