# SPDX-License-Identifier: Apache-2.0
"""Noise on the 8-bit grid: thresholds, law, the same bits everywhere, an attack on floats."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from nimfast.ops import (
    Stream,
    check_grid,
    corrupt,
    corrupt_patches,
    grid_slack,
    image_keys,
    random_bits,
    use_backend,
)
from nimfast.ops.backend import interpreting, native
from nimfast.ops.grid import grid_law, thresholds
from nimfast.ops.patches import patchify
from nimfast.smoothing import bounds

mpmath = pytest.importorskip("mpmath")
OPERATION = "corrupt"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGMAS = (0.003, 0.25, 0.5, 1.0, 4.0)


def tail(j: int, sigma: float) -> object:
    """P(N > j + 1/2) for N normal with standard deviation 255 sigma, in 50 digits."""
    with mpmath.workdps(50):
        z = (j + mpmath.mpf(1) / 2) / (255 * mpmath.mpf(sigma))
        return mpmath.erfc(z / mpmath.sqrt(2)) / 2


def images_for(*shape: int, device: str = "cpu") -> Tensor:
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    return (values.float() / 255).to(device)


def keys_for(batch: int, device: str = "cpu") -> Tensor:
    return image_keys(7, Stream.ESTIMATION, torch.arange(batch, device=device))


def draw(keys: Tensor, count: int, sigma: float, samples: int = 1, first: int = 0) -> Tensor:
    """Whole numbers: int32 [B, S, count]."""
    images = torch.zeros(len(keys), 1, 1, count, device=keys.device)
    noise = {"samples": samples, "first_sample": first, "noise": "grid"}
    out = corrupt(images, keys, sigma, **noise)  # type: ignore[arg-type]
    return (out * 255).round().int().view(len(keys), samples, count)


# --- thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
def test_thresholds_are_right_to_the_last_bit(sigma: float) -> None:
    found = thresholds(sigma)
    step = max(1, len(found) // 300)
    with mpmath.workdps(50):
        for j in [*range(0, len(found), step), len(found) - 1]:
            assert abs(tail(j, sigma) * 2**64 - found[j]) <= 0.5 + 1e-25
        assert tail(len(found), sigma) * 2**64 < 0.5
    assert all(a >= b for a, b in itertools.pairwise(found))
    assert found[0] < 2**63


def test_slack_bounds_the_distance_of_the_laws() -> None:
    sigma, shape = 0.25, (3, 32, 32)
    found = thresholds(sigma)
    with mpmath.workdps(50):
        exact = [tail(j, sigma) for j in range(len(found) + 400)]
        drawn = [mpmath.mpf(value) / 2**64 for value in found] + [mpmath.mpf(0)] * 400
        # Probabilities of 0, then of 1, 2, ... on one side, which count twice.
        gaps = [drawn[j] - drawn[j + 1] - (exact[j] - exact[j + 1]) for j in range(len(exact) - 1)]
        distance = abs(exact[0] - drawn[0]) + sum(abs(gap) for gap in gaps)
    assert 0 < 3072 * distance < grid_slack(shape, sigma)
    assert grid_slack(shape, sigma) == 3072 * 2 * len(found) * 2.0**-64


@pytest.mark.parametrize("sigma", [*SIGMAS, *(0.02 * 2.1**k for k in range(8)), 8.0])
def test_table_agrees_with_the_thresholds(sigma: float) -> None:
    """At every threshold, beside it, at the edges of all cells and at random."""
    law, exact = grid_law(sigma, torch.device("cpu")), np.array(thresholds(sigma), np.uint64)
    upper = (exact >> np.uint64(32)).astype(np.int64)
    edges = (np.arange(32 << (23 - law.shift)) << law.shift) + 0x3F000000
    at = np.floor(edges.astype(np.uint32).view(np.float32)).astype(np.int64)
    spread = np.random.default_rng(0).integers(0, 2**31, 10_000)
    words = np.concatenate([upper - 1, upper, upper + 1, at - 1, at, spread])
    words = np.unique(words.clip(0, 2**31 - 1))
    place = (words.astype(np.float32) + np.float32(0.5)).view(np.int32) - 0x3F000000
    entry = law.table.numpy().view(np.uint32)[place >> law.shift]
    below = place & ((1 << law.shift) - 1)
    size = (entry >> 16).astype(np.int64) - (below > (entry & 0xFFFF))
    decided = below != (entry & 0xFFFF)
    for further in (0, 2**32 - 1):  # whatever the lower 32 bits
        folded = (words.astype(np.uint64) << np.uint64(32)) + np.uint64(further)
        expected = len(exact) - np.searchsorted(exact[::-1], folded, side="right")
        np.testing.assert_array_equal(size[decided], expected[decided])
    # Few draws need 64 bits: a threshold's share of the floats of its size.
    assert decided[np.isin(words, spread)].mean() > 0.998


# --- back ends ------------------------------------------------------------------------------------

SHAPES = {
    "one CIFAR image": (1, 3, 32, 32),
    "no batch": (0, 3, 8, 8),
    "values no multiple of 4, so rows begin inside a quad": (3, 3, 5, 5),
    "plane a multiple of 4 but not of 8": (2, 3, 2, 2),
    "one value": (2, 1, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_as_the_reference(
    backend: str, device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if backend == "triton" and interpreting() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16, where the compiled kernel rounds")
    images, keys = images_for(*shape, device=device), keys_for(shape[0], device)
    options = {"samples": 3, "first_sample": 5, "noise": "grid", "dtype": dtype}
    options |= {"mean": MEAN[: shape[1]], "std": STD[: shape[1]]}
    with use_backend(backend):
        ours = corrupt(images, keys, 0.5, **options)  # type: ignore[arg-type]
    with use_backend("reference"):
        assert torch.equal(ours, corrupt(images, keys, 0.5, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("patch", "side"), [(2, 8), (4, 8), (7, 14), (14, 28), (16, 32)])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_patch_rows(backend: str, device: str, patch: int, side: int, channels: int) -> None:
    if backend == "triton" and interpreting() and (side > 14 or channels == 2):
        pytest.skip("slow in the interpreter, and the same code as of smaller patches")
    images, keys = images_for(2, channels, side, side, device=device), keys_for(2, device)
    options = {"samples": 2, "first_sample": 2**33, "noise": "grid"}
    options |= {"mean": MEAN[:channels], "std": STD[:channels]}
    kept = torch.tensor([[3, 0], [1, 3], [2, 2], [0, 1]], device=device)
    with use_backend("reference"):
        rows = patchify(corrupt(images, keys, 0.25, **options), patch)  # type: ignore[arg-type]
    with use_backend(backend):
        ours = corrupt_patches(images, keys, 0.25, patch=patch, kept=kept, **options)  # type: ignore[arg-type]
    assert torch.equal(ours, rows.gather(1, kept[:, :, None].expand_as(ours)))


@pytest.fixture(scope="module")
def undecided() -> list[tuple[int, int]]:
    """Positions and words of key 11 that equal a threshold's upper half: the lower half decides."""
    words = random_bits(torch.tensor([11]), 1 << 21)[0]
    folded = torch.where(words >= 2**31, words ^ 0xFFFFFFFF, words)
    upper = torch.tensor([value >> 32 for value in thresholds(8.0)])
    positions = torch.isin(folded, upper).nonzero()[:, 0].tolist()
    return [(position, int(words[position])) for position in positions]


