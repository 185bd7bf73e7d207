# SPDX-License-Identifier: Apache-2.0
"""corrupt_patches: the rows of corrupt's result, bit for bit, at the edges, with gradients."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nimfast.ops import Stream, corrupt, corrupt_patches, image_keys, use_backend
from nimfast.ops.backend import interpreting, native
from nimfast.ops.patches import patchify, unpatchify

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def keys_for(batch: int, device: str = "cpu") -> Tensor:
    return image_keys(7, Stream.TRAINING, torch.arange(batch, device=device))


def images_for(*shape: int, device: str = "cpu") -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)


def kept_for(rows: int, patches: int, kept: int, device: str = "cpu") -> Tensor:
    """Patches in no order, another choice in every row."""
    chance = torch.rand(rows, patches, generator=torch.Generator().manual_seed(1))
    return chance.argsort(1)[:, :kept].to(device)


def gathered(images: Tensor, patch: int, kept: Tensor | None, **options: object) -> Tensor:
    """The definition: corrupt, then patchify, then gather."""
    rows = patchify(corrupt(images, keys_for(len(images), str(images.device)), **options), patch)  # type: ignore[arg-type]
    return rows if kept is None else rows.gather(1, kept[:, :, None].expand(-1, -1, rows.shape[2]))


# The regime each stands for: [B, C, H, W], patch, patches kept (None: all, in order).
CASES = {
    "one CIFAR image": ((1, 3, 32, 32), 4, 16),
    "two digits": ((2, 1, 32, 32), 8, 4),
    "two digits, every patch": ((2, 1, 16, 16), 4, None),
    "patch 2, so half a quad": ((2, 3, 4, 8), 2, 3),
    "patch 2, width no multiple of 4": ((2, 3, 6, 10), 2, None),
    "patch 14: rows begin inside quads": ((1, 3, 28, 28), 14, 2),
    "patch 14, one channel": ((1, 1, 14, 28), 14, None),
    "patch 16": ((1, 3, 32, 48), 16, 2),
    "patch 16, one channel": ((1, 1, 16, 32), 16, None),
    "odd patch, odd plane": ((2, 3, 9, 15), 3, 4),
    "patch of one pixel": ((2, 1, 3, 5), 1, 7),
    "the whole image is a patch": ((2, 3, 5, 5), 5, None),
    "two channels": ((2, 2, 8, 8), 4, 2),
    "no patch kept": ((2, 3, 8, 8), 4, 0),
    "no batch": ((0, 3, 8, 8), 4, 2),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALISED = [
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, True),
    (torch.float16, False),
]


@pytest.mark.parametrize(("dtype", "normalise"), NORMALISED)
@pytest.mark.parametrize(("shape", "patch", "keep"), CASES.values(), ids=CASES.keys())
def test_same_bits_as_corrupt_then_gather(  # type: ignore[no-untyped-def]
    backend: str, device: str, shape, patch: int, keep: int | None, dtype, normalise: bool
) -> None:
    images, channels = images_for(*shape, device=device), shape[1]
    patches = (shape[2] // patch) * (shape[3] // patch)
    kept = None if keep is None else kept_for(2 * shape[0], patches, keep, device)
    options = {"samples": 2, "first_sample": 5, "dtype": dtype}
    if normalise:
        options |= {"mean": MEAN[:channels], "std": STD[:channels]}
    keys = keys_for(len(images), device)
    with use_backend(backend):
        ours = corrupt_patches(images, keys, 0.5, patch=patch, kept=kept, **options)
        expected = gathered(images, patch, kept, sigma=0.5, **options)
    rows = patches if keep is None else keep
    assert ours.shape == (2 * shape[0], rows, patch * patch * channels)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("patch", [256, 257, 508])
def test_rows_wider_than_a_block_of_the_cpu(device: str, backend: str, patch: int) -> None:
    if backend == "triton" and interpreting():
        pytest.skip("the interpreter takes minutes; only the CPU kernel knows blocks")
    images = images_for(1, 3, patch, 2 * patch, device=device)
    kept = torch.tensor([[1, 0, 1]], device=device)
    with use_backend(backend):
        ours = corrupt_patches(images, keys_for(1, device), 0.5, patch=patch, kept=kept)
        assert torch.equal(ours, gathered(images, patch, kept, sigma=0.5))


def test_equals_reference(backend: str, device: str) -> None:
    images, keys = images_for(2, 3, 16, 16, device=device), keys_for(2, device)
    kept = kept_for(6, 16, 5, device)
    options = {"patch": 4, "kept": kept, "samples": 3, "mean": MEAN, "std": STD}
    with use_backend(backend):
        ours = corrupt_patches(images, keys, 0.5, **options)  # type: ignore[arg-type]
    with use_backend("reference"):
        reference = corrupt_patches(images, keys, 0.5, **options)  # type: ignore[arg-type]
    assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-5 * 0.5 / min(STD))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    if backend == "triton" and interpreting() and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16, where the kernel rounds")
    images, keys = images_for(2, 3, 8, 8, device=device), keys_for(2, device)
    options = {"patch": 4, "kept": kept_for(8, 4, 2, device), "samples": 4, "std": STD}
    with use_backend("reference"):
        exact = corrupt_patches(images, keys, 0.25, **options)  # type: ignore[arg-type]
    with use_backend(backend):
        ours = corrupt_patches(images, keys, 0.25, dtype=dtype, **options)  # type: ignore[arg-type]
    # At most twice the error of rounding the exact value.
    assert (ours - exact).abs().max() <= 2 * (exact.to(dtype) - exact).abs().max()


def test_sigma_and_first_sample_per_image_beyond_2_to_32(backend: str, device: str) -> None:
    images = images_for(3, 1, 8, 8, device=device)
    # The quad number of the second image passes 2^32 between its two samples.
    first = torch.tensor([0, 2**32 * 4 // 64 - 1, 2**33], device=device)
    options = {
        "sigma": torch.tensor([0.0, 0.25, 1.0], device=device),
        "first_sample": first,
        "samples": 2,
    }
    kept = kept_for(6, 4, 3, device)
    with use_backend(backend):
        ours = corrupt_patches(images, keys_for(3, device), patch=4, kept=kept, **options)  # type: ignore[arg-type]
        assert torch.equal(ours, gathered(images, 4, kept, **options))
    clean = patchify(images[:1], 4)[0]
    assert torch.equal(ours[0], clean[kept[0]])


def test_views(backend: str, device: str) -> None:
    big = images_for(3, 3, 12, 8, device=device)
    kept = kept_for(3, 4, 2, device).repeat_interleave(2, 1)
    views = {
        "sliced": big[1:3, :, 1:9, :],
        "channels last": big[:, :, :8].contiguous(memory_format=torch.channels_last),
        "expanded": big[:1, :, :8].expand(3, -1, -1, -1),
        "every other": big[::2, :, :8],
        "misaligned": torch.cat([torch.zeros(1, device=device), big.flatten()])[1:].view(big.shape),
    }
    for name, view in views.items():
        keys, rows = keys_for(len(view), device), kept[: len(view), ::2]  # not contiguous
        plain = view.clone(memory_format=torch.contiguous_format)
        with use_backend(backend):
            expected = corrupt_patches(plain, keys, 0.3, patch=4, kept=rows.contiguous())
            ours = corrupt_patches(view, keys, 0.3, patch=4, kept=rows)
        assert torch.equal(ours, expected), name


def test_gradient(backend: str, device: str) -> None:
    # Patches are kept by several samples, and the first one twice by one of them.
    kept = torch.tensor([[3, 0], [1, 1], [2, 3], [0, 2]], device=device)
    for choice, rows in ((kept, 2), (None, 4)):
        images = images_for(2, 3, 8, 8, device=device).requires_grad_()
        weight = torch.randn(4, rows, 48, generator=torch.Generator().manual_seed(1)).to(device)
        with use_backend(backend):
            ours = corrupt_patches(
                images, keys_for(2, device), 0.5, patch=4, kept=choice, samples=2, std=STD
            )
        (ours * weight).sum().backward()
        total = torch.zeros(2, 4, 48)
        for n in range(4):
            for k in range(rows):
                total[n // 2, k if choice is None else int(kept[n, k])] += weight[n, k].cpu()
        expected = unpatchify(total, 4, (8, 8)) / torch.tensor(STD).view(3, 1, 1)
        assert images.grad is not None
        assert torch.allclose(images.grad.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_gradient() -> None:
    """Linear in the images: the second gradient passes the first one's weight through."""
    images = images_for(1, 1, 4, 4).requires_grad_()
    kept = torch.tensor([[1, 1, 2]])
    ours = corrupt_patches(images, keys_for(1), 0.5, patch=2, kept=kept, std=(0.5,))
    weight = torch.rand(1, 3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(ours, images, weight, create_graph=True)
    first.sum().backward()
    assert torch.equal(weight.grad, torch.full((1, 3, 4), 2.0))


def test_compiled_equals_eager() -> None:
    images, keys, kept = images_for(2, 3, 8, 8), keys_for(2), kept_for(4, 4, 2)

    def function(x: Tensor) -> Tensor:
        rows = corrupt_patches(x, keys, 0.5, patch=4, kept=kept, samples=2, mean=MEAN, std=STD)
        return rows.square().mean((1, 2))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), function(images))
    found = []
    for call in (compiled, function):
        leaf = images.clone().requires_grad_()
        call(leaf).sum().backward()
        found.append(leaf.grad)
    assert torch.allclose(*found, atol=1e-6)


