# SPDX-License-Identifier: Apache-2.0
"""corrupt: every back end against the reference, at the edges, with gradients and torch.compile."""

import pytest
import torch
from torch import Tensor

from nimfast.ops import Stream, corrupt, image_keys, use_backend
from nimfast.ops.backend import interpreting

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def keys_for(batch: int, device: str = "cpu") -> Tensor:
    return image_keys(7, Stream.ESTIMATION, torch.arange(batch, device=device))


def images_for(*shape: int, device: str = "cpu") -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)


def both(backend: str, images: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    keys = keys_for(len(images), str(images.device))
    with use_backend(backend):
        ours = corrupt(images, keys, **options)  # type: ignore[arg-type]
    with use_backend("reference"):
        reference = corrupt(images, keys, **options)  # type: ignore[arg-type]
    return ours, reference


# The regime each shape stands for: [B, C, H, W].
SHAPES = {
    "one CIFAR image": (1, 3, 32, 32),
    "two digits": (2, 1, 32, 32),
    "no batch": (0, 3, 8, 8),
    "values no multiple of 4, so rows begin inside a quad": (3, 3, 5, 5),
    "width no multiple of 4, plane is": (2, 3, 2, 6),
    "plane of 14 x 14": (1, 1, 14, 14),
    "plane a multiple of 4 but not of 8: no 16-byte store in half precision": (2, 3, 2, 2),
    "one value": (2, 1, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_reference(backend: str, device: str, shape: tuple[int, ...]) -> None:
    images = images_for(*shape, device=device)
    channels = shape[1]
    options = {"samples": 3, "first_sample": 5, "mean": MEAN[:channels], "std": STD[:channels]}
    ours, reference = both(backend, images, sigma=0.5, **options)
    assert ours.shape == (3 * shape[0], *shape[1:])
    assert ours.is_contiguous()
    assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-5 * 0.5 / min(STD))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    images = images_for(2, 3, 8, 8, device=device)
    options = {"samples": 4, "mean": MEAN, "std": STD}
    with use_backend("reference"):
        exact = corrupt(images, keys_for(2, device), 0.25, **options)  # type: ignore[arg-type]
    with use_backend(backend):
        ours = corrupt(images, keys_for(2, device), 0.25, dtype=dtype, **options)  # type: ignore[arg-type]
    assert ours.dtype == dtype
    # At most twice the error of rounding the exact value.
    error, rounding = (ours - exact).abs(), (exact.to(dtype) - exact).abs().max()
    assert error.max() <= 2 * rounding


def test_half_precision_rounds_as_torch(backend: str, device: str) -> None:
    # Without noise the result is a plain cast; the values span subnormal numbers, overflow and
    # ties.
    values = torch.cat([2.0 ** torch.arange(-26, 18), torch.tensor([0.0, 65519.0, 65520.0, 1e-8])])
    values = torch.cat([values, values * 1.5, values * (1 + 2**-11), values * (1 + 3 * 2**-9)])
    images = torch.cat([values, -values]).view(1, 1, 1, -1).to(device)
    # Triton's interpreter truncates to bfloat16, where the compiled kernel rounds.
    truncates = backend == "triton" and interpreting()
    for dtype in (torch.float16,) if truncates else (torch.float16, torch.bfloat16):
        with use_backend(backend):
            ours = corrupt(images, keys_for(1, device), 0.0, dtype=dtype)
        assert torch.equal(ours, images.to(dtype))


def test_sigma_and_first_sample_per_image(backend: str, device: str) -> None:
    images = images_for(3, 1, 4, 4, device=device)
    sigma = torch.tensor([0.0, 0.25, 1.0], device=device)
    first = torch.tensor([0, 7, 2**33], device=device)  # positions beyond 2^32
    ours, reference = both(backend, images, sigma=sigma, first_sample=first, samples=2)
    assert torch.allclose(ours, reference, atol=1e-5)
    assert torch.equal(ours[0], images[0])


def test_flat_index_crosses_2_to_32(backend: str, device: str) -> None:
    images = images_for(1, 1, 8, 8, device=device)
    first = 2**32 * 4 // 64 - 1  # the quad number passes 2^32 between these two samples
    ours, reference = both(backend, images, sigma=1.0, first_sample=first, samples=2)
    assert torch.allclose(ours, reference, atol=1e-4)


def test_same_bits_however_the_samples_are_split(backend: str, device: str) -> None:
    images, keys = images_for(2, 3, 5, 7, device=device), keys_for(2, device)
    with use_backend(backend):
        whole = corrupt(images, keys, 0.5, samples=12).unflatten(0, (2, 12))
        parts = [
            corrupt(images[b : b + 1], keys[b : b + 1], 0.5, samples=n, first_sample=first)
            for b in range(2)
            for first, n in ((0, 1), (1, 4), (5, 7))
        ]
    assert torch.equal(whole.flatten(0, 1), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [(96, 96), (95, 97)], ids=["aligned rows", "odd rows"])
def test_results_past_the_caches_have_the_same_bits(
    cpu_level: str, dtype: torch.dtype, side: tuple[int, int]
) -> None:
    samples = 310 if dtype == torch.float32 else 620  # 34 MB; from 32 MB on stores pass the caches
    images, keys = images_for(1, 3, *side), keys_for(1)
    whole = corrupt(images, keys, 0.5, samples=samples, mean=MEAN, std=STD, dtype=dtype)
    half = samples // 2
    for first in (0, half):
        part = corrupt(
            images, keys, 0.5, samples=half, first_sample=first, mean=MEAN, std=STD, dtype=dtype
        )
        assert torch.equal(whole[first : first + half], part)


@pytest.mark.parametrize("sigma", [0.0, 1e-30, -0.5, 1e25])
def test_unusual_sigma(backend: str, device: str, sigma: float) -> None:
    images = torch.zeros(1, 1, 16, 16, device=device)
    levels = torch.full((1,), sigma, device=device)
    with use_backend(backend):
        one = corrupt(images, keys_for(1, device), 1.0)
        drawn = corrupt(images, keys_for(1, device), levels)
    assert torch.allclose(drawn.double(), one.double() * levels.double(), rtol=1e-5, atol=0)


def test_views(backend: str, device: str) -> None:
    big = images_for(4, 3, 9, 8, device=device)
    views = {
        "sliced": big[1:3, :, 1:5, 2:6],
        "channels last": big.contiguous(memory_format=torch.channels_last),
        "expanded": big[:1].expand(3, -1, -1, -1),
        "every other": big[::2],
        "misaligned": torch.cat([torch.zeros(1, device=device), big.flatten()])[1:].view(big.shape),
    }
    for name, view in views.items():
        keys = keys_for(len(view), device)
        with use_backend(backend):
            plain = corrupt(view.clone(memory_format=torch.contiguous_format), keys, 0.3, samples=2)
            assert torch.equal(corrupt(view, keys, 0.3, samples=2), plain), name


def test_gradient(backend: str, device: str) -> None:
    images = images_for(2, 3, 4, 4, device=device).requires_grad_()
    weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    with use_backend(backend):
        (
            corrupt(images, keys_for(2, device), 0.5, samples=3, mean=MEAN, std=STD) * weight
        ).sum().backward()
    expected = weight.view(2, 3, 3, 4, 4).sum(1) / torch.tensor(STD, device=device).view(3, 1, 1)
    assert images.grad is not None
    assert torch.allclose(images.grad, expected, rtol=1e-5, atol=1e-5)


def test_compiled_equals_eager() -> None:
    images, keys = images_for(2, 3, 8, 8), keys_for(2)

    def function(x: Tensor) -> Tensor:
        return corrupt(x, keys, 0.5, samples=2, mean=MEAN, std=STD).square().mean((1, 2, 3))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), function(images))
    grad_in = images.clone().requires_grad_()
    compiled(grad_in).sum().backward()
    eager_in = images.clone().requires_grad_()
    function(eager_in).sum().backward()
    assert torch.allclose(grad_in.grad, eager_in.grad, atol=1e-6)


