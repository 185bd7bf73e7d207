# SPDX-License-Identifier: Apache-2.0
"""Devices, precisions, and networks made ready: the same function, packed."""

from collections import Counter

import pytest
import timm
import torch
from torch import nn

from nimfast import packed as packing
from nimfast.errors import UserError
from nimfast.models import load_classifier
from nimfast.packed import FusedBlock, FusedLinear, PackedAttention, PackedBlock, PackedLinear
from nimfast.runtime import DTYPES, Precision, check_precision, pick_device, prepare, versions

CPU = torch.device("cpu")
PACKED = (FusedBlock, FusedLinear, PackedBlock, PackedAttention, PackedLinear)


def kinds(module: nn.Module) -> dict[type, int]:
    """How many layers of each packed class there are."""
    found = Counter(type(layer) for layer in module.modules())
    return {kind: found[kind] for kind in PACKED if found[kind]}


@pytest.fixture(params=["fused", "packed"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks by our kernel, and layer by layer as where that does not serve."""
    if request.param == "packed":
        monkeypatch.setattr(packing, "can_serve", lambda dtype: False)
    elif not packing.can_serve(torch.float32) or not packing.can_serve(torch.bfloat16):
        pytest.skip("the kernel does not serve here")
    return str(request.param)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prepared_networks_compute_the_same_function(blocks: str, precision: Precision) -> None:
    torch.manual_seed(0)
    networks = {
        "ours": (load_classifier("digits", num_classes=10, shape=(1, 32, 32)), (1, 32, 32), 1),
        "timm": (
            timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3).eval(),
            (3, 32, 32),
            3,
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
    for name, (network, shape, found) in networks.items():
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
        kind = FusedBlock if blocks == "fused" else PackedBlock
        assert kinds(ready).get(kind, 0) == found, name
        assert not kinds(network), name
        if precision == "fp32":
            assert all(
                torch.equal(value, before[key]) for key, value in network.state_dict().items()
            )
        assert not any(weight.requires_grad for weight in ready.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_input_gradients_are_those_of_the_network(blocks: str, precision: Precision) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3).eval()
    network.requires_grad_(False)
    images, weights = torch.rand(5, 3, 32, 32), torch.randn(5, 1000)

    def gradient(of: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        leaf = images.detach().to(dtype).requires_grad_()
        (found,) = torch.autograd.grad((of(leaf).float() * weights).sum(), leaf)
        return found.float()

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ready = prepare(network, CPU, precision)
    exact, ours = gradient(network, torch.float32), gradient(ready, dtype)
    plain = gradient(network.to(dtype), dtype)
    rounding = float((plain - exact).abs().max())
    bound = 2 * rounding if precision == "bf16" else 1e-4 * float(exact.abs().max())
    assert 0 < float((ours - exact).abs().max()) <= bound
    assert torch.equal(gradient(ready, dtype), ours)
    layers = {PackedBlock: 3, PackedAttention: 3, PackedLinear: 12}
    assert kinds(ready) == ({FusedBlock: 3} if blocks == "fused" else layers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_of_our_vit_do_not_depend_on_the_batch(precision: Precision) -> None:
    if not packing.can_serve(DTYPES[precision]):
        pytest.skip("the kernel does not serve here")
    ready = prepare(load_classifier("digits", num_classes=10, shape=(1, 32, 32)), CPU, precision)
    images = torch.rand(67, 1, 32, 32).to(DTYPES[precision])
    with torch.inference_mode():
        together = ready(images)
        for rows in (1, 2, 32, 66):
            parts = torch.cat([ready(part) for part in images.split(rows)])
            assert torch.equal(parts, together), rows


def test_packed_layers_have_one_derivative() -> None:
    # Of a large product; a small one is torch's own, which has all.
    layer = PackedLinear(nn.Linear(256, 256).requires_grad_(False), gelu=True)
    block = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).blocks
    ready = prepare(block, CPU)
    for module, shape in ((layer, (128, 256)), (ready, (3, 5, 192))):
        x = torch.randn(*shape, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_small_and_large_products_are_one_function() -> None:
    torch.manual_seed(0)
    for gelu in (False, True):
        linear = nn.Linear(96, 128).requires_grad_(False)
        layer = PackedLinear(linear, gelu)
        x, weights = torch.randn(512, 96, requires_grad=True), torch.randn(512, 128)
        wanted = nn.functional.gelu(linear(x)) if gelu else linear(x)
        (slope,) = torch.autograd.grad((wanted * weights).sum(), x)
        for rows in (8, 200, 256, 257, 512):  # 256 rows are the most that stay plain
            leaf = x.detach()[:rows].requires_grad_()
            out = layer(leaf)
            plain = "_Linear" not in type(out.grad_fn).__name__
            assert plain == (rows <= 256), rows
            (found,) = torch.autograd.grad((out * weights[:rows]).sum(), leaf)
            assert torch.allclose(out, wanted[:rows], atol=1e-5)
            assert torch.allclose(found, slope[:rows], atol=1e-5)
            with torch.no_grad():
                assert torch.allclose(layer(leaf), wanted[:rows], atol=1e-5)


def test_a_prepared_network_is_in_eval_mode_throughout() -> None:
    ready = prepare(load_classifier("digits", num_classes=10, shape=(1, 32, 32)), CPU)
    assert kinds(ready)
    assert not any(module.training for module in ready.modules())


def test_a_block_takes_tokens_of_any_strides(blocks: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1).eval()
    block, ready = network.blocks.requires_grad_(False), prepare(network.blocks, CPU)
    x = torch.randn(5, 3, 192).transpose(0, 1).requires_grad_()
    weights = torch.randn(5, 3, 192).transpose(0, 1)
    slopes = [torch.autograd.grad((of(x) * weights).sum(), x)[0] for of in (block, ready)]
    assert torch.allclose(slopes[0], slopes[1], atol=1e-4)
    (mean,) = torch.autograd.grad(ready(x).mean(), x)  # a gradient that is an expanded number
    assert torch.allclose(mean, torch.autograd.grad(block(x).mean(), x)[0], atol=1e-6)


def test_a_mask_is_obeyed(blocks: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2).eval()
    ready = prepare(network, CPU)
    mask = torch.rand(17, 17) > 0.5
    mask.fill_diagonal_(True)
    with torch.inference_mode():
        x = torch.rand(2, 3, 32, 32)
        for options in ({"attn_mask": mask}, {"is_causal": True}):
            assert torch.allclose(ready(x, **options), network(x, **options), atol=1e-5)
            assert not torch.allclose(ready(x), network(x, **options), atol=1e-3)


def test_layers_that_differ_stay_as_they_are(blocks: str) -> None:
    torch.manual_seed(0)
    fused, packed = blocks == "fused", {PackedBlock: 2, PackedAttention: 2, PackedLinear: 8}
    for options, left in (
        ({"init_values": 0.1}, {FusedBlock: 2} if fused else {PackedAttention: 2, PackedLinear: 8}),
        ({"qk_norm": True}, {FusedLinear: 6, PackedLinear: 2} if fused else {PackedLinear: 8}),
        ({"drop_path_rate": 0.5}, {FusedBlock: 2} if fused else packed),
    ):
        network = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, **options
        ).eval()
        ready = prepare(network, CPU)
        assert kinds(ready) == left, options
        with torch.inference_mode():
            x = torch.rand(2, 3, 32, 32)
            assert torch.allclose(ready(x), network(x), atol=1e-5), options


def test_a_prepared_network_cannot_be_cast() -> None:
    ready = prepare(load_classifier("digits", num_classes=10, shape=(1, 32, 32)), CPU)
    with pytest.raises(TypeError, match="prepare the original"):
        ready.to(torch.bfloat16)


def test_hooks_are_kept() -> None:
    network = load_classifier("digits", num_classes=10, shape=(1, 32, 32))
    block = network.body.blocks[0]
    calls: list[int] = []
    for layer in (network.body.head, block, block.norm1, block.attn, block.attn.proj, block.mlp):
        layer.register_forward_hook(lambda *_: calls.append(1))
    prepare(network, CPU)(torch.rand(1, 1, 32, 32))
    assert len(calls) == 6


def test_refusals() -> None:
    with pytest.raises(UserError, match="--device quantum cannot be used here"):
        pick_device("quantum")
    with pytest.raises(UserError, match="unknown precision 'fp8'"):
        check_precision("fp8", CPU)
    with pytest.raises(UserError, match="tf32 exists on CUDA devices only"):
        check_precision("tf32", CPU)


def test_versions_name_what_changes_results() -> None:
    assert {"nimfast", "python", "torch", "timm", "triton"} <= set(versions())