def test_opcheck() -> None:
    images = images_for(2, 1, 4, 4)
    sigma, first = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    for kept in (None, torch.tensor([[0], [3], [1], [1]])):
        arguments = (
            images, keys_for(2), first, sigma, 2, [0.5], [0.5], torch.bfloat16, 2, kept,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.nimfast.corrupt_patches.default, arguments)


def test_every_cpu_level_gives_the_rows_of_its_corrupt(cpu_level: str) -> None:
    cases = [
        (images_for(2, channels, 42, 28), patch) for channels in (1, 3, 5) for patch in (7, 14, 2)
    ]
    for images, patch in [*cases, (images_for(2, 3, 32, 16), 8)]:
        kept = kept_for(4, images[0, 0].numel() // patch**2, 3)
        for dtype in DTYPES:
            options = {"samples": 2, "dtype": dtype}
            with use_backend("native"):
                ours = corrupt_patches(images, keys_for(2), 0.5, patch=patch, kept=kept, **options)  # type: ignore[arg-type]
                expected = gathered(images, patch, kept, sigma=0.5, **options)
            assert torch.equal(ours, expected), patch


def test_threads_do_not_change_a_bit() -> None:
    images, keys, kept = images_for(3, 3, 64, 64), keys_for(3), kept_for(60, 16, 7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = corrupt_patches(images, keys, 0.5, patch=16, kept=kept, samples=20)
        torch.set_num_threads(3)
        assert torch.equal(
            corrupt_patches(images, keys, 0.5, patch=16, kept=kept, samples=20), alone
        )
    finally:
        torch.set_num_threads(threads)


def test_patch_out_of_range_is_an_error_on_the_cpu() -> None:
    images = images_for(1, 1, 8, 8)
    for wrong in (-1, 4, 2**40):
        kept = torch.tensor([[0, wrong]])
        with pytest.raises(ValueError, match=f"kept holds {wrong}; images have patches 0 to 3"):
            corrupt_patches(images, keys_for(1), 0.5, patch=4, kept=kept)


@pytest.mark.parametrize("noise", ["gaussian", "grid"])
def test_patch_out_of_range_is_nan_where_an_error_would_wait(
    backend: str, device: str, noise: str
) -> None:
    """The kernels themselves, without the CPU's check: neither a read outside nor an exception."""
    from nimfast.ops.corrupt import normalisation
    from nimfast.ops.corrupt_patches import _reference, _triton

    images, keys = images_for(1, 3, 8, 8, device=device), keys_for(1, device)
    kept = torch.tensor([[0, -1, 3, 4, 2**40]], device=device)
    if device == "cuda":
        with use_backend(backend):
            out = corrupt_patches(images, keys, 0.5, patch=4, kept=kept, noise=noise)
    elif backend == "native":
        pytest.skip("on the CPU it is an error, found before the kernel is called")
    else:
        out = torch.zeros(1, 5, 48)
        first, sigma = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0.5)
        grid = 0.5 if noise == "grid" else None
        units = normalisation((0.0,) * 3, (1.0,) * 3, kept.device, 255.0 if grid else 1.0)
        if backend == "reference":
            _reference(images, keys, first, sigma, kept, 4, out, units, grid)
        else:
            _triton(images, keys, first, sigma, units, kept, 4, out, grid)
    assert out[0].isnan().all(1).tolist() == [False, True, False, True, True]
    with use_backend(backend):
        good = gathered(images, 4, torch.tensor([[0, 3]], device=device), sigma=0.5, noise=noise)
    assert torch.equal(out[:, [0, 2]], good)


MEMORY = """
import resource, torch
from nimfast.ops import Stream, corrupt_patches, image_keys
images = torch.rand(1, 3, 224, 224).expand(2, -1, -1, -1)
keys = image_keys(0, Stream.TRAINING, torch.arange(2))
def draw(samples):
    kept = torch.arange(49).repeat(2 * samples, 1)
    return corrupt_patches(images, keys, 0.5, patch=16, kept=kept, samples=samples)
draw(20)  # what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = draw(400)
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(used / out.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts otherwise")
def test_nothing_is_allocated_but_the_result() -> None:
    if native() is None:
        pytest.skip("the compiled module is not built")
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True
    )
    # 240 MB come out; the copies of all patches, or their noise, would be four times as much.
    assert float(done.stdout) < 1.1


GOOD = {
    "images": torch.zeros(2, 3, 8, 12),
    "keys": torch.zeros(2, dtype=torch.int64),
    "sigma": 0.5,
    "patch": 4,
    "kept": torch.zeros(2, 3, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 12).double()}, TypeError, "images is torch.float64"),
        ({"keys": torch.zeros(2)}, TypeError, "keys is torch.float32; it must be int64"),
        ({"sigma": -1.0}, ValueError, "sigma is -1.0; it must be finite and not negative"),
        ({"samples": 0}, ValueError, "samples is 0; it must be a whole number of at least 1"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8; it must be float32"),
        ({"mean": (0.5,)}, ValueError, "mean has 1 values; images have 3 channels"),
        ({"patch": 0}, ValueError, "patch is 0; it must be a whole number of at least 1"),
        ({"patch": 2.0}, ValueError, "patch is 2.0; it must be a whole number of at least 1"),
        ({"patch": 8}, ValueError, "patch is 8; it must divide the images' sides, 8 x 12"),
        ({"patch": 12}, ValueError, "patch is 12; it must divide the images' sides, 8 x 12"),
        ({"kept": torch.zeros(2, 3)}, TypeError, "kept is torch.float32; it must be int64"),
        ({"kept": [0, 1]}, TypeError, r"kept is \[0, 1\]; it must be a tensor of int64"),
        (
            {"kept": torch.zeros(3, 3, dtype=torch.int64)},
            ValueError,
            r"kept has shape \(3, 3\); it must be \[2, K\], one row per copy",
        ),
        (
            {"kept": torch.zeros(2, 3, dtype=torch.int64, device="meta")},
            ValueError,
            "kept is on meta; it must be on cpu",
        ),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        corrupt_patches(**{**GOOD, **change})  # type: ignore[arg-type]
