# SPDX-License-Identifier: Apache-2.0
"""Noise on the 8-bit grid: the exact discretised normal, for certificates that floats cannot break.

The law is that of ``round(N)``, N normal with standard deviation ``s = 255 sigma``. For an image x
of whole numbers ``x + round(N) = round(x + N)``, so a classifier of the noisy grid image is smoothed
by true Gaussian noise, after a rounding that belongs to the classifier (Cohen et al. 2019, theorem
1, then applies), and no float ever holds image and noise together (the attack of Jin et al. 2022).

A value is drawn from 64 bits U, ``k = min {k : U < 2^64 Phi((k + 1/2) / s)}``. The law is symmetric,
so U folds: W is U, or its complement where the first bit is 1, and with ``A_j = 2^64 P(N > j + 1/2)``
the value is ``#{j >= 0 : W < A_j}``, negative where the first bit is 0. The upper 32 bits of U are
the position's word; the lower 32, a word further on (`words_reference`), are drawn where the upper do
not decide.

This file is the definition in plain torch, and the table by which kernels find the value: csrc/grid.h.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nimfast.ops.noise import words_reference

MAX_SIGMA = 8.0

_DIGITS = 60  # of the arithmetic; the last binary place of 2^-64 is the 20th decimal one
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640629")
_NONE = 0xFFFF  # above the bits of any threshold: the cell has none


@functools.lru_cache(maxsize=32)
def thresholds(sigma: float) -> tuple[int, ...]:
    """``A_0 > A_1 > ... >= 1``: 2^64 P(N > j + 1/2) to the nearest whole number.

    Computed in 60-digit decimals, by the series of positive terms
    ``Phi(z) - 1/2 = phi(z) (z + z^3 / 3 + z^5 / (3 * 5) + ...)``.

    Args:
        sigma: standard deviation in pixel units of [0, 1], taken as the binary number it is.

    Raises:
        ValueError: sigma not in (0, 8].
    """
    check_grid_sigma(sigma)
    found: list[int] = []
    with localcontext() as context:
        context.prec = _DIGITS
        scale, root = 255 * Decimal(sigma), (2 * _PI).sqrt()
        negligible = Decimal(10) ** (5 - _DIGITS)
        while True:
            z = (len(found) + Decimal("0.5")) / scale
            square = z * z
            term = total = (-square / 2).exp() / root * z
            odd = 1
            while term > negligible:
                odd += 2
                term = term * square / odd
                total += term
            share = (Decimal("0.5") - total) * 2**64
            threshold = int(share.to_integral_value(ROUND_HALF_EVEN))
            if threshold < 1:
                return tuple(found)
            found.append(threshold)


def grid_slack(shape: Sequence[int], sigma: float) -> float:
    """Most by which the noise drawn can differ from the exact law, in total variation.

    Each of the K thresholds of a pixel, both signs counted, is off by less than 2^-64, so an image
    of d values by less than ``d K 2^-64``. A certificate subtracts this from every lower bound of a
    probability, and adds it to every upper one.

    Args:
        shape: of an image, ``(C, H, W)``.
        sigma: standard deviation in pixel units of [0, 1].

    Raises:
        ValueError: sigma not in (0, 8].
    """
    return math.ldexp(math.prod(shape) * 2 * len(thresholds(sigma)), -64)


def check_grid_sigma(sigma: float) -> None:
    """Refuse a noise level that has no table.

    Raises:
        TypeError: not one number.
        ValueError: not in (0, 8].
    """
    if isinstance(sigma, Tensor):
        raise TypeError("sigma is a tensor; noise on the grid takes one number for all images")
    if not 0 < sigma <= MAX_SIGMA:
        raise ValueError(f"sigma is {sigma}; noise on the grid needs 0 < sigma <= {MAX_SIGMA:g}")


def check_grid(images: Tensor) -> None:
    """Refuse images that are not 8-bit. Looking waits for the device.

    Args:
        images: floating-point, of any shape, pixels in [0, 1].

    Raises:
        ValueError: a pixel that is no multiple of 1/255, beyond the rounding of float32.
    """
    scaled = images.detach().double() * 255
    nearest = scaled.round()
    # NaN compares false, hence in this form.
    if not bool(((scaled - nearest).abs() < 1e-4).all() and (nearest % 256 == nearest).all()):
        raise ValueError(
            "noise on the grid is for 8-bit images, and here are pixels that are no multiples of "
            "1/255 in [0, 1]; use Gaussian noise, or round the images first"
        )


# --- reference ------------------------------------------------------------------------------------


def grid_reference(keys: Tensor, positions: Tensor, sigma: float) -> Tensor:
    """The definition: whole numbers (int64) at `positions` of `keys` (int64, broadcast together)."""
    upper = words_reference(keys, positions)
    word = (upper << 32) | words_reference(keys, positions, further=True)
    positive = upper >= 1 << 31
    folded = torch.where(positive, ~word, word)  # 63 bits
    ascending = torch.tensor(thresholds(sigma)[::-1], dtype=torch.int64, device=keys.device)
    size = len(ascending) - torch.searchsorted(ascending, folded, right=True)
    return torch.where(positive, size, -size)


# --- table ----------------------------------------------------------------------------------------


class GridLaw(NamedTuple):
    """What a kernel needs to draw from the law of one sigma.

    Attributes:
        packed: int64: shift, J, the J thresholds in decreasing order, then the table, two entries to
            a number.
        shift: a cell is ``(bits - bits of 0.5f) >> shift``, bits those of the float ``w + 0.5f``,
            w the upper 31 bits of W.
        table: int32, one entry for each cell, a view of `packed`: in its upper half the
            value's size at the cell's lower end; in its lower half that of the threshold's bits,
            below which the size holds, above which it is one less, and at which all of W decides.
    """

    packed: Tensor
    shift: int
    count: int
    table: Tensor


@functools.lru_cache(maxsize=32)
def grid_law(sigma: float, device: torch.device) -> GridLaw:
    """The table of `sigma`, kept on `device`.

    Cells are those of floats: as wide as the tail they lie in is probable, up to a constant, as are
    the gaps between thresholds. So no cell holds two, and nearly all draws fall in a few kilobytes.
    """
    exact = thresholds(sigma)
    half = np.float32(0.5).view(np.uint32)
    upper = np.array([value >> 32 for value in exact], dtype=np.int32)
    bits = (upper.astype(np.float32) + np.float32(0.5)).view(np.uint32) - half
    for shift in range(15, 7, -1):
        cells = bits >> shift
        # Two thresholds may share a cell only where all its numbers are one and the same w.
        shared = np.flatnonzero(cells[1:] == cells[:-1])
        if (upper[shared] < 1 << (23 - shift)).all():
            break
    else:
        raise AssertionError(f"no table holds the thresholds of sigma {sigma}")
    last = int((np.float32(2**31).view(np.uint32) - half) >> shift)
    size = len(exact) - np.searchsorted(cells[::-1], np.arange(last + 1), side="left")
    table = (size << 16 | _NONE).astype(np.uint32)
    table[cells] = (table[cells] & 0xFFFF0000) | (bits & ((1 << shift) - 1))
    table = np.append(table, np.zeros(len(table) % 2, np.uint32)).view(np.int64)
    packed = np.concatenate([[shift, len(exact)], np.array(exact, np.int64), table])
    on_device = torch.from_numpy(packed).to(device)
    return GridLaw(on_device, shift, len(exact), on_device[2 + len(exact) :].view(torch.int32))
