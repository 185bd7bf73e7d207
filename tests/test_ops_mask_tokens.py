# SPDX-License-Identifier: Apache-2.0
"""mask_tokens: values and gradients against plain torch, every type, and sums that never change."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nimfast.ops import mask_tokens, use_backend
from nimfast.ops.backend import native

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    batch: int, patches: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, patches, width, generator=generator).to(device, dtype)
    token = torch.randn(width, generator=generator).to(device, dtype)
    return tokens, token, (torch.rand(batch, patches, generator=generator) < 0.6).to(device)


# The regime each shape stands for: [N, L, D].
SHAPES = {
    "no batch": (0, 4, 8),
    "no patch": (2, 0, 8),
    "one value": (1, 1, 1),
    "width odd": (3, 5, 7),
    "several tiles of columns": (2, 3, 1300),
    "several parts": (5, 21, 64),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(
    backend: str, device: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tokens, token, mask = case(*shape, dtype, device)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    tokens.requires_grad_()
    token.requires_grad_()
    with use_backend(backend):
        ours = mask_tokens(tokens, token, mask)
        ours.backward(weight)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    assert torch.equal(ours, torch.where(mask[..., None], token, tokens))
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, torch.where(mask[..., None], 0, weight))
    exact = (weight.double() * mask[..., None]).sum((0, 1))
    assert token.grad is not None
    assert token.grad.dtype == dtype
    # Summed in fp32 and rounded once; the interpreter truncates where it would round to bfloat16,
    # but the sum is rounded by torch.
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert torch.allclose(token.grad.double(), exact, rtol=tolerance, atol=1e-5)


def test_parameter_in_fp32_keeps_its_precision(backend: str, device: str) -> None:
    # As in training: fp32 parameters, bf16 activations. Ones, so that a bf16 sum would stop at 256.
    tokens, token, mask = case(4, 100, 3, torch.bfloat16, device)
    token = token.float().requires_grad_()
    mask[:] = True
    with use_backend(backend):
        out = mask_tokens(tokens, token, mask)
        out.backward(torch.ones_like(out))
    assert torch.equal(out, token.detach().bfloat16().expand_as(out))
    assert token.grad is not None
    assert token.grad.tolist() == [400.0] * 3


def test_masked_values_are_never_computed_with(backend: str, device: str) -> None:
    tokens, token, mask = case(2, 6, 5, device=device)
    tokens = torch.where(mask[..., None], float("nan"), tokens).requires_grad_()
    token.requires_grad_()
    with use_backend(backend):
        out = mask_tokens(tokens, token, mask)
        # Likewise an unmasked gradient and the mask token's sum.
        out.backward(torch.where(mask[..., None], 1.0, float("inf")).expand_as(out))
    assert out.isfinite().all()
    assert tokens.grad is not None
    assert (tokens.grad == torch.where(mask[..., None], 0.0, float("inf"))).all()
    assert token.grad is not None
    assert (token.grad == mask.sum()).all()


def test_views(backend: str, device: str) -> None:
    tokens, token, mask = case(4, 6, 10, device=device)
    with use_backend(backend):
        plain = mask_tokens(tokens[:, ::2, 1:8].clone(), token[:7], mask[:, ::2].clone())
        assert torch.equal(mask_tokens(tokens[:, ::2, 1:8], token[:7], mask[:, ::2]), plain)
        turned = tokens.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(mask_tokens(turned, token, mask), mask_tokens(tokens, token, mask))
        turned.requires_grad_()
        # The gradient of a sum is an expanded view.
        mask_tokens(turned, token, mask).sum().backward()
    assert turned.grad is not None
    assert torch.equal(turned.grad, (~mask)[..., None].expand_as(tokens).float())


def test_only_one_needs_a_gradient(backend: str, device: str) -> None:
    tokens, token, mask = case(2, 5, 4, device=device)
    with use_backend(backend):
        mask_tokens(tokens, token.requires_grad_(), mask).sum().backward()
    assert tokens.grad is None
    assert torch.equal(token.grad, mask.sum().float().expand(4))


def test_sum_over_many_rows(backend: str, device: str) -> None:
    # 32,000 rows: parts of 63 of them, the last one short.
    tokens, token, mask = case(160, 200, 6, device=device)
    token.requires_grad_()
    with use_backend(backend):
        out = mask_tokens(tokens, token, mask)
        (out * tokens).sum().backward()
    exact = (tokens.double() * mask[..., None]).sum((0, 1))
    assert token.grad is not None
    assert torch.allclose(token.grad.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_cpu_level_and_thread_count_gives_the_same_bits(
    cpu_level: str, set_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    tokens, token, mask = case(16, 65, 48, dtype)

    def results(level: str, threads: int) -> tuple[Tensor, ...]:
        module = native()
        assert module is not None
        module.set_cpu_level(level)
        set_threads(threads)
        with use_backend("native"):
            out = torch.ops.nimfast.mask_tokens(tokens, token, mask)
            return (out, *torch.ops.nimfast.mask_tokens_backward(tokens, mask))

    expected = results("portable", 1)
    for threads in (1, 3):
        found = results(cpu_level, threads)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_opcheck() -> None:
    tokens, token, mask = case(2, 3, 4)
    torch.library.opcheck(torch.ops.nimfast.mask_tokens.default, (tokens, token, mask))
    torch.library.opcheck(torch.ops.nimfast.mask_tokens_backward.default, (tokens, mask))


def test_compiled_equals_eager() -> None:
    tokens, token, mask = case(2, 5, 8)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return mask_tokens(x, y, mask).square().mean((1, 2))

    gradients = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        x, y = tokens.clone().requires_grad_(), token.clone().requires_grad_()
        out = run(x, y)
        out.sum().backward()
        gradients.append((out, x.grad, y.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


GOOD = dict(zip(("tokens", "mask_token", "mask"), case(2, 3, 4), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": GOOD["tokens"].double()}, TypeError, "tokens is torch.float64; it must be"),
        ({"tokens": torch.zeros(3, 4)}, ValueError, r"tokens has shape \(3, 4\); .* \[N, L, D\]"),
        ({"mask_token": torch.zeros(5)}, ValueError, r"mask_token has shape \(5,\); .* \[4\]"),
        ({"mask_token": torch.zeros(4).int()}, TypeError, "mask_token is torch.int32; it must be"),
        (
            {"mask_token": torch.zeros(4, device="meta")},
            ValueError,
            "mask_token is on meta; it must be on cpu",
        ),
        ({"mask": torch.zeros(2, 3)}, TypeError, "mask is torch.float32; it must be bool"),
        ({"mask": torch.zeros(2, 4).bool()}, ValueError, r"mask has shape \(2, 4\); .* \[2, 3\]"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mask_tokens(**{**GOOD, **change})  # type: ignore[arg-type]
