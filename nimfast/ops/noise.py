# SPDX-License-Identifier: Apache-2.0
"""The noise law: which normal number belongs to which pixel of which sample of which image.

Philox4x32-10 (Salmon et al., SC 2011) as a function of (key, position), so that a draw depends on
what it is for and on nothing else. An image's key is folded from (seed, stream, image index). Value
e (CHW order) of sample s of an image of D values stands at position ``s * D + e``; four positions
share one call of the generator, and its words (x0, x1, x2, x3) become normals by Box-Muller: ``U =
x / 2^32 + 2^-33``, ``V = 2 pi (y / 2^32 + 2^-33)``, ``sqrt(-2 ln U) (cos V, sin V)``.

This file is the definition in plain torch (float64, any device) and the same in Triton;
csrc/philox.h and csrc/normal.h are the same for C++ and CUDA.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

from nimfast.ops.backend import forced, native, tl, triton

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """What a draw is for. Two uses never share a stream."""

    SELECTION = 1
    ESTIMATION = 2
    TRAINING = 3
    ATTACK = 4
    EVALUATION = 5
    MASK = 6


def _philox(
    key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor | int = 0, c3: Tensor | int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # 32-bit words live in int64: a product of two may wrap to a negative number, of which the
    # shifted and masked halves are still the right ones.
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    zero = torch.zeros_like(c0)
    c2, c3 = zero + c2, zero + c3
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def image_keys(seed: int, stream: Stream, indices: Tensor) -> Tensor:
    """Fold (seed, stream, image index) into one key per image.

    Args:
        seed: 64-bit seed, ``0 <= seed < 2**64``.
        stream: what the noise is for.
        indices: int64 [B], an image's number in its data set.

    Returns:
        int64 [B] on the device of `indices`; the 64 bits are the key.

    Raises:
        ValueError: seed out of range.
        TypeError: indices are not int64.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be in [0, 2^64)")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices is {indices.dtype}; it must be int64")
    # Integers, equal everywhere, so back ends that do not work on the CPU need not refuse.
    module = native() if forced() in (None, "native") else None
    if module is not None and _is_plain_cpu(indices):
        indices, keys = indices.contiguous(), torch.empty_like(indices)
        module.image_keys(
            seed, int(Stream(stream)), indices.data_ptr(), keys.data_ptr(), indices.numel()
        )
        return keys
    # The third counter word is the stream, never 0, so these calls never meet those of the draws
    # themselves.
    key = torch.full_like(indices, seed - 2**64 if seed >= 2**63 else seed)
    x0, x1, _, _ = _philox(key, indices & _MASK, (indices >> 32) & _MASK, int(Stream(stream)))
    return x0 | (x1 << 32)


def _is_plain_cpu(value: Tensor) -> bool:
    """Whether `value` has memory that C++ may read: not while torch traces."""
    return (
        value.device.type == "cpu" and not torch.compiler.is_compiling() and type(value) is Tensor
    )


def random_bits(keys: Tensor, count: int, *, first: int = 0) -> Tensor:
    """Words `first` .. `first + count` of each key's sequence.

    Args:
        keys: int64 [B], from `image_keys`.
        count: how many words of each.
        first: position of the first one.

    Returns:
        int64 [B, count], each in [0, 2^32).
    """
    positions = torch.arange(first, first + count, device=keys.device)
    return words_reference(keys[:, None], positions[None, :])


def words_reference(key: Tensor, position: Tensor, *, further: bool = False) -> Tensor:
    """The words at `position` of the sequence of `key`, broadcast: int64 in [0, 2^32).

    `further` words, 32 more bits for every position, have 1 in the counter's last place, where
    every other call has 0.
    """
    quad, lane = position >> 2, position & 3
    words = _philox(key, quad & _MASK, (quad >> 32) & _MASK, 0, int(further))
    return torch.where(
        lane < 2,
        torch.where(lane == 0, words[0], words[1]),
        torch.where(lane == 2, words[2], words[3]),
    )


def normals_reference(keys: Tensor, positions: Tensor) -> Tensor:
    """The definition: normals (float64) at `positions` of `keys` (int64, broadcast together)."""
    x = words_reference(keys, positions & ~1).double()
    y = words_reference(keys, positions | 1).double()
    radius = torch.sqrt(-2.0 * torch.log(x * 2.0**-32 + 2.0**-33))
    angle = 2.0 * math.pi * (y * 2.0**-32 + 2.0**-33)
    return radius * torch.where(positions & 1 == 0, torch.cos(angle), torch.sin(angle))


if triton is not None:
    from triton.language.extra import libdevice

    @triton.jit
    def philox_words(key, quad, FURTHER: tl.constexpr = 0):
        """The four words (uint32) of one `key` at every `quad` (both uint64); 1: those further."""
        # Rounds of our own: tl.philox switches to another generator (4x64) when a counter word is
        # 64-bit.
        k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
        c0, c1 = quad.to(tl.uint32), (quad >> 32).to(tl.uint32)
        c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0) + FURTHER
        for _ in tl.static_range(10):
            high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
            high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
        return c0, c1, c2, c3

    @triton.jit
    def box_muller(x, y, HARDWARE: tl.constexpr):
        """Two words to two normals; see csrc/normal.h for the care taken near U = 1.

        HARDWARE: NVIDIA's own log, sin and cos, accurate enough in these ranges. Triton's are exact
        to rounding at ten times the instructions; the interpreter has only those.
        """
        u = tl.fma(x.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
        t = tl.fma((~x).to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
        series = 2.0 * t * tl.fma(t, tl.fma(t, 0.3333333333333333, 0.5), 1.0)
        signed = y.to(tl.int32, bitcast=True).to(tl.float32)
        angle = tl.fma(signed, 1.4629180792671596e-9, 7.314590396335798e-10)
        if HARDWARE:
            log, cos = libdevice.fast_logf(u), libdevice.fast_cosf(angle)
            sin = libdevice.fast_sinf(angle)
        else:
            log, cos, sin = tl.log(u), tl.cos(angle), tl.sin(angle)
        radius = tl.sqrt(tl.where(t < 0.0078125, series, -2.0 * log))
        return radius * cos, radius * sin
