# SPDX-License-Identifier: Apache-2.0
"""ascend and vote_loss against the torch lines of published attacks, eager and compiled.

pytest benchmarks/bench_attack_steps.py --results benchmarks/results/NAME.json
"""

import published
import pytest
import torch
from timing import backend_of, report, run

from nimfast.ops import ascend, use_backend, vote_loss

BATCHES = {
    "1 CIFAR image": (1, 3, 32, 32),
    "128 CIFAR images": (128, 3, 32, 32),
    "16 ImageNet images": (16, 3, 224, 224),
    "1,000 ImageNet images": (1000, 3, 224, 224),
}
EPS = {"linf": 8 / 255, "l2": 0.5}
WHO = ("published", "published, compiled", "nimfast", "triton")


@pytest.mark.parametrize("who", WHO)  # first: both sides of a ratio run side by side
@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("moving", [False, True], ids=["PGD", "APGD"])
@pytest.mark.parametrize("norm", EPS)
def test_ascend(benchmark, device, finish, norm: str, moving: bool, size: str, who: str) -> None:  # type: ignore[no-untyped-def]
    """One step of PGD, or of APGD with its momentum."""
    shape = BATCHES[size]
    if device.type == "cpu" and shape[0] == 1000:
        pytest.skip("five tensors of 600 MB: for a GPU")
    benchmark.group = f"{'APGD' if moving else 'PGD'} step, {norm}, {size}"
    origin = torch.rand(shape, device=device)
    x, previous = (
        (origin + EPS[norm] * (2 * torch.rand_like(origin) - 1)).clamp(0, 1) for _ in range(2)
    )
    gradient = torch.randn(shape, device=device)
    step = torch.full((shape[0],), EPS[norm] / 4, device=device)
    before = previous if moving else None
    if who.startswith("published"):
        lines = published.ascend_linf if norm == "linf" else published.ascend_l2
        if who == "published, compiled":
            lines = torch.compile(lines)
        wide = step.view(-1, 1, 1, 1)
        run(benchmark, finish, lambda: lines(x, origin, gradient, wide, EPS[norm], before))
    else:
        with use_backend(backend_of(who, "ascend", device)):
            run(
                benchmark,
                finish,
                lambda: ascend(
                    x, origin, gradient, step=step, eps=EPS[norm], norm=norm, previous=before,
                    momentum=0.75,
                ),
            )  # fmt: skip
    # What must be read and written at least: three or four tensors in, one out.
    bytes_moved = (5 if moving else 4) * 4 * origin.numel()
    report(benchmark, device, bytes_moved)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize(
    "size", [(1, 20, 10), (128, 1, 10), (128, 20, 10), (128, 20, 1000), (64, 4, 21841)], ids=str
)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_vote_loss(benchmark, device, finish, loss: str, size: tuple[int, ...], who: str) -> None:  # type: ignore[no-untyped-def]
    """Loss, misclassified draws and gradient of a batch of logits, 20 draws of an image."""
    images, samples, classes = size
    benchmark.group = f"{loss} of {images} x {samples} rows of {classes} logits"
    logits = torch.randn(images * samples, classes, device=device, requires_grad=True)
    labels = torch.randint(classes, (images,), device=device)
    lines = published.vote_loss
    if who == "published, compiled":
        lines = torch.compile(lines)

    def step() -> torch.Tensor:
        if who.startswith("published"):
            value, _ = lines(logits, labels, samples, loss)
        else:
            value, _ = vote_loss(logits, labels, loss=loss)
        return torch.autograd.grad(value.sum(), logits)[0]

    if who.startswith("published"):
        run(benchmark, finish, step)
    else:
        with use_backend(backend_of(who, "vote_loss", device)):
            run(benchmark, finish, step)
    report(benchmark, device, 2 * logits.nbytes)
