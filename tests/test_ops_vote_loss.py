# SPDX-License-Identifier: Apache-2.0
"""vote_loss: losses and gradients against the plain formulas under autograd, ties, broken rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nimfast.ops import use_backend, vote_loss
from nimfast.ops.backend import interpreting

LOSSES = ("ce", "dlr", "dlr-targeted")
LEAST = {"ce": 1, "dlr": 3, "dlr-targeted": 4}


def plain(logits: Tensor, labels: Tensor, targets: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """The formulas, as torch code with autograd writes them; [N] and [N]."""
    samples = len(logits) // len(labels)
    y, t = (index.repeat_interleave(samples) for index in (labels, targets))
    row = torch.arange(len(logits), device=logits.device)
    of_label = logits[row, y]
    if loss == "ce":
        value = -logits.log_softmax(1)[row, y]
    else:
        ordered = logits.sort(dim=1, descending=True).values
        if loss == "dlr":
            others = logits.masked_fill(
                torch.nn.functional.one_hot(y, logits.shape[1]).bool(), -torch.inf
            )
            value = -(of_label - others.amax(1)) / (ordered[:, 0] - ordered[:, 2] + 1e-12)
        else:
            low = (ordered[:, 2] + ordered[:, 3]) / 2
            value = -(of_label - logits[row, t]) / (ordered[:, 0] - low + 1e-12)
    missed = logits.argmax(1) != y
    return value.view(-1, samples).mean(1), missed.view(-1, samples).sum(1)


def case(
    images: int, samples: int, classes: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(images * samples, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    targets = (labels + 1) % classes
    named = {"logits": logits.to(dtype), "labels": labels, "targets": targets}
    return {name: value.to(device) for name, value in named.items()}


def ours(tensors: dict[str, Tensor], loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, misses, and gradient of a weighted sum of the losses."""
    logits = tensors["logits"].detach().requires_grad_()
    targets = tensors["targets"] if loss == "dlr-targeted" else None
    value, missed = vote_loss(logits, tensors["labels"], loss=loss, targets=targets)
    (gradient,) = torch.autograd.grad((value * weights_for(value)).sum(), logits)
    return value.detach(), missed, gradient