def test_draws_that_need_64_bits(
    backend: str, device: str, undecided: list[tuple[int, int]]
) -> None:
    sigma, key = 8.0, torch.tensor([11])
    exact = thresholds(sigma)
    below = 0
    with use_backend(backend):
        for position, word in undecided:
            lane = position % 4
            found = draw(key.to(device), 4, sigma, first=position // 4)[0, 0, lane]
            # Once more in Python's integers: counter (quad, 0, 0, 1).
            further = philox(int(key), position // 4)[lane]
            bits = word << 32 | further
            positive = bits >= 2**63
            size = sum((2**64 - 1 - bits if positive else bits) < value for value in exact)
            assert int(found) == (size if positive else -size)
            below += (bits ^ (2**32 - 1) * positive) % 2**32 < exact[size - 1] % 2**32
    assert len(undecided) > 5 and 0 < below < len(undecided)  # 9 expected; both answers occur


def philox(key: int, quad: int) -> list[int]:
    """The words further on of a quad below 2^32, of a key below 2^32."""
    k0, k1, c = key, 0, [quad, 0, 0, 1]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


@pytest.mark.parametrize("sigma", SIGMAS)
def test_every_cpu_level_draws_the_same_numbers(cpu_level: str, sigma: float) -> None:
    keys = keys_for(2)
    with use_backend("native"):
        ours = draw(keys, 1023, sigma, samples=8)
    with use_backend("reference"):
        assert torch.equal(ours, draw(keys, 1023, sigma, samples=8))


def test_compiled_and_checked_as_an_operation() -> None:
    images, keys = images_for(2, 1, 8, 8), keys_for(2)

    def function(x: Tensor) -> Tensor:
        return corrupt(x, keys, 0.5, samples=2, noise="grid").square().mean((1, 2, 3))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), function(images))
    sigma, first = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    arguments = (images, keys, first, sigma, 2, [0.5], [0.5], torch.bfloat16, 0.5)
    torch.library.opcheck(torch.ops.nimfast.corrupt.default, arguments)


