# SPDX-License-Identifier: Apache-2.0
"""What only a CUDA device can show: graphs, streams, agreement of GPU back ends, end to end."""

import pytest
import torch

from nimfast import data, models
from nimfast.ops import (
    Stream,
    ascend,
    corrupt,
    corrupt_patches,
    image_keys,
    mask_tokens,
    random_masks,
    recon_loss,
    use_backend,
    vote_loss,
    votes,
)
from nimfast.ops.backend import why_not
from nimfast.smoothing import Smooth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BACKENDS = ("native", "triton")


@pytest.fixture(params=BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    problem = why_not(request.param, "corrupt", torch.device("cuda"))
    if problem:
        pytest.skip(problem)
    return str(request.param)


def keys_on_gpu(batch: int, seed: int = 7) -> torch.Tensor:
    return image_keys(seed, Stream.ESTIMATION, torch.arange(batch, device="cuda"))


@pytest.mark.parametrize(
    "shape", [(4, 3, 224, 224), (2, 3, 32, 32), (3, 1, 28, 28), (2, 3, 33, 31)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_shapes_against_reference(gpu_backend: str, shape: tuple[int, ...], dtype) -> None:  # type: ignore[no-untyped-def]
    images, keys = torch.rand(shape, device="cuda"), keys_on_gpu(shape[0])
    with use_backend("reference"):
        exact = corrupt(images, keys, 0.5, samples=16, first_sample=3)
    with use_backend(gpu_backend):
        ours = corrupt(images, keys, 0.5, samples=16, first_sample=3, dtype=dtype)
    bound = 1e-5 if dtype == torch.float32 else 2 * float((exact.to(dtype) - exact).abs().max())
    assert float((ours.float() - exact).abs().max()) <= bound


@pytest.mark.parametrize("shape", [(4, 3, 224, 224), (3, 1, 28, 28), (2, 3, 33, 31)])
def test_grid_has_the_bits_of_the_cpu(gpu_backend: str, shape: tuple[int, ...]) -> None:
    images = (torch.rand(shape) * 255).round() / 255
    keys = image_keys(7, Stream.ESTIMATION, torch.arange(shape[0]))
    options = {"samples": 16, "first_sample": 3, "noise": "grid", "std": (0.2,) * shape[1]}
    with use_backend("native"):
        expected = corrupt(images, keys, 0.5, **options)  # type: ignore[arg-type]
    with use_backend(gpu_backend):
        ours = corrupt(images.cuda(), keys.cuda(), 0.5, **options)  # type: ignore[arg-type]
    assert torch.equal(ours.cpu(), expected)


def test_graph_replays_with_a_new_key(gpu_backend: str) -> None:
    images = torch.rand(2, 3, 32, 32, device="cuda")
    keys, first = keys_on_gpu(2).clone(), torch.zeros(2, dtype=torch.int64, device="cuda")
    counts = torch.zeros(1, 11, dtype=torch.int64, device="cuda")
    weight = torch.randn(3072, 10, device="cuda")
    index, valid = (
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        torch.full((1,), 64, device="cuda"),
    )
    sigma = torch.full((2,), 0.5, device="cuda")

    def step() -> torch.Tensor:
        noisy = corrupt(images, keys, sigma, samples=32, first_sample=first)
        votes(noisy.flatten(1) @ weight, counts, index=index, valid=valid)
        return noisy

    with use_backend(gpu_backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up outside the capture, on a stream of its own
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        counts.zero_()
        for seed in (8, 9):
            keys.copy_(keys_on_gpu(2, seed))
            first.fill_(seed)
            graph.replay()
            assert torch.equal(
                captured, corrupt(images, keys, sigma, samples=32, first_sample=first)
            )
    assert int(counts.sum()) == 2 * 64


def test_other_streams(gpu_backend: str) -> None:
    images, keys = torch.rand(8, 3, 224, 224, device="cuda"), keys_on_gpu(8)
    torch.cuda.synchronize()
    with use_backend(gpu_backend):
        expected = corrupt(images, keys, 0.5, samples=8)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = corrupt(images, keys, 0.5, samples=8)
        stream.synchronize()
    assert torch.equal(found, expected)


def test_certificates_agree_with_the_cpu(gpu_backend: str) -> None:
    """Same noise, same model: counts differ only where two logits lie within rounding."""
    images = data.load("digits", "test")
    found = {}
    for device in ("cpu", "cuda"):
        model = models.load_classifier("digits", num_classes=10, shape=images.shape).to(device)
        smooth = Smooth(model, 10, 0.5, seed=3)
        with use_backend(gpu_backend if device == "cuda" else "native"):
            found[device] = [
                smooth.certificate(images[i][0].to(device), 100, 2000, 0.001, 1024, index=i)
                for i in range(8)
            ]
    for cpu, gpu in zip(found["cpu"], found["cuda"], strict=True):
        assert cpu.predict == gpu.predict
        assert abs(cpu.count - gpu.count) <= 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_several_devices(gpu_backend: str) -> None:
    # The current device is never that of the tensors: each operation has to go to theirs.
    images = torch.rand(2, 3, 32, 32)
    indices = torch.arange(2)
    found = []
    for place in range(torch.cuda.device_count()):
        here = torch.device("cuda", place)
        other = (place + 1) % torch.cuda.device_count()
        counts = torch.zeros(1, 11, dtype=torch.int64, device=here)
        with torch.cuda.device(other), use_backend(gpu_backend):
            keys = image_keys(7, Stream.ESTIMATION, indices.to(here))
            noisy = corrupt(images.to(here), keys, 0.5, samples=8)
            votes(noisy.flatten(1)[:, :10].contiguous(), counts)
            assert torch.cuda.current_device() == other
        assert noisy.device == counts.device == here
        found.append((noisy.cpu(), counts.cpu()))
    for noisy, counts in found[1:]:
        assert torch.equal(noisy, found[0][0])
        assert torch.equal(counts, found[0][1])
    with use_backend(gpu_backend), pytest.raises(ValueError, match="keys is on cuda:0"):
        corrupt(images.to("cuda:1"), image_keys(7, Stream.ESTIMATION, indices.to("cuda:0")), 0.5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_every_operation_on_the_second_device() -> None:
    """Each goes to the device of its tensors, not to the current one, and gives the same there."""
    generator = torch.Generator().manual_seed(0)
    images, logits = torch.rand(2, 3, 32, 32, generator=generator), torch.randn(8, 10)
    tokens, prediction = torch.randn(2, 64, 24), torch.randn(2, 64, 48)

    def everything(device: torch.device) -> list[torch.Tensor]:
        x, z = images.to(device), logits.to(device)
        keys = image_keys(7, Stream.MASK, torch.arange(2, device=device))
        kept, restore, mask = random_masks(keys, 64, 16)
        rows = corrupt_patches(x, keys, 0.5, patch=4, kept=kept)
        masked = mask_tokens(tokens.to(device), torch.zeros(24, device=device), mask)
        loss = recon_loss(prediction.to(device), x, patch=4, mask=mask)
        level = torch.full((2,), 0.1, device=device)
        stepped = ascend(x, x, x - 0.5, step=level, eps=level)
        labels = torch.tensor([1, 2], device=device)
        return [kept, restore, mask, rows, masked, loss, stepped, *vote_loss(z, labels)]

    expected = everything(torch.device("cuda:0"))
    with torch.cuda.device(0):
        found = everything(torch.device("cuda:1"))
        assert torch.cuda.current_device() == 0
    for one, other in zip(expected, found, strict=True):
        assert other.device == torch.device("cuda:1")
        assert torch.equal(one.cpu(), other.cpu())