def theirs(
    tensors: dict[str, Tensor], loss: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    logits = tensors["logits"].detach().to(dtype).requires_grad_()
    value, missed = plain(logits, tensors["labels"], tensors["targets"], loss)
    (gradient,) = torch.autograd.grad((value * weights_for(value)).sum(), logits)
    return value.detach(), missed, gradient


def weights_for(value: Tensor) -> Tensor:
    return torch.arange(1, len(value) + 1, device=value.device, dtype=value.dtype)


# [N, S, K]: one row, fewer than a vector, a vector, one more, then longer.
SIZES = [(1, 1, 4), (3, 5, 10), (2, 3, 16), (2, 3, 17), (2, 2, 100), (2, 2, 1000), (1, 2, 5000)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_autograd(backend: str, device: str, size: tuple[int, int, int], loss: str) -> None:
    tensors = case(*size, device=device)
    with use_backend(backend):
        value, missed, gradient = ours(tensors, loss)
    exact, exact_missed, exact_gradient = theirs(tensors, loss)
    assert value.dtype == torch.float32 and missed.dtype == torch.int64
    assert torch.equal(missed, exact_missed)
    # A close race at the top of a row magnifies the logits' own rounding in DLR.
    scale = exact_gradient.abs().max().item()
    assert torch.allclose(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.allclose(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("loss", LOSSES)
def test_more_classes_than_triton_holds_at_once(backend: str, device: str, loss: str) -> None:
    # The largest stand in different parts of the row; then equal ones; then a broken last class.
    tensors = case(4, 1, 9_000, device=device)
    logits = tensors["logits"]
    logits[0, [8_900, 5_000, 4, 6_000]] = torch.tensor([20.0, 19.0, 18.0, 17.0], device=device)
    logits[1, [4, 5_000, 8_500, 8_999]] = 20.0
    tensors["labels"][1:] = torch.tensor([4, 5_000, 0], device=device)
    logits[2, 5_000:5_005] = torch.arange(20.0, 15.0, -1.0, device=device)
    logits[3, 8_999] = float("nan")
    with use_backend(backend):
        value, missed, gradient = ours(tensors, loss)
    with use_backend("reference"):
        exact, exact_missed, exact_gradient = ours(tensors, loss)
    assert torch.equal(missed, exact_missed) and missed.tolist()[1:] == [0, 0, 1]
    assert torch.allclose(value, exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    scale = exact_gradient[[0, 2]].abs().max().item()
    assert torch.allclose(gradient[0], exact_gradient[0], rtol=1e-5, atol=1e-5 * scale)
    assert torch.allclose(gradient[1:], exact_gradient[1:], rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("places", range(4))
def test_label_and_target_at_every_place(backend: str, device: str, loss: str, places: int) -> None:
    # The gradient's five terms fall on one another when label or target is among the largest.
    logits = torch.tensor([[4.0, 1.0, -1.0, 3.0, 0.5, 2.0]], device=device).repeat(4, 1)
    order = torch.tensor([0, 3, 5, 1], device=device)
    tensors = {"logits": logits, "labels": order[places].expand(4), "targets": order}
    with use_backend(backend):
        value, missed, gradient = ours(tensors, loss)
    exact, exact_missed, exact_gradient = theirs(tensors, loss)
    assert torch.equal(missed, exact_missed)
    assert torch.allclose(value.double(), exact, atol=1e-6)
    assert torch.allclose(gradient.double(), exact_gradient, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_low_precision(backend: str, device: str, loss: str, dtype: torch.dtype) -> None:
    tensors = case(4, 3, 33, device=device, dtype=dtype)
    tensors["logits"] += torch.arange(33, device=device, dtype=dtype) / 4  # no ties
    with use_backend(backend):
        value, _, gradient = ours(tensors, loss)
    exact, _, exact_gradient = theirs(tensors, loss)
    rough, _, rough_gradient = theirs(tensors, loss, dtype)
    assert gradient.dtype == dtype
    assert (value - exact).abs().max() <= 2 * (rough - exact).abs().max() + 1e-6
    rounding = (exact_gradient.to(dtype) - exact_gradient).abs().max()
    error = (gradient - exact_gradient).abs().max()
    # Triton's interpreter truncates; compiled, and on the CPU, only the result is rounded.
    assert error <= (2 if interpreting() else 1.01) * max(
        rounding, (rough_gradient - exact_gradient).abs().max()
    )


def test_small_gradients_survive_in_half_precision(backend: str, device: str) -> None:
    # As under a loss scale: the product is representable in float16, its first factor is not.
    logits = torch.zeros(1, 10, device=device, dtype=torch.float16)
    logits[0, 0] = 18.0
    logits.requires_grad_()
    with use_backend(backend):
        value, _ = vote_loss(logits, torch.zeros(1, dtype=torch.int64, device=device))
    (gradient,) = torch.autograd.grad(value * 65536.0, logits)
    assert torch.allclose(gradient[0, 1:].float(), torch.tensor(65536 * 1.523e-8), rtol=1e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_ties_go_to_the_lowest_class(backend: str, device: str, loss: str) -> None:
    rows = [
        [1.0, 2.0, 2.0, 0.0, -1.0],
        [-0.0, 0.0, -1.0, -2.0, -3.0],
        [0.0, -0.0, -1.0, -2.0, -3.0],
    ]
    logits = torch.tensor([*rows, [5.0] * 5], device=device)
    targets = torch.full((4,), 4, device=device) if loss == "dlr-targeted" else None
    for label, expected in ((0, [1, 0, 0, 0]), (1, [0, 1, 1, 1]), (2, [1, 1, 1, 1])):
        labels = torch.full((4,), label, device=device)
        with use_backend(backend):
            value, missed = vote_loss(logits, labels, loss=loss, targets=targets)
        assert missed.tolist() == expected
        assert value.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_rows_that_are_not_finite(backend: str, device: str, loss: str, bad: float) -> None:
    tensors = case(4, 2, 21, device=device)
    for image, place in ((0, 0), (1, 17), (2, 20)):
        tensors["logits"][2 * image + 1, place] = bad
    tensors["labels"][3] = tensors["logits"][6].argmax()
    with use_backend(backend):
        value, missed, gradient = ours(tensors, loss)
        _, whole_missed, _ = ours(
            {**tensors, "logits": tensors["logits"].nan_to_num(0, 0, 0)}, loss
        )
    assert value.isnan().tolist() == [True, True, True, False]
    by_row = gradient.isnan().all(1)
    assert by_row.tolist() == [False, True] * 3 + [False, False]
    assert gradient[~by_row].isfinite().all()
    assert (missed[:3] >= 1).all() and (missed >= whole_missed - 1).all()
    assert missed[3] == whole_missed[3]


@pytest.mark.parametrize("name", ["labels", "targets"])
@pytest.mark.parametrize("number", [-1, 10, 2**40])
def test_labels_that_are_no_class(backend: str, device: str, name: str, number: int) -> None:
    tensors = case(3, 2, 10, device=device)
    tensors[name][1] = number
    if device == "cpu":
        message = rf"{name} has values from .*; they must be classes"
        with use_backend(backend), pytest.raises(ValueError, match=message):
            ours(tensors, "dlr-targeted")
        return
    with use_backend(backend):
        value, missed, gradient = ours(tensors, "dlr-targeted")
    assert value.isnan().tolist() == [False, True, False]
    assert missed[1] == 2 and gradient[2:4].isnan().all()


def test_views_and_no_gradient(backend: str, device: str) -> None:
    tensors = case(3, 4, 12, device=device)
    wide = torch.cat([tensors["logits"]] * 2, 1)
    labels = tensors["labels"].repeat_interleave(2)[::2]
    with use_backend(backend):
        value, missed, gradient = ours(tensors, "dlr")
        viewed = ours({**tensors, "logits": wide[:, :12], "labels": labels}, "dlr")
        bare = vote_loss(tensors["logits"], tensors["labels"], loss="dlr")
    for one, other in zip((value, missed, gradient), viewed, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(bare[0], value) and torch.equal(bare[1], missed)
    assert not bare[0].requires_grad


def test_empty(backend: str, device: str) -> None:
    logits = torch.zeros(0, 10, device=device, requires_grad=True)
    with use_backend(backend):
        value, missed = vote_loss(logits, torch.zeros(0, dtype=torch.int64, device=device))
    value.sum().backward()
    assert value.shape == missed.shape == (0,)
    assert logits.grad is not None and logits.grad.shape == (0, 10)


@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck_and_compile(loss: str) -> None:
    tensors = case(3, 2, 8)
    targets = tensors["targets"] if loss == "dlr-targeted" else None
    for with_gradient in (False, True):
        arguments = (tensors["logits"], tensors["labels"], targets, loss, with_gradient)
        torch.library.opcheck(torch.ops.nimfast.vote_loss.default, arguments)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return vote_loss(x * 2, tensors["labels"], loss=loss, targets=targets)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (compiled, function):
        logits = tensors["logits"].clone().requires_grad_()
        value, missed = run(logits)
        value.square().sum().backward()
        gradients.append((value.detach(), missed, logits.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_every_cpu_level_and_any_threads(
    cpu_level: str, set_threads: Callable[[int], None]
) -> None:
    tensors = case(40, 7, 130)
    for loss in LOSSES:
        exact = theirs(tensors, loss)
        with use_backend("native"):
            set_threads(1)
            alone = ours(tensors, loss)
            set_threads(3)
            together = ours(tensors, loss)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other), loss
        assert torch.allclose(alone[0].double(), exact[0], rtol=1e-5, atol=1e-5)
        scale = exact[2].abs().max().item()
        assert torch.allclose(alone[2].double(), exact[2], rtol=1e-5, atol=1e-5 * scale), loss


LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(4, 5).double()}, TypeError, "logits is torch.float64; it must be"),
        (
            {"logits": torch.zeros(4)},
            ValueError,
            r"logits has shape \(4,\); it must be \[N \* S, K",
        ),
        ({"labels": LABELS.int()}, TypeError, "labels is torch.int32; it must be int64"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta; it must be on cpu"),
        ({"logits": torch.zeros(5, 5)}, ValueError, "5 rows, which do not divide into 2 labels"),
        ({"logits": torch.zeros(0, 5)}, ValueError, "2 labels need at least one draw each"),
        ({"labels": LABELS[:0]}, ValueError, "4 rows, which do not divide into 0 labels"),
        ({"loss": "margin"}, ValueError, "loss is 'margin'; it must be one of 'ce', 'dlr', 'dlr-t"),
        (
            {"logits": torch.zeros(4, 2), "loss": "dlr"},
            ValueError,
            "logits has 2 classes; 'dlr' needs at least 3: use 'ce'",
        ),
        (
            {"logits": torch.zeros(4, 3), "loss": "dlr-targeted", "targets": LABELS},
            ValueError,
            "logits has 3 classes; 'dlr-targeted' needs at least 4: use 'ce' or 'dlr'",
        ),
        ({"loss": "dlr-targeted"}, ValueError, "targets is None; needed for loss 'dlr-targeted'"),
        ({"targets": LABELS}, ValueError, "targets is given; used only with loss 'dlr-targeted'"),
        (
            {"loss": "dlr-targeted", "targets": LABELS[:1]},
            ValueError,
            r"targets has shape \(1,\); it must be \[2\]",
        ),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vote_loss(**{"logits": torch.zeros(4, 5), "labels": LABELS, **change})  # type: ignore[arg-type]


def test_a_second_derivative_is_refused() -> None:
    tensors = case(2, 1, 5)
    logits = tensors["logits"].requires_grad_()
    value, _ = vote_loss(logits, tensors["labels"])
    (gradient,) = torch.autograd.grad(value.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
