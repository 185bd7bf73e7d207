# SPDX-License-Identifier: Apache-2.0
"""What makes training steps faster on a CPU: the same weights, names, results and gradients.

test_published.py compares its gradients with the published implementation's.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from nimfast.models import MAE, Architecture, take
from nimfast.ops import recon_loss
from nimfast.ops.backend import choose
from train.cpu import KernelAttention, speed_up

CPU = torch.device("cpu")
SMALL = Architecture((64, 64), 3, 8, 64, 2, 2, True, 32, 1, 1)
native = pytest.mark.skipif(choose("attention", CPU) != "native", reason="no compiled kernels")


def pair(precision: str) -> tuple[MAE, MAE]:
    torch.manual_seed(0)
    plain = MAE(SMALL)
    faster = copy.deepcopy(plain)
    speed_up(faster, CPU, precision)
    return plain, faster


def gradients(model: MAE, precision: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    images = torch.rand(4, 3, 64, 64)
    keep = torch.rand(4, 64).argsort(1)[:, :40]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        prediction = model(take(model.rows(images), keep), keep)
    loss = recon_loss(prediction, images, patch=8, norm_pix=True, mean=(0,) * 3, std=(1,) * 3)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@native
def test_gradients_are_those_of_the_plain_model() -> None:
    plain, faster = pair("fp32")
    layers = [layer for layer in faster.modules() if isinstance(layer, Attention)]
    assert layers and all(type(layer) is KernelAttention for layer in layers)
    assert list(plain.state_dict()) == list(faster.state_dict())
    expected, found = gradients(plain, "fp32"), gradients(faster, "fp32")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@native
def test_half_precision_is_as_close_as_before() -> None:
    plain, faster = pair("bf16")
    exact = gradients(plain, "fp32")

    def error(model: MAE) -> float:
        found = gradients(model, "bf16")
        squares = [((found[n] - v).norm() / v.norm()) ** 2 for n, v in exact.items()]
        return float(torch.stack(squares).mean().sqrt())

    assert error(faster) < 1.1 * error(plain)


def test_what_is_left_alone() -> None:
    model: Any = nn.ModuleList(
        [
            Attention(32, 2, qk_norm=True, norm_layer=nn.LayerNorm),
            Attention(32, 2, attn_drop=0.1),
            Attention(32, 2, gated=True),
        ]
    )
    speed_up(model, CPU, "fp32")
    assert all(type(layer) is Attention and layer.fused_attn for layer in model)
    speed_up(model, CPU, "bf16")  # torch's flash attention is slow in half precision
    assert not any(layer.fused_attn for layer in model)
    elsewhere = MAE(SMALL)
    speed_up(elsewhere, torch.device("cuda"), "bf16")
    assert not any(isinstance(layer, KernelAttention) for layer in elsewhere.modules())


@native
def test_masks_are_timms() -> None:
    layer = Attention(32, 2).eval()
    other = copy.deepcopy(layer)
    speed_up(nn.Sequential(other), CPU, "fp32")
    assert type(other) is KernelAttention
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(other(x), layer(x))
    for given in ({"is_causal": True}, {"attn_mask": torch.rand(7, 7) > 0.3}):
        torch.testing.assert_close(other(x, **given), layer(x, **given))
        assert not torch.allclose(other(x, **given), layer(x), atol=1e-4)
