# SPDX-License-Identifier: Apache-2.0
"""ascend: every back end against the reference, ball and box, zero and NaN gradients, arguments."""

import pytest
import torch
from torch import Tensor

from nimfast.ops import ascend, use_backend

EPS = {"linf": 8 / 255, "l2": 0.5}


def step_for(*shape: int, device: str = "cpu", spread: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    origin = torch.rand(shape, generator=generator)
    near = [
        (origin + spread * torch.randn(shape, generator=generator)).clamp(0, 1) for _ in range(2)
    ]
    gradient = torch.randn(shape, generator=generator)
    named = {"x": near[0], "origin": origin, "gradient": gradient, "previous": near[1]}
    return {name: value.to(device) for name, value in named.items()}


def plain_linf(
    x: Tensor, origin: Tensor, gradient: Tensor, previous: Tensor | None, step: float, eps: float
) -> Tensor:
    """As torch code writes it, momentum 0.75."""

    def project(y: Tensor) -> Tensor:
        return torch.clamp(torch.min(torch.max(y, origin - eps), origin + eps), 0.0, 1.0)

    z = project(x + step * torch.sign(gradient))
    return z if previous is None else project(x + (z - x) * 0.75 + (x - previous) * 0.25)


# The regime each shape stands for: [N, ...].
SHAPES = {
    "CIFAR images": (2, 3, 32, 32),
    "no batch": (0, 3, 8, 8),
    "values no multiple of the vector width": (3, 3, 5, 5),
    "more than one block": (2, 1, 49, 50),
    "no channel axis": (2, 7),
    "numbers": (3,),
    "one value": (1, 1, 1, 1),
}


@pytest.mark.parametrize("moving", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_reference(
    backend: str, device: str, shape: tuple[int, ...], norm: str, moving: bool
) -> None:
    tensors = step_for(*shape, device=device)
    if not moving:
        tensors.pop("previous")
    options = {"step": EPS[norm], "eps": EPS[norm], "norm": norm, "momentum": 0.75}
    with use_backend(backend):
        ours = ascend(**tensors, **options)  # type: ignore[arg-type]
    with use_backend("reference"):
        reference = ascend(**tensors, **options)  # type: ignore[arg-type]
    assert ours.shape == shape
    if norm == "linf":
        assert torch.equal(ours, reference)
    else:
        assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moving", [False, True], ids=["plain", "momentum"])
def test_linf_has_the_bits_of_torch(backend: str, device: str, moving: bool) -> None:
    tensors = step_for(2, 3, 16, 16, device=device)
    tensors["gradient"][0, 0] = 0.0
    before = tensors.pop("previous")
    previous = before if moving else None
    options = {"step": 2 / 255, "eps": 8 / 255}
    with use_backend(backend):
        ours = ascend(**tensors, **options, previous=previous, momentum=0.75)  # type: ignore[arg-type]
    assert torch.equal(ours, plain_linf(**tensors, previous=previous, **options))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.5])
