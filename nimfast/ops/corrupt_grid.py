# SPDX-License-Identifier: Apache-2.0
"""corrupt_grid: noisy copies of 8-bit images that stay on the 8-bit grid, for sound certificates.

``out[b, s] = ((image[b] + k(key[b], first[b] + s)) / 255 - mean) / std`` with whole numbers k from
the exact discretised normal (module `nimfast.ops.grid`). The sum is one of integers, and the result
a function of that sum alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from nimfast.ops.backend import choose, large_empty, register
from nimfast.ops.check import check, check_count, check_dtype, check_normalisation, per_image_count
from nimfast.ops.grid import thresholds, to_grid
from nimfast.ops.noise import words_reference
from nimfast.ops.patches import patchify

# --- reference ------------------------------------------------------------------------------------


def grid_noise_reference(keys: Tensor, positions: Tensor, sigma: float) -> Tensor:
    """The definition: whole numbers k (int64) at `positions` of `keys` (int64, broadcast)."""
    first = words_reference(keys, positions)
    word = (first << 32) | words_reference(keys, positions, further=True)
    positive = first >= 1 << 31
    folded = torch.where(positive, ~word, word)  # 63 bits
    ascending = torch.tensor(thresholds(sigma)[::-1], dtype=torch.int64, device=keys.device)
    magnitude = len(ascending) - torch.searchsorted(ascending, folded, right=True)
    return torch.where(positive, magnitude, -magnitude)


def _reference(
    images: Tensor,
    keys: Tensor,
    first: Tensor,
    sigma: float,
    out: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> None:
    values = images[0].numel()
    samples = out.shape[0] // images.shape[0]
    # A few rows at a time: 64-bit intermediates.
    for rows in torch.arange(out.shape[0], device=out.device).split(max(1, (1 << 20) // values)):
        image = rows // samples
        number = first[image] + rows % samples
        positions = number[:, None] * values + torch.arange(values, device=out.device)
        noise = grid_noise_reference(keys[image, None], positions, sigma)
        noisy = images[image].long() + noise.view(-1, *images.shape[1:])
        # A product, then a sum, each rounded to float32: what every back end does, never fused.
        out[rows] = (noisy.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(out.dtype)


# --- registration ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _units(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale = 1/(255 std) and shift = -mean/std: float32 [C], kept on the device."""
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return (1 / (255 * s)).float().to(device), (-m / s).float().to(device)


def _implementation(
    images: Tensor,
    keys: Tensor,
    first: Tensor,
    sigma: float,
    samples: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    batch, channels, height, width = images.shape
    out = large_empty(images, (batch * samples, channels, height, width), dtype)
    if out.numel() == 0:
        return out
    scale, shift = _units(tuple(mean), tuple(std), images.device)
    backend = choose("corrupt_grid", images.device)
    del backend  # the reference alone, so far
    _reference(images, keys, first, sigma, out, scale, shift)
    return out


def _fake(images, keys, first, sigma, samples, mean, std, dtype):
    return images.new_empty((images.shape[0] * samples, *images.shape[1:]), dtype=dtype)


register(
    "corrupt_grid(Tensor images, Tensor keys, Tensor first, float sigma, int samples, "
    "float[] mean, float[] std, ScalarType dtype) -> Tensor",
    _implementation,
    _fake,
)

# --- public ---------------------------------------------------------------------------------------


def corrupt_grid(
    images: Tensor,
    keys: Tensor,
    sigma: float,
    *,
    samples: int = 1,
    first_sample: int | Tensor = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    patch: int | None = None,
) -> Tensor:
    """Noisy copies of 8-bit images on the 8-bit grid, never clamped; normalised and cast.

    Noise is the exact discretised normal: ``round(N(0, (255 sigma)^2))``, but for a total variation
    of `grid_slack`. Equal bit for bit on every back end. It is not differentiable.

    Args:
        images: uint8 [B, C, H, W], or float32 whole multiples of 1/255 in [0, 1] (looked at, which
            waits for a GPU); the batch may be an expanded view.
        keys: int64 [B], from `image_keys`.
        sigma: noise level in pixel units of [0, 1], one number above 0.
        samples: S, copies of each image.
        first_sample: number of the first copy, an int or int64 [B].
        mean, std: per channel in pixel units, applied after the noise; default 0 and 1.
        dtype: of the result: float32, bfloat16 or float16.
        patch: side of a patch: give patch rows, as `corrupt_patches` does, instead of images.

    Returns:
        [B * S, C, H, W], copies of one image next to each other; with `patch`
        [B * S, L, p * p * C].

    Raises:
        TypeError: a tensor or the result has a type that is not allowed.
        ValueError: a shape, device, sigma, S, mean, std or patch that is not allowed; images off
            the grid.
    """
    check("images", images, (torch.uint8, torch.float32), (None,) * 4, "[B, C, H, W]")
    batch, channels, height, width = images.shape
    check("keys", keys, torch.int64, (batch,), f"[{batch}], one value per image", images)
    check_dtype(dtype)
    check_count("samples", samples)
    means, stds = check_normalisation(mean, std, channels)
    first = per_image_count("first_sample", first_sample, images)
    thresholds(float(sigma))
    if patch is not None:
        check_count("patch", patch)
        if height % patch or width % patch:
            raise ValueError(
                f"patch is {patch}; it must divide the images' sides, {height} x {width}"
            )
    noisy = torch.ops.nimfast.corrupt_grid(
        to_grid(images), keys, first, float(sigma), samples, means, stds, dtype
    )
    return noisy if patch is None else patchify(noisy, patch)