def test_gradient_passes_the_rounding() -> None:
    images = images_for(2, 1, 4, 4).requires_grad_()
    corrupt(images, keys_for(2), 0.5, samples=3, std=(0.5,), noise="grid").sum().backward()
    assert images.grad is not None and torch.equal(images.grad, torch.full_like(images, 6.0))


# --- law ------------------------------------------------------------------------------------------


def law_of(sigma: float) -> np.ndarray:
    """P(k) for k = -J .. J, from the exact thresholds; the tails beyond have less than 2^-64."""
    tails = np.array([float(tail(j, sigma)) for j in range(len(thresholds(sigma)))])
    one_side = tails - np.append(tails[1:], 0.0)
    return np.concatenate([one_side[::-1], [1 - 2 * tails[0]], one_side])


def chi_square(counts: np.ndarray, sigma: float) -> float:
    """P-value; numbers with fewer than 20 expected draws are put together at both ends."""
    expected = law_of(sigma) * counts.sum()
    inner = np.flatnonzero(expected >= 20)
    first, last = inner[0], inner[-1]

    def put_together(values: np.ndarray) -> np.ndarray:
        ends = [values[:first].sum()], [values[last + 1 :].sum()]
        return np.concatenate([ends[0], values[first : last + 1], ends[1]])

    seen, wanted = put_together(counts), put_together(expected)
    keep = wanted > 0
    return float(stats.chisquare(seen[keep], wanted[keep] * seen.sum() / wanted.sum()).pvalue)


def histogram(sigma: float, images: int, samples: int, count: int) -> np.ndarray:
    size = len(thresholds(sigma))
    counts = torch.zeros(2 * size + 1, dtype=torch.int64)
    for image in range(images):
        key = image_keys(2026, Stream.ESTIMATION, torch.tensor([image]))
        drawn = draw(key, count, sigma, samples).flatten()
        counts += torch.bincount(drawn + size, minlength=2 * size + 1)
    return counts.numpy()


@pytest.mark.skipif(native() is None, reason="too many for the reference")
@pytest.mark.parametrize("sigma", [0.003, 0.25, 1.0])
def test_law(sigma: float) -> None:
    counts = histogram(sigma, images=4, samples=64, count=1 << 14)  # 4.2 million
    assert chi_square(counts, sigma) > 1e-4
    assert chi_square(counts, sigma * 1.002) < 1e-4 or sigma < 0.01  # the test would notice


@pytest.mark.slow
@pytest.mark.skipif(native() is None, reason="too many for the reference")
def test_law_of_a_thousand_million() -> None:
    counts = histogram(0.5, images=239, samples=64, count=1 << 16)
    assert counts.sum() > 10**9
    pvalue = chi_square(counts, 0.5)
    print(f"{counts.sum():,} draws, chi-square p = {pvalue:.3f}")
    assert pvalue > 1e-4


# --- soundness ------------------------------------------------------------------------------------


