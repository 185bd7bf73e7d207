# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints: the same values, losses and gradients; every refusal."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference_files import hints, read_case
from torch import Tensor

from nimfast.errors import UserError
from nimfast.models import (
    MAE,
    Architecture,
    PatchModel,
    SimMIM,
    SimMIMArchitecture,
    ViT,
    architecture,
    load_classifier,
    patchify,
    removed_mask,
    simmim_architecture,
    take,
    unpatchify,
)
from nimfast.models.checkpoint import read_checkpoint
from nimfast.models.infer import Hints, infer
from nimfast.models.published import from_published, to_published
from nimfast.models.vit import Trunk, sincos_positions
from nimfast.ops import recon_loss
from train.cpu import speed_up

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SMALL = Architecture(
    image_size=(32, 32),
    patch=8,
    width=64,
    depth=2,
    heads=1,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=1,
)
TINY = architecture("digits", (1, 16, 16))
SWIN = SimMIMArchitecture((32, 32), 3, 2, 24, (2, 2), (2, 4), 4)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def gradients(model: PatchModel) -> dict[str, Tensor]:
    """Gradients under the published names: the importer's change of layout is linear."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    return to_published(model)


def compare_gradients(model: PatchModel, content: dict[str, Tensor]) -> None:
    expected = {k.removeprefix("grad."): v for k, v in content.items() if k.startswith("grad.")}
    assert expected
    actual = gradients(model)
    for name, value in expected.items():
        close(actual[name], value)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_masked_autoencoder(shared_reference: Path, norm_pix: bool, trained: bool) -> None:
    name = f"mae_normpix{norm_pix:d}"
    content, state, case = read_case(shared_reference, name)
    model = from_published(state, name, hints(case))
    assert isinstance(model, MAE) and model.arch.positions == "fixed"
    if trained:
        speed_up(model, torch.device("cpu"), "fp32")
    keep = content["mask_scores"].argsort(dim=1)[:, :4].sort(1).values
    rows = patchify(content["imgs"], 8)
    prediction = model(take(rows, keep), keep)
    close(prediction, content["pred"])
    mask = removed_mask(keep, 16)
    loss = recon_loss(prediction, content["imgs"], patch=8, norm_pix=norm_pix, mask=mask)
    close(loss, content["loss"])
    loss.backward()
    compare_gradients(model, content)


@pytest.mark.parametrize("name", ["dmae_224", "dmae_32", "dmae_32_antialias"])
def test_denoising_masked_autoencoder(shared_reference: Path, name: str) -> None:
    content, state, case = read_case(shared_reference, name)
    model = from_published(state, name, hints(case)).eval()

    def enlarged(images: Tensor) -> Tensor:
        if images.shape[-1] != 224:
            images = F.interpolate(images, 224, mode="bicubic", antialias=case["antialias"])
        return (images - MEAN) / STD

    keep = content["mask_scores"].argsort(dim=1)[:, :4].sort(1).values
    noisy = model.rows(enlarged(content["imgs"] + case["sigma"] * content["noise"]))
    with torch.no_grad():
        prediction = model(take(noisy, keep), keep)
    close(prediction, content["pred"])
    loss = recon_loss(prediction, enlarged(content["imgs"]), patch=model.arch.patch, norm_pix=True)
    close(loss, content["loss"])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_noisy_image_modelling(shared_reference: Path, norm_pix: bool, trained: bool) -> None:
    name = f"nim_mae_normpix{norm_pix:d}"
    content, state, case = read_case(shared_reference, name)
    model = from_published(state, name, hints(case))
    if trained:
        speed_up(model, torch.device("cpu"), "fp32")
    noisy = content["imgs"] + case["sigma_255"] / 255 * content["noise"] / STD
    close(noisy, content["noisy"])
    prediction = model(model.rows(noisy))
    target = model.rows(content["imgs"])
    loss = recon_loss(prediction, content["imgs"], patch=8, norm_pix=norm_pix)
    close(loss, content["loss"])
    if norm_pix:  # the reference un-normalises with the statistics of the clean patches
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        pixels = prediction * (variance + 1e-6).sqrt() + mean
    else:
        pixels = prediction
    close(unpatchify(pixels, 8, (32, 32)), content["rec"])
    loss.backward()
    compare_gradients(model, content)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_classifier(shared_reference: Path, tmp_path: Path, pooling: str) -> None:
    name = f"dmae_vit_gap{int(pooling == 'mean')}"
    content, state, case = read_case(shared_reference, name)
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match="does not store its normalisation; ImageNet's"):
        classifier = load_classifier(
            str(tmp_path / "c.pth"), num_classes=10, shape=(3, 32, 32), hints=hints(case)
        )
    body = classifier.body
    assert isinstance(body, ViT) and body.pooling == pooling and body.arch.positions == "stored"
    with torch.no_grad():
        close(classifier(content["imgs"]), content["logits"])
        rows = body.rows((content["imgs"] - MEAN) / STD)
        close(body.features(rows), content["features"])
        close(body(rows), content["logits"])


def test_published_files_are_reproduced(shared_reference: Path) -> None:
    for name in ("mae_normpix1", "dmae_vit_gap0", "dmae_vit_gap1", "simmim_vit", "simmim_swin"):
        _, state, case = read_case(shared_reference, name)
        given = Hints() if name.startswith("simmim") else hints(case)
        written = to_published(from_published(state, name, given))
        assert written.keys() == state.keys()
        assert all(torch.equal(written[key], state[key]) for key in state)


def test_encoder_only_files() -> None:
    model = MAE(SMALL)
    state = {k: v for k, v in to_published(model).items() if not k.startswith(("decoder", "mask"))}
    trunk = from_published(state, "file", Hints())
    assert isinstance(trunk, Trunk)
    rows, keep = torch.rand(2, 3, 192), torch.tensor([[0, 5, 9], [1, 2, 15]])
    with torch.no_grad():
        torch.testing.assert_close(trunk(rows, keep), model.norm(model.encode(rows, keep)))


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large", "huge"])
def test_architecture_is_read_off_the_shapes(name: str) -> None:
    arch = architecture(name, (1, 112, 112), 28)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in to_published(MAE(arch)).items()}
    # Stand-ins without memory of their own; the positions are real, because their values count.
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    state["pos_embed"] = sincos_positions((4, 4), arch.width, True)[None]
    state["decoder_pos_embed"] = sincos_positions((4, 4), arch.decoder_width, True)[None]
    header, _ = infer(state, "file", Hints())
    assert header["kind"] == "autoencoder" and Architecture(**header["architecture"]) == arch
    header, _ = infer(state, "file", Hints(heads=2, decoder_heads=4))
    assert (header["architecture"]["heads"], header["architecture"]["decoder_heads"]) == (2, 4)


def test_swin_base_is_read_off_the_shapes() -> None:
    arch = simmim_architecture("swin-base", (3, 192, 192))
    assert arch.window == 6
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in to_published(SimMIM(arch)).items()}
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    header, _ = infer(state, "file", Hints())
    assert SimMIMArchitecture(**header["architecture"]) == arch
    without = {key: value for key, value in state.items() if not key.endswith("attn_mask")}
    with pytest.raises(UserError, match="does not say for what images it is; give their --image"):
        infer(without, "file", Hints())
    header, _ = infer(without, "file", Hints(image_size=(192, 384)))
    assert header["architecture"]["image_size"] == [192, 384]


def test_positions_are_resized_bicubically() -> None:
    state = to_published(MAE(SMALL))
    ramp = torch.linspace(0, 1, 4).expand(4, 4).reshape(1, 16, 1)  # grows from left to right
    state["pos_embed"] = torch.cat([torch.full((1, 1, 64), 7.0), ramp.expand(1, 16, 64)], 1)
    model = from_published(state, "file", Hints(image_size=(64, 48)))  # 8 x 6 patches
    assert model.arch.image_size == (64, 48) and model.arch.positions == "stored"
    table = model.positions[1:].view(8, 6, 64)
    assert (model.positions[0] == 7).all()
    # The cubic convolution (a = -0.75) of 0, 1/3, 2/3, 1, edges repeated, at -1/6, 1/2, 7/6, ...
    expected = F.interpolate(ramp.view(1, 1, 4, 4), (8, 6), mode="bicubic")[0, 0, 0]
    assert (expected.diff() > 0).all() and abs(expected[2] + expected[3] - 1) < 1e-6
    torch.testing.assert_close(table, expected[None, :, None].expand(8, 6, 64))
    assert model(torch.rand(1, 48, 192)).shape == (1, 48, 192)


def test_relative_positions_are_resized_bicubically() -> None:
    vit = SimMIM(SimMIMArchitecture((32, 32), 3, 8, 64, (2,), (4,)))
    table = vit.encoder.rel_pos_bias.relative_position_bias_table
    with torch.no_grad():  # 7 x 7 distances, growing downwards, and three for the class token
        table[:49] = torch.linspace(0, 1, 7).repeat_interleave(7)[:, None]
        table[49:] = torch.tensor([2.0, 3.0, 4.0])[:, None]
    resized = from_published(to_published(vit), "file", Hints(image_size=(48, 48)))
    wider = resized.encoder.rel_pos_bias.relative_position_bias_table
    assert wider.shape == (11 * 11 + 3, 4)
    assert wider[:121].view(11, 11, 4).diff(dim=0).min() > 0
    torch.testing.assert_close(wider[60], torch.full((4,), 0.5))  # no distance: the centre
    assert wider[121:, 0].tolist() == [2, 3, 4]
    assert resized(torch.rand(1, 36, 192), torch.rand(1, 36) < 0.5).shape == (1, 36, 192)


def test_files_of_other_precision_and_from_several_devices(tmp_path: Path) -> None:
    model = ViT(SMALL, 5)
    state = {f"module.{k}": v.half() for k, v in to_published(model).items()}
    torch.save({"state_dict": state}, tmp_path / "half.pt")
    loaded = from_published(read_checkpoint(tmp_path / "half.pt")[0], "file", Hints())
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.patch_embed.weight, model.patch_embed.weight.half().float())


def test_settings_of_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CfgNode(dict):  # type: ignore[type-arg]
        """As SimMIM's files hold it: a dict with attributes."""

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package = types.ModuleType("yacs.config")
    package.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", package)
    config = CfgNode(MODEL=CfgNode(TYPE="swin"))
    config.__dict__["_immutable"] = True
    state = to_published(SimMIM(SWIN))
    torch.save({"model": state, "config": config}, tmp_path / "simmim.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    read, header = read_checkpoint(tmp_path / "simmim.pth")
    assert not header and all(torch.equal(read[key], state[key]) for key in state)


def change(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = {**state, **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in changed.items() if value is not None}


def test_refusals(tmp_path: Path) -> None:
    mae, vit = to_published(MAE(SMALL)), to_published(ViT(SMALL, 5))
    swin = to_published(SimMIM(SWIN))
    odd = to_published(MAE(Architecture(**{**vars(SMALL), "width": 48, "heads": 3})))
    index = "encoder.layers.0.blocks.0.attn.relative_position_index"
    lines = torch.zeros(1, 18, 64)
    for state, given, message in (
        ({"weight": lines}, Hints(), "does not say what network it is for"),
        (change(mae, norm__bias=None), Hints(), "it has no 'norm.bias'"),
        (change(mae, pos_embed=None), Hints(), "it has no 'pos_embed'"),
        (
            change(mae, pos_embed=lines[0]),
            Hints(),
            r"'pos_embed' is \[18, 64\] in the file",
        ),
        (change(mae, pos_embed=lines), Hints(), "17 positions, which form no square; give"),
        (change(vit, blocks__1__mlp__fc1__weight=lines[0]), Hints(), r"fc1.weight' is \[18, 64\]"),
        (
            change(vit, blocks__1__ls1__gamma=lines),
            Hints(),
            "the model has no 'blocks.1.ls1.gamma'",
        ),
        (change(vit, norm__bias=lines), Hints(), "the model has no 'norm.bias'"),
        (change(swin, decoder__0__bias=None), Hints(), "it has no 'decoder.0.bias'"),
        ({**swin, index: swin[index] + 1}, Hints(), "relative_position_index' has other values"),
        (odd, Hints(), "how many heads width 48 has; give --heads"),
        (odd, Hints(heads=5), "a multiple of 4 and of its 5 heads"),
        (odd, Hints(heads=0), "--heads must be at least 1"),
        (mae, Hints(image_size=(30, 32)), r"image size \(30, 32\) is no multiple of patch 8"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            from_published(state, "file", given)
        assert "\n" not in str(caught.value)


def test_published_classifiers_on_the_command_line(tmp_path: Path) -> None:
    like = {"num_classes": 5, "shape": (1, 16, 16)}
    model = ViT(TINY, 5).eval()
    torch.save({"model": to_published(model)}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match="does not store its normalisation; convert it with --mean"):
        load_classifier(str(tmp_path / "vit.pth"), **like)
    hint = Hints(mean=(0.3,), std=(0.4,))
    loaded = load_classifier(str(tmp_path / "vit.pth"), **like, hints=hint)
    images = torch.rand(2, 1, 16, 16)
    assert loaded.mean == (0.3,) and loaded.sigma is None
    assert loaded.header["architecture"]["positions"] == "fixed"
    assert torch.equal(loaded(images), model((images - 0.3) / 0.4))
    torch.save(to_published(MAE(TINY)), tmp_path / "mae.pth")
    with pytest.raises(
        UserError, match="is a pretrained autoencoder, not a classifier; convert it"
    ):
        load_classifier(str(tmp_path / "mae.pth"), **like, hints=Hints(decoder_heads=4))