def test_stays_in_ball_and_box(backend: str, device: str, norm: str, spread: float) -> None:
    tensors = step_for(3, 3, 8, 8, device=device, spread=spread)
    eps = torch.tensor([0.0, 0.03, 1.0], device=device)
    step = torch.tensor([0.1, 2.0, 0.0], device=device)
    with use_backend(backend):
        ours = ascend(**tensors, step=step, eps=eps, norm=norm, momentum=0.75)
    away = (ours.double() - tensors["origin"].double()).flatten(1)
    length = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
    assert ours.min() >= 0 and ours.max() <= 1
    assert (length <= eps.double() * (1 + 1e-6) + 1e-7).all()
    if norm == "linf":
        origin, radius = tensors["origin"], eps.view(-1, 1, 1, 1)
        assert (ours >= (origin - radius)).all() and (ours <= (origin + radius)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_length_and_direction_of_a_free_step(backend: str, device: str, norm: str) -> None:
    # Far from the ball's and the box's edge the step is what it says.
    origin = torch.full((2, 3, 4, 4), 0.5, device=device)
    gradient = step_for(2, 3, 4, 4, device=device)["gradient"]
    step = torch.tensor([0.01, 0.1], device=device)
    with use_backend(backend):
        moved = ascend(origin, origin, gradient, step=step, eps=1.0, norm=norm) - origin
    length = moved.flatten(1).norm(dim=1) if norm == "l2" else moved.abs().amax((1, 2, 3))
    assert torch.allclose(length, step, rtol=1e-4)
    assert torch.equal(moved.sign(), gradient.sign())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_and_nan_gradients(backend: str, device: str, norm: str) -> None:
    tensors = step_for(3, 1, 6, 6, device=device, spread=0.001)
    tensors["gradient"][0] = 0.0
    tensors["gradient"][1, 0, 2, 3] = float("nan")
    previous = tensors.pop("previous")
    for options in ({}, {"previous": previous, "momentum": 0.75}):
        with use_backend(backend):
            ours = ascend(**tensors, step=0.01, eps=0.3, norm=norm, **options)  # type: ignore[arg-type]
        assert ours[0].isfinite().all() and ours[2].isfinite().all()
        if not options:
            assert torch.allclose(ours[0], tensors["x"][0], atol=1e-6)
        broken = torch.zeros(6, 6, dtype=torch.bool, device=device)
        broken[2, 3] = True
        assert torch.equal(ours[1, 0].isnan(), broken if norm == "linf" else broken | True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradient_in_low_precision(
    backend: str, device: str, norm: str, dtype: torch.dtype
) -> None:
    # The gradient is widened before anything else: nothing but its own rounding is lost.
    tensors = step_for(2, 3, 8, 8, device=device)
    tensors["gradient"] = tensors["gradient"].to(dtype)
    widened = {**tensors, "gradient": tensors["gradient"].float()}
    options = {"step": EPS[norm], "eps": EPS[norm], "norm": norm, "momentum": 0.75}
    with use_backend(backend):
        assert torch.equal(ascend(**tensors, **options), ascend(**widened, **options))  # type: ignore[arg-type]


def test_views(backend: str, device: str) -> None:
    big = step_for(4, 3, 9, 8, device=device)
    views = {
        "sliced": lambda v: v[1:3, :, 1:5, 2:6],
        "channels last": lambda v: v.contiguous(memory_format=torch.channels_last),
        "expanded": lambda v: v[:1].expand(3, -1, -1, -1),
        "misaligned": lambda v: torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape),
    }
    for name, view in views.items():
        viewed = {key: view(value) for key, value in big.items()}
        plain = {
            key: value.clone(memory_format=torch.contiguous_format) for key, value in viewed.items()
        }
        for norm, eps in EPS.items():
            options = {"step": eps, "eps": eps, "norm": norm, "momentum": 0.75}
            with use_backend(backend):
                ours = ascend(**viewed, **options)  # type: ignore[arg-type]
                assert ours.is_contiguous()
                assert torch.equal(ours, ascend(**plain, **options)), (name, norm)  # type: ignore[arg-type]


def test_result_is_detached_and_new() -> None:
    tensors = step_for(1, 1, 4, 4)
    tensors["x"].requires_grad_()
    ours = ascend(**tensors, step=0.0, eps=1.0)
    assert not ours.requires_grad
    assert ours.data_ptr() != tensors["x"].data_ptr()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_opcheck_and_compile(norm: str) -> None:
    tensors = step_for(2, 3, 4, 4)
    size = torch.full((2,), 0.1)
    arguments = [tensors["x"], tensors["origin"], tensors["gradient"], size, size, norm]
    for previous in (None, tensors["previous"]):
        torch.library.opcheck(torch.ops.nimfast.ascend.default, (*arguments, previous, 0.75))

    def function(x: Tensor) -> Tensor:
        return ascend(**{**tensors, "x": x}, step=0.1, eps=0.1, norm=norm, momentum=0.75) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors["x"]), function(tensors["x"]))


def test_every_cpu_level(cpu_level: str) -> None:
    tensors = step_for(2, 3, 33, 31)
    options = {"step": 0.1, "eps": 0.1, "momentum": 0.75}
    with use_backend("reference"):
        linf = ascend(**tensors, **options)  # type: ignore[arg-type]
        l2 = ascend(**tensors, **options, norm="l2")  # type: ignore[arg-type]
    with use_backend("native"):
        assert torch.equal(ascend(**tensors, **options), linf)  # type: ignore[arg-type]
        assert torch.allclose(ascend(**tensors, **options, norm="l2"), l2, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_threads_do_not_change_a_bit(norm: str) -> None:
    tensors, threads = step_for(7, 3, 64, 64), torch.get_num_threads()
    options = {"step": 0.1, "eps": 0.1, "norm": norm, "momentum": 0.75}
    try:
        torch.set_num_threads(1)
        alone = ascend(**tensors, **options)  # type: ignore[arg-type]
        torch.set_num_threads(3)
        assert torch.equal(ascend(**tensors, **options), alone)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3).half()}, TypeError, "x is torch.float16; it must be float32"),
        ({"x": [0.5]}, TypeError, r"x is \[0.5\]; it must be a tensor of float32"),
        ({"x": torch.zeros(())}, ValueError, r"x has shape \(\); it must be \[N, ...\]"),
        (
            {"origin": torch.zeros(3, 2)},
            ValueError,
            r"origin has shape \(3, 2\); it must be \(2, 3\), that of x",
        ),
        (
            {"gradient": torch.zeros(2, 3).double()},
            TypeError,
            "gradient is torch.float64; it must be float32, bfloat16 or float16",
        ),
        (
            {"gradient": torch.zeros(2, 3, device="meta")},
            ValueError,
            "gradient is on meta; it must be on cpu",
        ),
        ({"previous": torch.zeros(2)}, ValueError, r"previous has shape \(2,\)"),
        ({"step": -1.0}, ValueError, "step is -1.0; it must be finite and not negative"),
        ({"step": torch.tensor([0.1, -0.1])}, ValueError, "step is .*; no value may be negative"),
        ({"eps": torch.zeros(3)}, ValueError, r"eps has shape \(3,\); it must be \[2\]"),
        (
            {"eps": torch.tensor([0.1, float("nan")])},
            ValueError,
            "eps is .*; no value may be negative or NaN",
        ),
        ({"norm": "l1"}, ValueError, "norm is 'l1'; it must be 'linf' or 'l2'"),
        ({"momentum": 1.5}, ValueError, r"momentum is 1.5; it must be in \[0, 1\]"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = dict.fromkeys(("x", "origin", "gradient"), torch.zeros(2, 3)) | {"step": 0.1, "eps": 0.1}
    with pytest.raises(error, match=message):
        ascend(**{**good, **change})  # type: ignore[arg-type]