def test_floats_that_leave_are_a_function_of_the_noisy_grid_image() -> None:
    """One float for each whole number, whatever the clean value below it was."""
    images = torch.cat([torch.zeros(1, 3, 32, 32), images_for(3, 3, 32, 32)])
    plain = corrupt(images, keys_for(4), 0.25, samples=50, noise="grid")
    whole = (plain * 255).round()
    for c in range(3):
        normal = {"mean": MEAN, "std": STD, "samples": 50}
        out = corrupt(images, keys_for(4), 0.25, noise="grid", **normal)[:, c]  # type: ignore[arg-type]
        pairs = torch.stack([whole[:, c].flatten().double(), out.flatten().double()])
        assert len(pairs.unique(dim=1)[0]) == len(whole[:, c].unique()) > 400


def low_bits_classifier(noisy: Tensor) -> Tensor:
    """Class 1 where a pixel near 0 has bits finer than 2^-29: whether 0 was below the noise.

    A float's last bit weighs 2^-24 of its size. Noise that lands near 0 from a clean value of 5/255
    was a number of that size when it was added, with no bits below 2^-29 (the idea of Jin et al.,
    "Getting a-Round Guarantees: Floating-Point Attacks on Certified Robustness", 2022).
    """
    pixels = noisy.flatten(1).double()
    fine = (pixels * 2.0**29).frac() != 0
    return (fine & (pixels.abs() < 2.0**-8)).any(1).long()


@pytest.mark.parametrize("noise", ["gaussian", "grid"])
def test_attack_on_floating_point_smoothing(noise: str) -> None:
    """An image within the certified radius gets the other class: of float noise, not of ours."""
    sigma, n, alpha = 0.25, 10_000, 0.001
    clean = torch.zeros(1, 1, 32, 32)
    attacked = torch.full_like(clean, 5 / 255)

    def votes(image: Tensor) -> list[int]:
        found = torch.zeros(2, dtype=torch.int64)
        for first in range(0, n, 1000):
            options = {"samples": 1000, "first_sample": first, "noise": noise}
            copies = corrupt(image, keys_for(1), sigma, **options)  # type: ignore[arg-type]
            found += torch.bincount(low_bits_classifier(copies), minlength=2)
        return [int(count) for count in found]

    before, after = votes(clean), votes(attacked)
    winner = before.index(max(before))
    slack = grid_slack((1, 32, 32), sigma) if noise == "grid" else 0.0
    radius = bounds.radius(bounds.lower_bound(before[winner], n, alpha) - slack, sigma)
    distance = float((attacked - clean).norm())
    assert distance < radius  # a certificate that promises the attack cannot work
    broken = after.index(max(after)) != winner
    assert broken == (noise == "gaussian")
    if noise == "gaussian":
        assert before[1] > 0.999 * n and after[0] == n


# --- bad input ------------------------------------------------------------------------------------

GOOD = {"images": torch.zeros(2, 1, 4, 4), "keys": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sigma": 0.0}, ValueError, "sigma is 0.0; noise on the grid needs 0 < sigma <= 8"),
        ({"sigma": 8.5}, ValueError, "sigma is 8.5; noise on the grid needs"),
        ({"sigma": math.nan}, ValueError, "sigma is nan; noise on the grid needs"),
        ({"sigma": torch.zeros(2)}, TypeError, "noise on the grid takes one number"),
        ({"sigma": 0.5, "noise": "Grid"}, ValueError, "noise is 'Grid'; it must be one of"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        corrupt(**{**GOOD, "noise": "grid", **change})  # type: ignore[arg-type]


def test_images_off_the_grid_are_refused() -> None:
    check_grid(torch.arange(256).float() / 255)
    check_grid(torch.arange(256).float() * (1 / 255))
    for wrong in (0.5 / 255, -1 / 255, 256 / 255, math.nan, math.inf, 1e-3):
        with pytest.raises(ValueError, match="no multiples of 1/255"):
            check_grid(torch.tensor([0.0, wrong]))
    with pytest.raises(ValueError, match="sigma is 9.0"):
        grid_slack((3, 32, 32), 9.0)
