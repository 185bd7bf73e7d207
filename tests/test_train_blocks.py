# SPDX-License-Identifier: Apache-2.0
"""Blocks over the bfloat16 kernels: timm's under autocast, within the rounding of that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import train.blocks
from nimfast.models.vit import block
from nimfast.ops import use_backend
from train.blocks import KernelBlock, can_serve
from train.cpu import speed_up

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def willing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines, too, on which torch's products are the faster ones."""
    monkeypatch.setattr(train.blocks, "multiplies_bf16", lambda: True)


def pair(drop_path: float) -> tuple[nn.Module, nn.Module]:
    pytest.importorskip("_nimfast")
    torch.manual_seed(0)
    plain = block(64, 2, drop_path).train()
    for value in plain.parameters():  # norms and biases as training leaves them
        value.data += 0.1 * torch.randn_like(value)
    faster = copy.deepcopy(plain)
    speed_up(faster, CPU, "bf16")
    assert type(faster) is KernelBlock and type(plain) is Block
    return plain, faster


def step(layer: nn.Module, seed: int, half: bool = True) -> list[Tensor]:
    """What comes out, and all gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 13, 64, generator=generator).requires_grad_()
    incoming = torch.randn(8, 13, 64, generator=generator)
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = layer(x)
    given = dict(layer.named_parameters())
    found = torch.autograd.grad(out, [x, *given.values()], incoming)
    return [out.detach(), *found]


def error(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize("served_by", ["native", "reference"])
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_a_step_is_as_close_as_autocast(drop_path: float, served_by: str) -> None:
    """To the step in fp32, in every tensor, with the same images dropped."""
    plain, faster = pair(drop_path)
    for seed in range(3):
        exact, usual = step(plain, seed, half=False), step(plain, seed)
        with use_backend(served_by):
            found = step(faster, seed)
        assert all(f.dtype == torch.float32 for f in found)
        ours, theirs = error(found, exact), error(usual, exact)
        assert sum(ours) < 1.02 * sum(theirs) and max(theirs) < 0.02
        assert all(one < 1.3 * other for one, other in zip(ours, theirs, strict=True))
    if drop_path:  # another draw is another function: the comparison above sees the masks
        assert max(error(step(faster, 5), step(plain, 6, half=False))) > 0.1


def test_dropped_images_pass_unchanged() -> None:
    _, faster = pair(0.999999)
    parts: Any = faster
    out, of_x, *of_weights = step(faster, 0)
    x = torch.randn(8, 13, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(out, x) and of_x.shape == x.shape
    assert parts.drop_path1.drop_prob > 0.99 and not any(value.any() for value in of_weights)


def test_elsewhere_it_is_timms() -> None:
    plain, faster = pair(0.3)
    assert list(plain.state_dict()) == list(faster.state_dict())
    x = torch.randn(2, 5, 64)
    torch.manual_seed(0)
    expected = plain(x)
    torch.manual_seed(0)
    torch.testing.assert_close(faster(x), expected)  # fp32
    for layer in (plain, faster):
        layer.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(faster(x), plain(x), rtol=0.02, atol=0.02)
    mask = torch.rand(5, 5) > 0.3
    torch.testing.assert_close(faster(x, attn_mask=mask), plain(x, attn_mask=mask))


def test_what_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[dict[str, Any]] = [
        {"init_values": 0.1}, {"proj_drop": 0.1}, {"act_layer": nn.ReLU},
        {"norm_layer": nn.RMSNorm},
        {"qkv_bias": False}, {"proj_bias": False}, {"scale_mlp_norm": True}, {"mlp_ratio": 1.1},
        {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"attn_drop": 0.1},
    ]  # fmt: skip
    usual: dict[str, Any] = {"qkv_bias": True, "norm_layer": nn.LayerNorm}
    for settings in others:
        layer = Block(32, 2, **{**usual, **settings})
        speed_up(layer, CPU, "bf16")
        assert type(layer) is Block, settings
    layer = Block(32, 2, **usual)
    speed_up(layer, CPU, "fp32")
    assert type(layer) is Block and can_serve(layer)
    monkeypatch.setattr(train.blocks, "multiplies_bf16", lambda: False)
    assert not can_serve(layer)
