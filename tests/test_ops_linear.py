# SPDX-License-Identifier: Apache-2.0
"""linear, layer_norm and what goes with them: every instruction set against torch in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nimfast.ops import use_backend
from nimfast.ops.layer_norm import layer_norm, layer_norm_backward, take_rows
from nimfast.ops.linear import linear, linear_add, linear_gelu, linear_times, weight_gradient

LEVELS = ["portable", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "reference"]
# Images, tokens, depth, width: below and above a tile, a panel, an item and a block of rows, and an
# odd number of rows, where pairs of bfloat16 values have a half left over.
SHAPES = [(2, 3, 16, 48), (3, 65, 96, 208), (1, 1, 80, 16), (3, 101, 208, 96)]
KEPT = torch.tensor([0, 2])

pytestmark = pytest.mark.usefixtures("served")


@pytest.fixture(params=LEVELS)
def served(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "reference":
        with use_backend("reference"):
            yield
        return
    module = pytest.importorskip("_nimfast")
    before = module.cpu_level()
    try:
        module.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    with use_backend("native"):
        yield
    module.set_cpu_level(before)


def close(found: Tensor, exact: Tensor) -> None:
    """Within the rounding of its type, and that of sums in fp32."""
    error, most = (found.double() - exact).abs(), exact.abs().max()
    bound = 2**-8 * (exact.abs() + most / 64) if found.dtype == torch.bfloat16 else 2e-6 * most
    assert (error <= bound).all(), error.max()


@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int, int, int]) -> None:
    batch, tokens, depth, width = shape
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, depth).bfloat16()
    weight, bias = torch.randn(width, depth) / depth**0.5, torch.randn(width)
    gradient, factor = torch.randn(batch, tokens, width).bfloat16(), torch.randn_like(x)
    rounded = weight.bfloat16().double()  # as autocast rounds it
    plain = x.double() @ rounded.T + bias.double()
    close(linear(x, weight, bias), plain)
    close(linear(x, weight), plain - bias)
    close(linear(gradient, weight, across=True), gradient.double() @ rounded)
    close(linear_times(gradient, weight, factor), gradient.double() @ rounded * factor.double())
    leaf = plain.requires_grad_()
    active = F.gelu(leaf)
    (slope,) = torch.autograd.grad(active.sum(), leaf)
    found = linear_gelu(x, weight, bias)
    close(found[0], active.detach())
    close(found[1], slope)
    flat = gradient.double().flatten(0, 1)
    of_weight, of_bias = weight_gradient(gradient, x)
    close(of_weight, flat.T @ x.double().flatten(0, 1))
    close(of_bias, flat.sum(0))


def test_sums_and_kept_images() -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(48, 32) / 6, torch.randn(48)
    residual = torch.randn(4, 7, 48)
    for kept, count in ((None, 4), (KEPT, 2)):
        x = torch.randn(count, 7, 32).bfloat16()
        change = 1.25 * (x.double() @ weight.bfloat16().double().T + bias)
        exact = residual.double().index_add(0, torch.arange(4) if kept is None else kept, change)
        close(linear_add(x, weight, bias, residual, 1.25, kept), exact)


@pytest.mark.parametrize("width", [16, 192])
@pytest.mark.parametrize("kept", [None, KEPT])
def test_layer_norm(width: int, kept: Tensor | None) -> None:
    torch.manual_seed(2)
    x, residual = torch.randn(4, 65, width) + 3, torch.randn(4, 65, width)
    weight, bias = torch.randn(width), torch.randn(width)
    places = torch.arange(4) if kept is None else kept
    gradient = torch.randn(len(places), 65, width).bfloat16()
    leaves = [value.double().requires_grad_() for value in (x, weight, bias)]
    exact = F.layer_norm(leaves[0], (width,), *leaves[1:], 1e-6)[places]
    wanted = torch.autograd.grad(exact, leaves, gradient.double())
    rows, mean, scale = layer_norm(x, weight, bias, 1e-6, kept)
    close(rows, exact.detach())
    found = layer_norm_backward(gradient, x, weight, mean, scale, residual, kept)
    for value, right in zip(found, (wanted[0] + residual, *wanted[1:]), strict=True):
        close(value, right.detach())
    close(take_rows(x, 1.25, kept), 1.25 * x.double()[places])


def test_nothing_finite_is_lost_or_made() -> None:
    """Far out gelu is 0 or the identity; NaN stays NaN."""
    values = torch.tensor([-300.0, -20, 0, 20, 300, float("nan")]).bfloat16()
    x = torch.zeros(6, 16).bfloat16()
    x[:, 0] = values
    weight = torch.eye(16)
    out, slope = linear_gelu(x, weight, torch.zeros(16))
    expected = torch.tensor([0.0, 0, 0, 20, 300, float("nan")])
    torch.testing.assert_close(out[:, 0].float(), expected, equal_nan=True, rtol=0, atol=1e-20)
    slopes = torch.tensor([0.0, 0, 0.5, 1, 1, float("nan")])
    torch.testing.assert_close(slope[:, 0].float(), slopes, equal_nan=True, rtol=0, atol=1e-20)


def test_threads_change_no_bit(request: pytest.FixtureRequest) -> None:
    if "reference" in request.node.name:
        pytest.skip("torch's products promise nothing")
    torch.manual_seed(3)
    x, gradient = torch.randn(4, 197, 96).bfloat16(), torch.randn(4, 197, 192).bfloat16()
    weight, bias = torch.randn(192, 96), torch.randn(192)
    sums = torch.randn(4, 197, 96)
    norm = torch.randn(2, 96).unbind()

    def everything() -> list[Tensor]:
        rows, mean, scale = layer_norm(sums, *norm, 1e-6)
        return [
            *linear_gelu(x, weight, bias), *weight_gradient(gradient, x), rows,
            *layer_norm_backward(x, sums, norm[0], mean, scale, sums),
        ]  # fmt: skip

    results: list[list[Tensor]] = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(everything())
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
