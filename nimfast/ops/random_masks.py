# SPDX-License-Identifier: Apache-2.0
"""random_masks, unit_masks: which patches a network sees, as the noise law draws them.

A patch is kept when its word is among the K smallest of the L words of its sample. On a GPU Triton
serves: a row of words lives in registers, the selection is counting, and what is read and written
is the result alone, so CUDA C++ would hold nothing that Triton's kernel does not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nimfast.ops.backend import choose, native_call, on_device, register, tl, triton
from nimfast.ops.check import check, check_count, per_image_count
from nimfast.ops.noise import words_reference

MOST_PATCHES = 4096  # kMaxPatches of csrc/random_masks.h; beyond it Triton would spill registers

# --- reference ------------------------------------------------------------------------------------


def _reference(
    keys: Tensor, first: Tensor, kept: Tensor, restore: Tensor, mask: Tensor, samples: int
) -> None:
    rows, patches = mask.shape
    row = torch.arange(rows, device=keys.device)
    number = first[row // samples] + row % samples
    positions = number[:, None] * patches + torch.arange(patches, device=keys.device)
    ranked = words_reference(keys[row // samples, None], positions).argsort(dim=1, stable=True)
    kept.copy_(ranked[:, : kept.shape[1]].sort(1).values)
    mask.fill_(True).scatter_(1, kept, False)
    # Kept before removed, each in order: a stable sort of the mask; restore is its inverse.
    order = mask.long().argsort(dim=1, stable=True)
    restore.copy_(order.argsort(dim=1))


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:
    from nimfast.ops.noise import philox_words

    @triton.jit
    def _kernel(
        keys, first, kept, restore, mask, samples, patches, kept_count, PATCHES: tl.constexpr
    ):
        # One row at once: PATCHES words, of which up to three before the first belong to the sample
        # before.
        row = tl.program_id(0).to(tl.int64)
        image = row // samples
        start = (tl.load(first + image) + row % samples).to(tl.uint64) * patches
        quad = start // 4 + tl.arange(0, PATCHES // 4).to(tl.uint64)
        x0, x1, x2, x3 = philox_words(tl.load(keys + image).to(tl.uint64, bitcast=True), quad)
        word = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
        patch = tl.arange(0, PATCHES) - (start % 4).to(tl.int32)
        inside = (patch >= 0) & (patch < patches)
        word = tl.where(inside, word, 0xFFFFFFFF)

        # The K-th smallest word, bit by bit: the largest value that fewer than K words are below.
        # 32 counts of a row, where ranks would take L of them.
        threshold = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            below = tl.sum((word < (threshold | bit)).to(tl.int32), axis=0)
            threshold = tl.where(below < kept_count, threshold | bit, threshold)
            bit = bit >> 1
        below = tl.sum((word < threshold).to(tl.int32), axis=0)
        tied = (inside & (word == threshold)).to(tl.int32)
        keep = (word < threshold) | ((tied > 0) & (below + tl.cumsum(tied, axis=0) <= kept_count))

        place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(kept + row * kept_count + place, patch.to(tl.int64), mask=keep)
        # Before a removed patch stand all K kept ones and patch - (place + 1) removed ones.
        removed_place = kept_count + patch - place - 1
        at = row * patches + patch
        tl.store(restore + at, tl.where(keep, place, removed_place).to(tl.int64), mask=inside)
        tl.store(mask + at, tl.where(keep, 0, 1).to(tl.uint8), mask=inside)


def _triton(
    keys: Tensor, first: Tensor, kept: Tensor, restore: Tensor, mask: Tensor, samples: int
) -> None:
    rows, patches = mask.shape
    width = triton.next_power_of_2(patches + 3 * (patches % 4 != 0))
    with on_device(keys.device):
        # Up to 512 words one warp counts alone, without waiting for others.
        _kernel[(rows,)](
            keys, first, kept, restore, mask.view(torch.uint8), samples, patches, kept.shape[1],
            PATCHES=max(width, 4), num_warps=max(1, min(16, width // 512)), enable_fp_fusion=False,
        )  # fmt: skip


# --- registration ---------------------------------------------------------------------------------


def _fake(keys, first, samples, patches, kept):
    rows = keys.shape[0] * samples
    return (
        keys.new_empty((rows, kept)),
        keys.new_empty((rows, patches)),
        keys.new_empty((rows, patches), dtype=torch.bool),
    )


def _implementation(
    keys: Tensor, first: Tensor, samples: int, patches: int, kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    out = _fake(keys, first, samples, patches, kept)
    places, restore, mask = out
    if places.numel() == 0:
        return out
    keys, first = keys.contiguous(), first.contiguous()
    backend = choose("random_masks", keys.device)
    if backend == "reference":
        _reference(keys, first, places, restore, mask, samples)
    elif backend == "triton":
        _triton(keys, first, places, restore, mask, samples)
    else:
        native_call(
            "random_masks", keys.device, keys.data_ptr(), first.data_ptr(),
            places.data_ptr(), restore.data_ptr(), mask.data_ptr(), keys.shape[0], samples, patches,
            kept,
        )  # fmt: skip
    return out


register(
    "random_masks(Tensor keys, Tensor first, int samples, int patches, int kept) "
    "-> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)

# --- public ---------------------------------------------------------------------------------------


class Masks(NamedTuple):
    """Masks of S samples of each of B images, N = B * S rows, samples of one image together.

    Attributes:
        kept: int64 [N, K], the patches that are kept, increasing.
        restore: int64 [N, L], where each patch stands among the kept and then the removed ones,
            both increasing: gathering a sequence in that order by it puts patches in their places.
        mask: bool [N, L], True where the patch is removed.
    """

    kept: Tensor
    restore: Tensor
    mask: Tensor


def random_masks(
    keys: Tensor, patches: int, kept: int, *, samples: int = 1, first_sample: int | Tensor = 0
) -> Masks:
    """Random patch masks: K of L patches are kept, every set of K equally likely.

    Sample s takes words ``s * L`` to ``(s + 1) * L - 1`` of its key's sequence
    (`nimfast.ops.random_bits`); the patches of the K smallest are kept, of equal words the lower
    patch. Every back end gives the same masks, however the samples are split over calls.

    Args:
        keys: int64 [B], from `image_keys`.
        patches: L, at most 4,096.
        kept: K, from 1 to L.
        samples: S, masks of each image.
        first_sample: number of the first mask, an int or int64 [B].

    Raises:
        TypeError: keys or first_sample are not int64.
        ValueError: a shape, device or number that is not allowed.
    """
    check("keys", keys, torch.int64, (None,), "[B]")
    check_count("patches", patches, 1, MOST_PATCHES)
    check_count("kept", kept, 1, patches)
    check_count("samples", samples)
    first = per_image_count("first_sample", first_sample, keys)
    return Masks(*torch.ops.nimfast.random_masks(keys, first, samples, patches, kept))


def unit_masks(
    keys: Tensor,
    grid: tuple[int, int],
    unit: int,
    ratio: float,
    *,
    samples: int = 1,
    first_sample: int | Tensor = 0,
) -> Tensor:
    """SimMIM's masks: square units of patches, ``ceil(ratio * units)`` of them masked.

    The units that are not masked are those that `random_masks` would keep of as many patches.

    Args:
        keys: int64 [B], from `image_keys`.
        grid: rows and columns of patches, multiples of `unit`.
        unit: patches along a side of a unit.
        ratio: share of the units to mask, in [0, 1); at least one unit must remain.
        samples: S, masks of each image.
        first_sample: number of the first mask, an int or int64 [B].

    Returns:
        bool [B * S, rows * columns], True where the patch is masked.

    Raises:
        TypeError: keys or first_sample are not int64.
        ValueError: a shape, device, grid, unit or ratio that is not allowed.

    Source: Xie et al., "SimMIM", CVPR 2022, section 3.2.
    """
    check_count("unit", unit)
    rows, columns = grid
    if rows < 1 or columns < 1 or rows % unit or columns % unit:
        raise ValueError(f"grid is {tuple(grid)}; both sides must be multiples of unit {unit}")
    units = (rows // unit) * (columns // unit)
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}; it must be in [0, 1)")
    kept = units - math.ceil(ratio * units)
    if kept < 1:
        raise ValueError(f"ratio is {ratio}; it must leave one of the {units} units")
    mask = random_masks(keys, units, kept, samples=samples, first_sample=first_sample).mask
    wide = mask.view(-1, rows // unit, 1, columns // unit, 1).expand(-1, -1, unit, -1, unit)
    return wide.reshape(len(mask), rows * columns)
