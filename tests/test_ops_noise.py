# SPDX-License-Identifier: Apache-2.0
"""The noise law: known answers, an independent generator, statistics, separate streams."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from nimfast.ops import Stream, corrupt, image_keys, random_bits, use_backend
from nimfast.ops.noise import normals_reference

OPERATION = "corrupt"  # the noise is seen through it


def draw(keys: torch.Tensor, count: int, samples: int = 1, first: int = 0) -> torch.Tensor:
    """`count` standard normals of each sample of each key, through `corrupt`: [B, S, count]."""
    images = torch.zeros(len(keys), 1, 1, count, device=keys.device)
    out = corrupt(images, keys, 1.0, samples=samples, first_sample=first)
    return out.view(len(keys), samples, count)


def test_known_answers() -> None:
    # Random123's kat_vectors for philox4x32-10, and seed 42 as curand and Triton give it.
    words = random_bits(torch.tensor([0, 42]), 4)
    assert [f"{w:08x}" for w in words[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{w:08x}" for w in words[1]] == ["9ceaf053", "77f5493b", "12bf50ad", "5742b3d7"]


def test_integers_equal_numpy() -> None:
    # numpy ships Philox4x64 only, so the rounds are written out once more, in Python integers.
    def philox(key: int, quad: int) -> list[int]:
        k0, k1 = key & 0xFFFFFFFF, key >> 32
        c = [quad & 0xFFFFFFFF, quad >> 32, 0, 0]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [p1 >> 32 ^ c[1] ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        return c

    for key, quad in [(0x0123456789ABCDEF, 0), (2**63 + 12345, 2**32 - 1), (2**64 - 1, 2**40 + 7)]:
        signed = key - 2**64 if key >= 2**63 else key
        assert random_bits(torch.tensor([signed]), 4, first=4 * quad)[0].tolist() == philox(
            key, quad
        )


def test_keys_folded_in_cpp_equal_the_definition() -> None:
    indices = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**48 + 7, -1])
    for seed in (0, 2026, 2**63 + 5, 2**64 - 1):
        for stream in Stream:
            with use_backend("reference"):
                defined = image_keys(seed, stream, indices)
            assert torch.equal(image_keys(seed, stream, indices), defined)
    strided = torch.arange(12).view(6, 2)[:, 1]
    dense = strided.contiguous()
    assert torch.equal(image_keys(1, Stream.MASK, strided), image_keys(1, Stream.MASK, dense))
    with use_backend("triton"):  # of GPUs, whose keys may be folded on the host
        assert torch.equal(
            image_keys(1, Stream.MASK, dense), image_keys(1, Stream.MASK, dense.clone())
        )


def test_normals_equal_torch_stateless_generator() -> None:
    random = pytest.importorskip("torch.func._random", reason="torch >= 2.15 has it")
    for seed in (0, 42, 2**40 + 3):
        golden = random.normal(random.key(seed), 4096)
        ours = normals_reference(torch.tensor([seed]), torch.arange(4096))
        assert ((golden - ours).abs() <= 1e-5 * (1 + ours.abs())).all()


def test_normals_within_bound_of_float64(backend: str, device: str) -> None:
    count = 1 << (20 if backend == "native" else 14)
    keys = image_keys(3, Stream.EVALUATION, torch.arange(1, device=device))
    with use_backend(backend):
        ours = draw(keys, count)[0, 0]
    exact = normals_reference(keys, torch.arange(count, device=device))
    assert ((ours - exact).abs() <= 1e-5 * (1 + exact.abs())).all()


def test_normals_at_the_ends_of_the_word_range() -> None:
    # The tails and the neighbourhood of U = 1, where 1 - U has lost its bits in float32, are rare:
    # positions whose words lie there are searched for, so that the branch for them is seen to be
    # right.
    key = torch.tensor([9])
    words = random_bits(key, 1 << 24)[0, ::2]  # the words that become radii
    for extreme in (words.argmin(), words.argmax()):
        position = int(extreme) * 2
        images = torch.zeros(1, 1, 1, 4)
        ours = corrupt(images, key, 1.0, first_sample=position // 4).flatten()
        exact = normals_reference(key, torch.arange(position // 4 * 4, position // 4 * 4 + 4))
        assert ((ours - exact).abs() <= 1e-5 * (1 + exact.abs())).all()


def test_moments_and_distribution() -> None:
    keys = image_keys(11, Stream.TRAINING, torch.arange(4))
    z = draw(keys, 1 << 16, samples=16).double().flatten()  # 4.2 million
    n = z.numel()
    for power, expected in enumerate((0, 1, 0, 3, 0, 15), start=1):
        # Var(z^k) = E z^2k - (E z^k)^2; five standard errors at a fixed seed.
        double = math.prod(range(2 * power - 1, 0, -2))
        bound = 5 * math.sqrt((double - expected**2) / n)
        assert abs(float((z**power).mean()) - expected) < bound, power
    assert stats.kstest(z[:: 1 << 4].numpy(), "norm").pvalue > 1e-3
    for limit in (4.0, 5.0):
        expected = 2 * stats.norm.sf(limit) * n
        seen = int((z.abs() > limit).sum())
        assert stats.poisson.sf(seen - 1, expected) > 1e-4
        assert stats.poisson.cdf(seen, expected) > 1e-4


def test_no_correlation_between_lanes_samples_images_and_streams() -> None:
    count = 1 << 18
    bound = 5 / math.sqrt(count)
    indices = torch.arange(2)
    z = draw(image_keys(5, Stream.SELECTION, indices), count, samples=2).double()
    other = draw(image_keys(5, Stream.ESTIMATION, indices), count).double()
    reseeded = draw(image_keys(6, Stream.SELECTION, indices), count).double()
    pairs = {
        "samples": (z[0, 0], z[0, 1]),
        "images": (z[0, 0], z[1, 0]),
        "streams": (z[0, 0], other[0, 0]),
        "seeds": (z[0, 0], reseeded[0, 0]),
    }
    for lag in (1, 2, 3, 4):
        pairs[f"lag {lag}"] = (z[0, 0, :-lag], z[0, 0, lag:])
    for name, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < bound, name
        assert abs(float((a.square() * b.square()).mean()) - 1) < 3 * 5 / math.sqrt(count), name


def test_keys_depend_on_seed_stream_and_index() -> None:
    keys = [
        image_keys(seed, stream, torch.arange(100))
        for seed in (0, 1, 2**63, 2**64 - 1)
        for stream in Stream
    ]
    assert len(np.unique(torch.cat(keys).numpy())) == 100 * 4 * len(Stream)


def test_bad_keys() -> None:
    with pytest.raises(ValueError, match=r"seed is -1; it must be in"):
        image_keys(-1, Stream.TRAINING, torch.arange(2))
    with pytest.raises(TypeError, match="indices is torch.float32; it must be int64"):
        image_keys(0, Stream.TRAINING, torch.zeros(2))
