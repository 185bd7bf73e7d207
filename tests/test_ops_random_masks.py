# SPDX-License-Identifier: Apache-2.0
"""random_masks, unit_masks: the same integers on every back end, and equal to plain Python's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nimfast.corruption import Corruption, Purpose, SigmaLaw, uniform
from nimfast.ops import (
    Masks,
    Stream,
    image_keys,
    random_bits,
    random_masks,
    unit_masks,
    use_backend,
)
from nimfast.ops.backend import interpreting


def keys_for(batch: int, device: str = "cpu") -> Tensor:
    return image_keys(7, Stream.MASK, torch.arange(batch, device=device))


def mask_plainly(key: Tensor, patches: int, kept: int, sample: int) -> tuple[list[int], ...]:
    """The definition, for one row."""
    words = random_bits(key[None], patches, first=sample * patches)[0].tolist()
    keep = sorted(sorted(range(patches), key=lambda patch: (words[patch], patch))[:kept])
    order = keep + [patch for patch in range(patches) if patch not in keep]
    restore = [order.index(patch) for patch in range(patches)]
    return keep, restore, [patch not in keep for patch in range(patches)]


TWINS = 16

# (L, K) and the regime they stand for.
SIZES = {
    "one patch": (1, 1),
    "shorter than a quad": (3, 2),
    "rows begin inside a quad": (13, 4),
    "CIFAR, patch 4": (64, 16),
    "ImageNet, patch 16, three quarters removed": (196, 49),
    "one kept": (256, 1),
    "all kept": (256, 256),
    "one more than the block that the CPU draws at once": (257, 64),
    "a row of several warps": (1030, 500),
}


@pytest.mark.parametrize(("patches", "kept"), SIZES.values(), ids=SIZES.keys())
def test_equals_definition(backend: str, device: str, patches: int, kept: int) -> None:
    keys = keys_for(2, device)
    with use_backend(backend):
        masks = random_masks(keys, patches, kept, samples=2, first_sample=5)
    assert [masks.kept.dtype, masks.restore.dtype] == [torch.int64, torch.int64]
    assert masks.mask.dtype == torch.bool
    for row in range(4):
        expected = mask_plainly(keys[row // 2], patches, kept, 5 + row % 2)
        assert tuple(values[row].tolist() for values in masks) == expected


def equal(one: Masks, other: Masks) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_equals_reference_on_many_rows(backend: str, device: str) -> None:
    # Enough rows that the K-th word shares its upper 8, 16 and 24 bits with others in some of them.
    rows = 4 if interpreting() else 400
    first = torch.tensor([0, 2**33], device=device)  # words beyond 2^32
    for patches, kept in ((196, 49), (1023, 700), (4095, 1000), (4096, 2000)):
        options = {"samples": max(1, rows * 64 // patches), "first_sample": first}
        with use_backend(backend):
            ours = random_masks(keys_for(2, device), patches, kept, **options)  # type: ignore[arg-type]
        with use_backend("reference"):
            expected = random_masks(keys_for(2, device), patches, kept, **options)  # type: ignore[arg-type]
        assert equal(ours, expected), patches


def test_equal_words_keep_the_lower_patch(backend: str, device: str) -> None:
    # Sample TWINS was searched for: two of its words are equal. K is put between them.
    patches, keys = 4096, keys_for(1, device)
    ranked, order = random_bits(keys, patches, first=TWINS * patches)[0].sort(stable=True)
    twins = (ranked[1:] == ranked[:-1]).nonzero()
    place = int(twins[0])
    assert order[place] < order[place + 1]
    for kept in (place, place + 1, place + 2):
        with use_backend(backend):
            masks = random_masks(keys, patches, kept, first_sample=TWINS)
        assert torch.equal(masks.kept[0], order[:kept].sort().values)


def test_restore_undoes_the_gather(backend: str, device: str) -> None:
    with use_backend(backend):
        kept, restore, mask = random_masks(keys_for(3, device), 50, 20, samples=2)
    patches = torch.arange(50, device=device).expand(6, 50)
    removed = patches[mask].view(6, 30)
    assert torch.equal(torch.cat([kept, removed], 1).gather(1, restore), patches)


def test_split_of_the_samples_changes_nothing(backend: str, device: str) -> None:
    keys = keys_for(2, device)
    with use_backend(backend):
        whole = random_masks(keys, 30, 10, samples=6).kept.unflatten(0, (2, 6))
        first = torch.tensor([4, 1], device=device)
        parts = random_masks(keys, 30, 10, samples=2, first_sample=first).kept.unflatten(0, (2, 2))
    assert torch.equal(parts[0], whole[0, 4:6])
    assert torch.equal(parts[1], whole[1, 1:3])


def test_views_and_empty(backend: str, device: str) -> None:
    keys = keys_for(6, device)
    with use_backend(backend):
        assert equal(random_masks(keys[::2], 20, 5), random_masks(keys[::2].clone(), 20, 5))
        kept, restore, mask = random_masks(keys[:0], 20, 5, samples=3)
    assert (kept.shape, restore.shape, mask.shape) == ((0, 5), (0, 20), (0, 20))


def test_pretraining_masks_are_these_and_as_before() -> None:
    # Pretraining drew masks by ranking `uniform` before this operation existed; a run that is
    # continued must see the same ones.
    indices = torch.tensor([4, 9, 2, 700])
    draws = [uniform(11, Purpose.MASK, indices, 196, 3 * 2 + copy) for copy in range(2)]
    rank = torch.stack(draws, 1).flatten(0, 1).argsort(dim=1, stable=True)
    corruption = Corruption(SigmaLaw.parse("0"), 0.75, 11, (0.0,), (1.0,))
    masks = corruption.masks(indices, 3, 2, 196)
    assert masks is not None
    assert torch.equal(masks.kept, rank[:, :49].sort(1).values)


@pytest.mark.parametrize("patches", [64, 197])
def test_every_cpu_level_and_thread_count(
    cpu_level: str, set_threads: Callable[[int], None], patches: int
) -> None:
    with use_backend("reference"):
        expected = random_masks(keys_for(40), patches, 17, samples=20)
    for threads in (1, 3):
        set_threads(threads)
        with use_backend("native"):
            assert equal(random_masks(keys_for(40), patches, 17, samples=20), expected)


def test_opcheck_and_compile() -> None:
    arguments = (keys_for(2), torch.zeros(2, dtype=torch.int64), 2, 16, 4)
    torch.library.opcheck(torch.ops.nimfast.random_masks.default, arguments)

    def function(keys: Tensor) -> Tensor:
        masks = random_masks(keys, 16, 4, samples=2)
        return masks.restore * masks.mask + unit_masks(keys, (4, 4), 2, 0.5, samples=2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(keys_for(3)), function(keys_for(3)))


@pytest.mark.parametrize(
    ("grid", "unit", "ratio", "masked"),
    [
        ((12, 12), 2, 0.6, 22),  # SimMIM: 192 pixels, patch 16 of a unit of 32; ceil(0.6 * 36)
        ((4, 6), 2, 0.5, 3),
        ((4, 6), 1, 0.3, 8),  # ceil(7.2)
        ((6, 3), 3, 0.0, 0),
    ],
)
def test_units(
    backend: str, device: str, grid: tuple[int, int], unit: int, ratio: float, masked: int
) -> None:
    keys, (rows, columns) = keys_for(2, device), grid
    units = rows * columns // unit**2
    with use_backend(backend):
        mask = unit_masks(keys, grid, unit, ratio, samples=3, first_sample=2)
        small = random_masks(keys, units, units - masked, samples=3, first_sample=2).mask
    assert (mask.dtype, mask.shape) == (torch.bool, (6, rows * columns))
    assert mask.is_contiguous()
    assert mask.sum(1).tolist() == [masked * unit**2] * 6
    for row in range(rows):
        for column in range(columns):
            owner = row // unit * (columns // unit) + column // unit
            assert torch.equal(mask[:, row * columns + column], small[:, owner])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(2)}, TypeError, "keys is torch.float32; it must be int64"),
        ({"keys": torch.zeros(2, 1).long()}, ValueError, r"keys has shape \(2, 1\); .* \[B\]"),
        ({"patches": 0}, ValueError, "patches is 0; .* whole number from 1 to 4096"),
        ({"patches": 4097}, ValueError, "patches is 4097; .* from 1 to 4096"),
        ({"kept": 0}, ValueError, "kept is 0; it must be a whole number from 1 to 16"),
        ({"kept": 17}, ValueError, "kept is 17; it must be a whole number from 1 to 16"),
        ({"kept": 0.25}, ValueError, "kept is 0.25; it must be a whole number"),
        ({"samples": 0}, ValueError, "samples is 0; it must be a whole number of at least 1"),
        ({"first_sample": -1}, ValueError, "first_sample is -1; it must not be negative"),
        ({"first_sample": torch.zeros(2)}, TypeError, "first_sample is torch.float32"),
        (
            {"first_sample": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "first_sample is on meta; it must be on cpu",
        ),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"keys": torch.zeros(2, dtype=torch.int64), "patches": 16, "kept": 4}
    with pytest.raises(error, match=message):
        random_masks(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(2)}, TypeError, "keys is torch.float32; it must be int64"),
        ({"unit": 0}, ValueError, "unit is 0; it must be a whole number of at least 1"),
        ({"grid": (4, 5)}, ValueError, r"grid is \(4, 5\); both sides must be multiples of unit 2"),
        ({"grid": (0, 4)}, ValueError, r"grid is \(0, 4\); both sides must be"),
        ({"ratio": 1.0}, ValueError, r"ratio is 1.0; it must be in \[0, 1\)"),
        ({"ratio": -0.1}, ValueError, r"ratio is -0.1; it must be in \[0, 1\)"),
        ({"ratio": float("nan")}, ValueError, r"ratio is nan; it must be in \[0, 1\)"),
        ({"ratio": 0.9}, ValueError, "ratio is 0.9; it must leave one of the 4 units"),
    ],
)
def test_bad_units(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"keys": torch.zeros(2, dtype=torch.int64), "grid": (4, 4), "unit": 2, "ratio": 0.5}
    with pytest.raises(error, match=message):
        unit_masks(**{**good, **change})  # type: ignore[arg-type]
