# SPDX-License-Identifier: Apache-2.0
"""The discretised normal on the 8-bit grid, exact: its thresholds, its look-up table, its slack.

The law is that of ``round(N(0, s^2))`` with ``s = 255 sigma``: for an image x whose pixels are whole
numbers, ``x + round(N) = round(x + N)``, so a classifier of the noisy grid image is smoothed by true
Gaussian noise after a rounding that belongs to the classifier (certificate: Cohen et al. 2019,
theorem 1), and no float ever holds the image and the noise together.

A value is drawn from 64 bits U: ``k = min {k : U < 2^64 Phi((k + 1/2) / s)}``. The law is symmetric,
so U folds: W is U without its first bit where that is 0 and the complement of U where it is 1, and
``|k| = #{j >= 0 : W < A_j}`` with ``A_j = 2^64 P(N > j + 1/2)``; the first bit is 1 where k > 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal, localcontext

import torch
from torch import Tensor

MAX_SIGMA = 8.0

_DIGITS = 60  # of the arithmetic; 2^-64 has its last binary place at the 20th
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640629")


@functools.lru_cache(maxsize=32)
def thresholds(sigma: float) -> tuple[int, ...]:
    """``A_0 > A_1 > ... >= 1``: 2^64 P(N(0, (255 sigma)^2) > j + 1/2), to the nearest integer.

    Computed in 60-digit decimals by the series of all positive terms
    ``Phi(z) - 1/2 = phi(z) (z + z^3 / 3 + z^5 / (3 * 5) + ...)``.

    Args:
        sigma: standard deviation in pixel units of [0, 1], taken as the binary number it is.

    Raises:
        ValueError: sigma not in (0, 8].
    """
    if not 0 < sigma <= MAX_SIGMA:
        raise ValueError(f"sigma is {sigma}; grid noise needs it above 0 and at most {MAX_SIGMA:g}")
    found: list[int] = []
    with localcontext() as context:
        context.prec = _DIGITS
        scale, root = 255 * Decimal(sigma), (2 * _PI).sqrt()
        negligible = Decimal(10) ** -(_DIGITS - 5)
        while True:
            z = (len(found) + Decimal("0.5")) / scale
            square = z * z
            density = (-square / 2).exp() / root
            term = total = density * z
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
    """Total-variation distance between the noise drawn and the exact discretised normal, at most.

    Each of the K thresholds of a pixel (both signs) is off by at most 2^-64, so an image of d values
    by ``d K 2^-64``. A certificate subtracts this from every lower bound of a probability.

    Args:
        shape: of an image, ``(C, H, W)``.
        sigma: standard deviation in pixel units of [0, 1].

    Raises:
        ValueError: sigma not in (0, 8].
    """
    return math.ldexp(float(math.prod(shape) * 2 * len(thresholds(sigma))), -64)


def to_grid(images: Tensor) -> Tensor:
    """Images in [0, 1] as the whole numbers 0 .. 255 they are multiples of 1/255 by: uint8.

    Args:
        images: float32 of any shape, or uint8, returned as it is.

    Raises:
        TypeError: another type.
        ValueError: a pixel that is no multiple of 1/255 (beyond float32's rounding) or not in
            [0, 1]. Looking waits for the device.
    """
    if images.dtype == torch.uint8:
        return images
    if images.dtype != torch.float32:
        raise TypeError(f"images is {images.dtype}; it must be uint8 or float32")
    scaled = images.detach().double() * 255
    nearest = scaled.round()
    off = (scaled - nearest).abs_()
    # Comparisons with NaN are false, hence in this form.
    if not bool(((off < 1e-4) & (nearest >= 0) & (nearest <= 255)).all()):
        raise ValueError(
            "images has pixels that are no multiples of 1/255 in [0, 1]; grid noise is for 8-bit "
            "images: round them first, or use Gaussian noise"
        )
    return nearest.to(torch.uint8)