def test_opcheck() -> None:
    images = images_for(2, 1, 4, 4)
    sigma, first = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    arguments = (images, keys_for(2), first, sigma, 2, [0.5], [0.5], torch.bfloat16)
    torch.library.opcheck(torch.ops.nimfast.corrupt.default, arguments)


def test_every_cpu_level_draws_the_same_noise(cpu_level: str) -> None:
    ours, reference = both("native", images_for(2, 3, 33, 31), sigma=1.0, samples=2)
    assert torch.allclose(ours, reference, atol=1e-5)


def test_threads_do_not_change_a_bit() -> None:
    images, keys = images_for(3, 3, 64, 64), keys_for(3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = corrupt(images, keys, 0.5, samples=20)
        torch.set_num_threads(3)
        assert torch.equal(corrupt(images, keys, 0.5, samples=20), alone)
    finally:
        torch.set_num_threads(threads)


GOOD = {"images": torch.zeros(2, 3, 4, 4), "keys": torch.zeros(2, dtype=torch.int64), "sigma": 0.5}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"images": torch.zeros(2, 3, 4, 4).double()},
            TypeError,
            "images is torch.float64; it must be float32",
        ),
        (
            {"images": torch.zeros(3, 4, 4)},
            ValueError,
            r"images has shape \(3, 4, 4\); it must be \[B, C, H, W\]",
        ),
        ({"keys": torch.zeros(2)}, TypeError, "keys is torch.float32; it must be int64"),
        (
            {"keys": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"keys has shape \(3,\); it must be \[2\]",
        ),
        (
            {"keys": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "keys is on meta; it must be on cpu",
        ),
        ({"sigma": -1.0}, ValueError, "sigma is -1.0; it must be finite and not negative"),
        ({"sigma": float("nan")}, ValueError, "sigma is nan; it must be finite"),
        ({"sigma": torch.zeros(3)}, ValueError, r"sigma has shape \(3,\)"),
        ({"samples": 0}, ValueError, "samples is 0; it must be a whole number of at least 1"),
        ({"first_sample": -1}, ValueError, "first_sample is -1; it must not be negative"),
        (
            {"dtype": torch.int8},
            TypeError,
            "dtype is torch.int8; it must be float32, bfloat16 or float16",
        ),
        ({"mean": (0.5,)}, ValueError, "mean has 1 values; images have 3 channels"),
        ({"std": (0.5, 0.0, 1.0)}, ValueError, "std is .*; every value must be positive"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        corrupt(**{**GOOD, **change})  # type: ignore[arg-type]
