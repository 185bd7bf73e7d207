# SPDX-License-Identifier: Apache-2.0
"""Noise on the 8-bit grid: the exact discretised normal, for certificates that floats cannot break.

The law is that of ``round(N)``, N normal with standard deviation ``s = 255 sigma``. For an image x
of whole numbers ``x + round(N) = round(x + N)``: a classifier of the noisy grid image is smoothed
by true Gaussian noise, after a rounding that belongs to the classifier, so theorem 1 of Cohen et
al. (2019) applies to it. And no float ever holds image and noise together, which is what the attack
of Jin et al. (2022) on floating-point smoothing needs.

A value is drawn from 64 bits U: ``k = min {k : U < 2^64 Phi((k + 1/2) / s)}``. The law is
symmetric, so U folds: W is U, or its complement where the first bit is 1, and with
``A_j = 2^64 P(N > j + 1/2)`` the value is ``#{j >= 0 : W < A_j}``, negative where the first bit is
0. The upper 32 bits of U are the position's word; the lower 32, a word further on
(`words_reference`), are drawn where the upper ones do not decide.

This file is the definition in plain torch, the table by which kernels find the value, and that in
Triton; csrc/grid.h is the same for C++ and CUDA.
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

from nimfast.ops.backend import tl, triton
from nimfast.ops.noise import words_reference

MAX_SIGMA = 8.0

_DIGITS = 60  # of the arithmetic; the last binary place of 2^-64 is the 20th decimal one
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640629")
_NONE = 0xFFFF  # above the bits of any threshold: the cell has none


@functools.lru_cache(maxsize=32)
def thresholds(sigma: float) -> tuple[int, ...]:
    """``A_0 >= A_1 >= ... >= 1``: 2^64 P(N > j + 1/2) to the nearest whole number.

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


def check_grid_sigma(sigma: float | Tensor) -> None:
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
    """The definition: whole numbers (int64) at `positions` of `keys` (int64, broadcast)."""
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
        packed: int64: shift, J, the J thresholds, never increasing, then the table, two
            entries to a number.
        shift: a cell is ``(bits - bits of 0.5f) >> shift``, bits those of the float ``w + 0.5f``,
            w the upper 31 bits of W.
        size: J.
        table: int32, one entry for each cell, a view of `packed`. Upper half: the value's size at
            the cell's lower end. Lower half: bits of the cell's threshold, below which that size
            holds, above which it is one less, and at which all of W decides.
    """

    packed: Tensor
    shift: int
    size: int
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


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:
    from nimfast.ops.noise import philox_words

    @triton.jit
    def _negative(word):
        """All ones where the word stands for a negative number, or for 0 seen from below."""
        return ~(word.to(tl.int32, bitcast=True) >> 31)

    @triton.jit
    def _look_up(word, table, shift):
        """The word's number (int32), and whether all 64 bits are needed instead."""
        negative = _negative(word)
        folded = word.to(tl.int32, bitcast=True) ^ ~negative
        place = (folded.to(tl.float32) + 0.5).to(tl.int32, bitcast=True) - 0x3F000000
        entry = tl.load(table + (place >> shift)).to(tl.uint32, bitcast=True)
        below = place & ((1 << shift) - 1)
        threshold = (entry & 0xFFFF).to(tl.int32)
        size = (entry >> 16).to(tl.int32) - (below > threshold).to(tl.int32)
        return (size ^ negative) - negative, below == threshold

    @triton.jit
    def _exact(word, further, thresholds, count, wanted):
        """The number of all 64 bits, where `wanted`: by bisection of the decreasing thresholds."""
        negative = _negative(word)
        upper = (word.to(tl.int32, bitcast=True) ^ ~negative).to(tl.int64)
        lower = (further.to(tl.int32, bitcast=True) ^ ~negative).to(tl.int64) & 0xFFFFFFFF
        folded = (upper << 32) | lower
        low = tl.zeros_like(negative)
        high = low + count
        for _ in range(16):  # fewer than 2^16 thresholds
            middle = (low + high) // 2
            open_ = wanted & (low < high)
            above = tl.load(thresholds + middle, mask=open_, other=0) > folded
            low = tl.where(open_ & above, middle + 1, low)
            high = tl.where(open_ & ~above, middle, high)
        return (low ^ negative) - negative

    @triton.jit
    def grid_quad(key, quad, x0, x1, x2, x3, thresholds, table, shift, count):
        """The whole numbers (float32) of the words of every `quad` of `key`."""
        a, rare_a = _look_up(x0, table, shift)
        b, rare_b = _look_up(x1, table, shift)
        c, rare_c = _look_up(x2, table, shift)
        d, rare_d = _look_up(x3, table, shift)
        if tl.max((rare_a | rare_b | rare_c | rare_d).to(tl.int32), 0) > 0:
            y0, y1, y2, y3 = philox_words(key, quad, 1)
            a = tl.where(rare_a, _exact(x0, y0, thresholds, count, rare_a), a)
            b = tl.where(rare_b, _exact(x1, y1, thresholds, count, rare_b), b)
            c = tl.where(rare_c, _exact(x2, y2, thresholds, count, rare_c), c)
            d = tl.where(rare_d, _exact(x3, y3, thresholds, count, rare_d), d)
        return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)

    @triton.jit
    def grid_one(key, quad, lane, x0, x1, x2, x3, thresholds, table, shift, count):
        """The same of one word, number `lane`, of every quad."""
        word = tl.where(lane < 2, tl.where(lane == 0, x0, x1), tl.where(lane == 2, x2, x3))
        value, rare = _look_up(word, table, shift)
        if tl.max(rare.to(tl.int32), 0) > 0:
            y0, y1, y2, y3 = philox_words(key, quad, 1)
            further = tl.where(lane < 2, tl.where(lane == 0, y0, y1), tl.where(lane == 2, y2, y3))
            value = tl.where(rare, _exact(word, further, thresholds, count, rare), value)
        return value.to(tl.float32)

    @triton.jit
    def grid_add(noise, clean, gain, offset):
        """Noise and 255 times the clean value, a whole number, normalised; never fused."""
        return (noise + tl.floor(clean * 255.0 + 0.5)) * gain + offset
