# SPDX-License-Identifier: Apache-2.0
"""Devices, precisions, and networks made ready: the same function, packed."""

import pytest
import timm
import torch
from torch import nn

from nimfast.errors import UserError
from nimfast.models import load_classifier
from nimfast.runtime import PackedLinear, Precision, check_precision, pick_device, prepare, versions

CPU = torch.device("cpu")


def packed(module: nn.Module) -> int:
    return sum(isinstance(layer, PackedLinear) for layer in module.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prepared_networks_compute_the_same_function(precision: Precision) -> None:
    torch.manual_seed(0)
    networks = {
        "ours": (load_classifier("digits", num_classes=10, shape=(1, 32, 32)), (1, 32, 32), 6),
        "timm": (
            timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3).eval(),
            (3, 32, 32),
            12,
        ),
        # Its attention reads the weights of its own linear layers, so those must stay.
        "timm, weights read by the parent": (
            timm.create_model(
                "beit_base_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3
            ).eval(),
            (3, 32, 32),
            0,
        ),
        "torch": (
            nn.Sequential(
                nn.Flatten(2), nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
            ).eval(),
            (3, 4, 8),
            0,
        ),
        "resnet": (timm.create_model("resnet18", num_classes=10).eval(), (3, 32, 32), 0),
    }
    for name, (network, shape, least) in networks.items():
        images = torch.rand(5, *shape)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        ready = prepare(network, CPU, precision)
        with torch.inference_mode():
            exact = network(images)
            plain = network.to(torch.bfloat16)(images.bfloat16()) if precision == "bf16" else exact
            ours = ready(images.bfloat16() if precision == "bf16" else images)
        network.float()
        # The rule for low precision: at most twice the error of the same precision in plain torch.
        rounding = float((plain - exact).abs().max())
        bound = 2 * rounding if precision == "bf16" else 1e-4 * float(exact.abs().max())
        assert float((ours - exact).abs().max()) <= bound + 1e-6, name
        assert packed(ready) >= least, name
        assert not packed(network), name
        if precision == "fp32":
            assert all(
                torch.equal(value, before[key]) for key, value in network.state_dict().items()
            )
        assert not any(weight.requires_grad for weight in ready.parameters())


def test_a_prepared_network_cannot_be_cast() -> None:
    ready = prepare(load_classifier("digits", num_classes=10, shape=(1, 32, 32)), CPU)
    with pytest.raises(TypeError, match="prepare the original"):
        ready.to(torch.bfloat16)


def test_hooks_are_kept() -> None:
    network = load_classifier("digits", num_classes=10, shape=(1, 32, 32))
    calls: list[int] = []
    network.body.head.register_forward_hook(lambda *_: calls.append(1))
    prepare(network, CPU)(torch.rand(1, 1, 32, 32))
    assert calls == [1]


def test_refusals() -> None:
    with pytest.raises(UserError, match="--device quantum cannot be used here"):
        pick_device("quantum")
    with pytest.raises(UserError, match="unknown precision 'fp8'"):
        check_precision("fp8", CPU)
    with pytest.raises(UserError, match="tf32 exists on CUDA devices only"):
        check_precision("tf32", CPU)


def test_versions_name_what_changes_results() -> None:
    assert {"nimfast", "python", "torch", "timm", "triton"} <= set(versions())
