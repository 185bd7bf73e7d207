# SPDX-License-Identifier: Apache-2.0
"""FGSM, PGD and APGD written over `ascend` and `vote_loss` against runs of the published code.

reference/attacks.safetensors: a small trained network, 24 CIFAR-10 images, starts, final points,
robust flags and best losses. The network runs in float64, so that its rounding, which differs
between processors, does not decide which way an iterate turns.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from nimfast.ops import ascend, use_backend, vote_loss

OPERATION = "ascend"
EPS = {"linf": 4 / 255, "l2": 0.35}

Look = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def reference(device: str) -> dict[str, Tensor]:
    path = Path(__file__).parent / "reference" / "attacks.safetensors"
    stored = {name: value.to(device) for name, value in load_file(path).items()}
    stored["images"] = stored["images"].float() / 255
    return {**stored, "labels": stored["labels"].long()}


def network(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    x = x.double()
    for layer in ("c1", "c2", "c3"):
        weight, bias = (weights[f"{layer}.{name}"].double() for name in ("weight", "bias"))
        x = functional.softplus(functional.conv2d(x, weight, bias, 2, 1), beta=10)
    return functional.linear(
        x.flatten(1), weights["fc.weight"].double(), weights["fc.bias"].double()
    ).float()


def looking(stored: dict[str, Tensor], **options: object) -> Look:
    """A function of x: loss [N], whether misclassified [N], gradient of the loss."""

    def look(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss, missed = vote_loss(network(stored, x), stored["labels"], **options)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), missed > 0, gradient

    return look


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b)


def apgd(look: Look, origin: Tensor, x: Tensor, norm: str, steps: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Croce & Hein (2020): images it does not break, best loss, both [N]."""
    # The checkpoints w_{j+1} = w_j + max(w_j - w_{j-1} - 0.03, 0.06) in whole steps, as the
    # published run has them: 20 (w_{j+1} - w_j) is rounded down, but not to 0.
    gap, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    checkpoint = gap
    step = torch.full((len(x),), 2 * EPS[norm], device=x.device)
    best, broken, gradient = look(x)
    x_best, gradient_best, previous = x, gradient, x
    # Its first comparison is with 0, not with the loss of the start.
    losses, best_before, step_before = [torch.zeros_like(best)], best, step
    for k in range(steps):
        options = {"previous": previous, "momentum": 0.75 if k else 1.0}
        previous = x
        x = ascend(x, origin, gradient, step=step, eps=EPS[norm], norm=norm, **options)  # type: ignore[arg-type]
        loss, missed, gradient = look(x)
        losses.append(loss)
        broken, better = broken | missed, loss > best
        best = torch.maximum(loss, best)
        x_best, gradient_best = where(better, x, x_best), where(better, gradient, gradient_best)
        if k + 1 == checkpoint:
            window = torch.stack(losses[-gap - 1 :])
            rarely_up = (window[1:] > window[:-1]).sum(0) <= 0.75 * gap  # condition 1
            stuck = (step_before == step) & (best_before == best)  # condition 2
            step_before, best_before = step, best
            step = torch.where(rarely_up | stuck, step / 2, step)
            x, gradient = (
                where(rarely_up | stuck, at_best, now)
                for at_best, now in ((x_best, x), (gradient_best, gradient))
            )
            gap = max(gap - less, least)
            checkpoint += gap
    return ~broken, best


def test_fgsm(backend: str, device: str, reference: dict[str, Tensor]) -> None:
    images, eps = reference["images"], EPS["linf"]
    expected = (images + eps * reference["fgsm.sign"].float()).clamp(0, 1)
    with use_backend(backend):
        _, _, gradient = looking(reference)(images)
        ours = ascend(images, images, gradient, step=eps, eps=eps)
    # The sign of a gradient within rounding of zero may differ.
    sure = gradient.abs() > 1e-5 * gradient.abs().amax((1, 2, 3), keepdim=True)
    assert sure.float().mean() > 0.999
    assert torch.allclose(ours[sure], expected[sure], rtol=0, atol=1e-6)


def test_pgd(backend: str, device: str, reference: dict[str, Tensor]) -> None:
    images, eps = reference["images"], EPS["linf"]
    x = (images + reference["pgd.start"]).clamp(0, 1)
    with use_backend(backend):
        look = looking(reference)
        for _ in range(10):
            x = ascend(x, images, look(x)[2], step=2 / 255, eps=eps)
    # A flipped sign of a gradient near zero moves that value, and hardly any other.
    assert ((x - reference["pgd.adv"]).abs() <= 1e-6).float().mean() > 0.9999


# How many of the 24 best losses must agree within 1e-4. DLR divides by the spread of the logits,
# which the attack closes: in l2 rounding decides how far it gets with three of them (the plain
# torch lines agree in 20 to 22, too, by the order in which the network adds).
RUNS = [
    ("ce", "linf", 24),
    ("dlr", "linf", 23),
    ("dlr-targeted", "linf", 23),
    ("ce", "l2", 24),
    ("dlr", "l2", 20),
    ("dlr-targeted", "l2", 22),
]


@pytest.mark.parametrize(("loss", "norm", "least"), RUNS)
def test_apgd(
    backend: str, device: str, reference: dict[str, Tensor], loss: str, norm: str, least: int
) -> None:
    if backend == "reference":
        pytest.skip("seconds of a network: the kernels are compared with the reference elsewhere")
    images, draw = reference["images"], reference[f"{norm}.start"]
    if norm == "linf":
        draw = 2 * draw - 1
        start = draw / draw.abs().amax((1, 2, 3), keepdim=True)
    else:
        start = draw / draw.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    targets = reference[f"{norm}.target"].long() if loss == "dlr-targeted" else None
    with use_backend(backend):
        look = looking(reference, loss=loss, targets=targets)
        x = (images + EPS[norm] * start).clamp(0, 1)
        robust, best = apgd(look, images, x, norm, steps=20)
    assert torch.equal(robust, reference[f"{loss}.{norm}.robust"].bool())
    expected = reference[f"{loss}.{norm}.loss"]
    error = (best - expected).abs() / expected.abs()
    assert (error <= 1e-4).sum() >= least
    assert error.max() <= 2e-2
