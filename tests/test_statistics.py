# SPDX-License-Identifier: Apache-2.0
"""The noise law as a law: 10^8 normals, 10^5 masks, at fixed seeds. Most are slow: -m slow.

Seeds are fixed, so a test passes or fails for good. Its bounds are such that a right generator
misses them at less than one seed in a hundred.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from scipy import stats
from test_ops_noise import draw
from torch import Tensor

from nimfast.ops import Stream, image_keys, random_masks, use_backend
from nimfast.ops.backend import native

pytestmark = pytest.mark.skipif(native() is None, reason="too many for the reference")

SEED = 2026
SAMPLES, VALUES = 64, 1 << 16  # of an image
IMAGES = 24  # 24 * 2^22 = 1.007e8 normals
TOTAL = IMAGES * SAMPLES * VALUES
SIGMAS = 5.0  # once in 1.7 million tests


def normals() -> Iterator[Tensor]:
    """All of them, an image [SAMPLES, VALUES] at a time, fp64."""
    for image in range(IMAGES):
        with use_backend("native"):
            keys = image_keys(SEED, Stream.ESTIMATION, torch.tensor([image]))
            yield draw(keys, VALUES, SAMPLES)[0].double()


def even_moment(power: int) -> int:
    """E z^power of a standard normal: (power - 1)!!"""
    return math.prod(range(power - 1, 0, -2))


@pytest.mark.slow
def test_moments_tails_and_distribution() -> None:
    """Catches a wrong scale or angle, radii cut short, words of too few bits."""
    sums, largest = torch.zeros(6, dtype=torch.float64), 0.0
    tails = dict.fromkeys((4, 5), 0)
    cells = 1 << 18
    histogram = torch.zeros(cells, dtype=torch.int64)
    for z in normals():
        power = torch.ones_like(z)
        for k in range(6):
            sums[k] += power.mul_(z).sum()
        size = z.abs()
        largest = max(largest, float(size.max()))
        for limit in tails:
            tails[limit] += int((size > limit).sum())
        place = torch.special.ndtr(z.flatten()).mul_(cells).long().clamp_(max=cells - 1)
        histogram += torch.bincount(place, minlength=cells)

    for k in range(1, 7):
        expected = 0 if k % 2 else even_moment(k)
        deviation = math.sqrt((even_moment(2 * k) - expected**2) / TOTAL)
        assert abs(float(sums[k - 1]) / TOTAL - expected) < SIGMAS * deviation, f"moment {k}"
    for limit, seen in tails.items():
        chance = 2 * stats.norm.sf(limit)
        assert stats.binomtest(seen, TOTAL, chance).pvalue > 1e-4, f"beyond {limit}: {seen}"
    # Beyond 5.3 twelve values in 10^8 are expected; sqrt(2 ln 2^33) = 6.764 ends the range.
    assert 5.3 < largest < 6.764

    # Kolmogorov-Smirnov at the edges of 2^18 cells of equal probability: between two of them the
    # distance grows by one cell's probability at most.
    reached = histogram.cumsum(0).double() / TOTAL
    distance = float((reached - torch.arange(1, cells + 1) / cells).abs().max()) + 1 / cells
    assert stats.kstwobign.sf(distance * math.sqrt(TOTAL)) > 1e-4
    for coarse in (64, 1024, 1 << 14):
        counts = histogram.view(coarse, -1).sum(1)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4, f"{coarse} bins"


def features(z: Tensor) -> Tensor:
    """[n, v] -> [2n, v]: the values and their squares, each of mean 0 and variance 1."""
    return torch.cat([z, (z.square() - 1) / math.sqrt(2)])


def largest_correlation(gram: Tensor, variables: int, count: int) -> float:
    """The largest |r| sqrt(count) between two variables, from the sums of their features' products.

    A variable and its own square are not independent, so those entries do not count.
    """
    own = torch.eye(variables).repeat(2, 2).bool()
    return float(gram.masked_fill(own, 0).abs().max()) / math.sqrt(count)


@pytest.mark.slow
def test_lanes_and_quads_are_independent() -> None:
    """Catches lanes out of one word, counters that overlap and rounds left out.

    The twelve variables are the lanes of a quad, of the next one, and of that 64 further, where the
    CPU begins a new block.
    """
    gram, count = torch.zeros(24, 24, dtype=torch.float64), 0
    for z in normals():
        quads = z.view(SAMPLES, -1, 4)
        lanes = [quads[:, :-64], quads[:, 1:-63], quads[:, 64:]]
        all_lanes = features(torch.cat(lanes, 2).flatten(0, 1).T)
        gram += all_lanes @ all_lanes.T
        count += all_lanes.shape[1]
    assert largest_correlation(gram, 12, count) < SIGMAS


@pytest.mark.slow
def test_streams_images_and_samples_are_independent() -> None:
    """Catches a key or a sample number that is dropped, cut to a few bits or added to another.

    Every pair out of 6 streams, 2 seeds, 3 images and 2 samples: 72 sequences. Images and samples
    stand next to one another and far apart.
    """
    count, parts = 1 << 20, 16
    indices = torch.tensor([0, 1, 2**32])
    keys = [image_keys(seed, stream, indices) for seed in (SEED, SEED + 1) for stream in Stream]
    gram = torch.zeros(144, 144, dtype=torch.float64)
    for part in range(parts):
        with use_backend("native"):
            pair = draw(torch.cat(keys), count // parts, samples=2, first=2 * part)
        z = features(pair.flatten(0, 1).double())
        gram += z @ z.T
    assert largest_correlation(gram, 72, count) < SIGMAS


# (rows, L, K): small pictures, CIFAR's at SimMIM's ratio, ImageNet's at MAE's, and rows that begin
# inside a quad.
LARGE = [(1_000_000, 16, 4), (200_000, 64, 26), (100_000, 196, 49), (100_000, 197, 50)]
SIZES = [pytest.param(4_000, 16, 4), *(pytest.param(*n, marks=pytest.mark.slow) for n in LARGE)]


def draw_masks(rows: int, patches: int, kept: int) -> Tensor:
    """Kept places as ones: fp32 [images, 8 samples, L]."""
    keys = image_keys(SEED, Stream.MASK, torch.arange(rows // 8))
    with use_backend("native"):
        mask = random_masks(keys, patches, kept, samples=8).mask
    return (~mask).float().view(-1, 8, patches)


def joint(patches: int, kept: int, several: int) -> float:
    """Probability that `several` given patches are all kept."""
    return math.comb(kept, several) / math.comb(patches, several)


@pytest.mark.parametrize(("rows", "patches", "kept"), SIZES)
def test_every_patch_is_kept_equally_often(rows: int, patches: int, kept: int) -> None:
    """Catches a place that is favoured: ties or blocks that lean to one end, a word used twice."""
    counts = draw_masks(rows, patches, kept).sum((0, 1)).double()
    share = kept / patches
    assert float(counts.sum()) == rows * kept
    # The counts of a row add up to K, so any two of them have covariance -share (1 - share) / (L -
    # 1): by L / (L - 1) more spread than independent ones have around their mean, on L - 1 degrees.
    statistic = (counts - rows * share).square().sum() / (rows * share * (1 - share))
    pvalue = stats.chi2.sf(float(statistic) * (patches - 1) / patches, patches - 1)
    assert 1e-4 < pvalue < 1 - 1e-4
    for count in counts.tolist():
        assert stats.binomtest(int(count), rows, share).pvalue > 1e-4 / patches


@pytest.mark.parametrize(("rows", "patches", "kept"), SIZES)
def test_every_pair_is_kept_equally_often(rows: int, patches: int, kept: int) -> None:
    """Catches patches that go together, as those of one quad would if it lent them one word."""
    masks = draw_masks(rows, patches, kept).flatten(0, 1)
    # Whole numbers below 2^24, so exact in fp32.
    together = torch.stack([part.T @ part for part in masks.split(1 << 20)]).sum(0).double()
    p2, p3, p4 = (joint(patches, kept, several) for several in (2, 3, 4))
    distinct = ~torch.eye(patches, dtype=torch.bool)
    excess = torch.where(distinct, together - rows * p2, 0)
    worst = float(excess.abs().max()) / math.sqrt(rows * p2 * (1 - p2))
    assert stats.norm.sf(worst) * patches * (patches - 1) > 1e-4
    # What is left of the pairs once each patch's own frequency is taken out. The covariance of two
    # pair counts depends on how many patches they share; on what is left it is one number (the
    # Johnson scheme J(L, 2)), so the sum of squares is chi-square with L (L - 3) / 2 degrees.
    own = excess.sum(1) / (patches - 2)
    left = torch.where(distinct, excess - own[:, None] - own[None, :], 0)
    variance = rows * ((p2 - p2**2) - 2 * (p3 - p2**2) + (p4 - p2**2))
    pvalue = stats.chi2.sf(float(left.square().sum()) / 2 / variance, patches * (patches - 3) / 2)
    assert 1e-4 < pvalue < 1 - 1e-4


@pytest.mark.parametrize(("rows", "patches", "kept"), SIZES)
def test_masks_are_independent(rows: int, patches: int, kept: int) -> None:
    """Catches masks that share words: of neighbouring samples, of neighbouring images."""
    masks = draw_masks(rows, patches, kept)
    pairs = {
        "samples": (masks[:, :-1], masks[:, 1:]),
        "images": (masks[:-1], masks[1:]),
        "shifted by one patch": (masks[:, :-1, 1:], masks[:, 1:, :-1]),
    }
    share, p2 = kept / patches, joint(patches, kept, 2)
    for name, (one, other) in pairs.items():
        overlap, width = (one * other).sum(2).double(), one.shape[2]
        mean = width * share**2
        variance = width * (share**2 - share**4) + width * (width - 1) * (p2**2 - share**4)
        deviation = math.sqrt(variance / overlap.numel())
        assert abs(float(overlap.mean()) - mean) < SIGMAS * deviation, name
        spread = float((overlap - mean).square().mean()) / variance
        assert abs(spread - 1) < SIGMAS * math.sqrt(3 / overlap.numel()), name
