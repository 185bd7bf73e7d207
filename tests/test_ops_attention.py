# SPDX-License-Identifier: Apache-2.0
"""attention: results and gradients against the formula in float64, on every instruction set."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nimfast.ops import attention, use_backend

# Tokens, heads, values of a head: below and above a vector, a tile and a block of queries, and
# odd, where pairs of bfloat16 values have a half left over.
SHAPES = [(1, 1, 1), (2, 2, 3), (4, 1, 32), (33, 1, 5), (50, 2, 17), (65, 3, 64), (197, 2, 32)]
LEVELS = ["portable", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16"]


def case(tokens: int, heads: int, values: int, dtype: torch.dtype, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, 3 * heads * values, generator=generator).to(dtype)


def plain(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """As torch code writes it, in the type of `qkv`."""
    batch, tokens = qkv.shape[:2]
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scale = scale or q.shape[-1] ** -0.5
    return ((q * scale) @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(batch, tokens, -1)


def with_gradient(
    function: Callable[[Tensor, int], Tensor], qkv: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = function(leaf, heads)
    incoming = torch.arange(out.numel(), device=out.device).view_as(out).mul(0.7).sin()
    (gradient,) = torch.autograd.grad(out, leaf, incoming.to(qkv.dtype))
    return out.detach(), gradient


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def compare(qkv: Tensor, heads: int) -> None:
    ours = with_gradient(attention, qkv, heads)
    exact = with_gradient(plain, qkv.double(), heads)
    theirs = with_gradient(plain, qkv, heads)
    for found, right, usual in zip(ours, exact, theirs, strict=True):
        assert found.dtype == qkv.dtype
        # At most twice the error of torch's lines in the same type; they may be exact.
        bound = 2 * error(usual, right) + (1e-6 if qkv.dtype == torch.float32 else 4e-3)
        assert error(found, right) <= bound, (tuple(qkv.shape), heads, qkv.dtype)


@pytest.mark.parametrize("cpu_level", LEVELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_cpu_level(cpu_level: str, dtype: torch.dtype) -> None:
    with use_backend("native"):
        for tokens, heads, values in SHAPES:
            compare(case(tokens, heads, values, dtype), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_ends(backend: str, device: str, dtype: torch.dtype) -> None:
    with use_backend(backend):
        for tokens, heads, values in SHAPES:
            compare(case(tokens, heads, values, dtype).to(device), heads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_serves_a_gpu() -> None:
    compare(case(65, 3, 64, torch.float32).cuda(), 3)


@pytest.mark.parametrize("cpu_level", LEVELS, indirect=True)
def test_threads_and_the_place_in_a_batch_change_nothing(
    cpu_level: str, set_threads: Callable[[int], None]
) -> None:
    qkv = case(65, 3, 64, torch.bfloat16, batch=40)
    set_threads(1)
    alone = with_gradient(attention, qkv, 3)
    set_threads(3)
    for one, other in zip(alone, with_gradient(attention, qkv, 3), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(attention(qkv[7:8], 3), alone[0][7:8])


def test_any_strides() -> None:
    qkv = case(65, 3, 64, torch.float32, batch=6)
    wide = torch.cat([qkv, qkv], 2)
    for strided in (
        wide[:, :, : qkv.shape[2]],
        qkv.transpose(0, 1).contiguous().transpose(0, 1),
        qkv.mT.contiguous().mT,
        qkv[::2],
        qkv[:1].expand(4, -1, -1),
    ):
        ours, wanted = with_gradient(attention, strided, 3), attention(strided.contiguous(), 3)
        assert torch.equal(ours[0], wanted)
        leaf = strided.detach().contiguous()
        assert torch.equal(ours[1], with_gradient(attention, leaf, 3)[1])


def test_empty() -> None:
    for shape in ((0, 65, 192), (2, 0, 192)):
        ours = with_gradient(attention, torch.zeros(shape), 2)
        assert ours[0].shape == (*shape[:2], 64) and ours[1].shape == shape


def test_scale_and_large_scores() -> None:
    qkv = 30 * case(9, 2, 8, torch.float32)  # scores of thousands: exp of them overflows
    for scale in (None, 0.01, 3.0):
        exact = plain(qkv.double(), 2, scale)
        assert error(attention(qkv, 2, scale), exact) < 1e-4


def test_what_is_not_finite_stays_in_its_head() -> None:
    odd = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)  # NaN, another one
    for value in (torch.tensor(math.nan), odd, torch.tensor(math.inf)):
        qkv = case(9, 2, 8, torch.float32)
        qkv[1, 4, 0] = value  # of a query of the first head
        broken = attention(qkv, 2).isnan()
        assert broken[1, 4, :8].all() and broken.sum() == 8


def test_inference_mode_and_compiled_shapes() -> None:
    qkv = case(4, 1, 32, torch.float32)
    with torch.inference_mode():
        assert torch.equal(attention(qkv, 1), attention(qkv.clone(), 1))
    assert attention(qkv.to("meta"), 1).shape == (3, 4, 32)
    torch.library.opcheck(torch.ops.nimfast.attention.default, (qkv, 1, 0.1))


def test_a_second_derivative_is_refused() -> None:
    leaf = case(4, 1, 32, torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(attention(leaf, 1).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"qkv": torch.zeros(2, 4, 12).double()}, TypeError, "qkv is torch.float64; it must be"),
        ({"qkv": torch.zeros(4, 12)}, ValueError, r"\(4, 12\); it must be \[B, N, 3 \* H \* D\]"),
        ({"heads": 0}, ValueError, "heads is 0; it must be a whole number of at least 1"),
        ({"heads": 5}, ValueError, "12 values per token; they must be a positive multiple of 3"),
        ({"qkv": torch.zeros(2, 4, 0)}, ValueError, "0 values per token"),
        ({"scale": 0.0}, ValueError, "scale is 0.0; it must be positive and finite"),
        ({"scale": math.nan}, ValueError, "scale is nan; it must be positive and finite"),
    ],
)
def test_bad_arguments(change: dict[str, object], kind: type[Exception], message: str) -> None:
    arguments = {"qkv": torch.zeros(2, 4, 12), "heads": 2, **change}
    with pytest.raises(kind, match=message):
        attention(**arguments)  # type: ignore[arg-type]
