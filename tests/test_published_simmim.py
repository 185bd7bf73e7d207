# SPDX-License-Identifier: Apache-2.0
"""Classifiers on SimMIM's encoders in others' files; timm's BEiT and Swin are the judges."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as from_swins_files
from torch import Tensor, nn

import nimfast
from nimfast import convert
from nimfast.data import digits
from nimfast.errors import UserError
from nimfast.models import SimMIM, SimMIMArchitecture, SimMIMClassifier
from nimfast.models.checkpoint import read_checkpoint
from nimfast.models.published import from_published, to_published
from nimfast.options import Hints
from train.classifiers import initial_model
from train.finetune import Finetune

M = TypeVar("M", bound=nn.Module)
SWIN = SimMIMArchitecture((32, 32), 3, 2, 24, (2, 2), (2, 4), 4)
VITS = {
    shared: SimMIMArchitecture((32, 32), 3, 8, 48, (2,), (3,), None, shared)
    for shared in (True, False)
}
ARCHITECTURES = {"swin": SWIN, "shared": VITS[True], "each": VITS[False]}


def stirred(model: M) -> M:
    """`model` in eval mode with no weight at rest, relative positions and norms included."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def beit(shared: bool) -> Beit:
    return Beit(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5,
        init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared, global_pool="avg",
    )  # fmt: skip


def swin() -> SwinTransformer:
    return SwinTransformer(
        img_size=32, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4,
        num_classes=5,
    )  # fmt: skip


@pytest.fixture(params=ARCHITECTURES)
def classifier(request: pytest.FixtureRequest) -> SimMIMClassifier:
    return stirred(SimMIMClassifier(ARCHITECTURES[request.param], 5))


@pytest.mark.parametrize("shared", [True, False])
def test_vits_of_beit(shared: bool) -> None:
    theirs = stirred(beit(shared))
    model = from_published(theirs.state_dict(), "file", Hints())
    assert isinstance(model, SimMIMClassifier) and model.arch == VITS[shared]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(model(images), expected)
        with torch.autocast("cpu", torch.bfloat16):  # biases of one type with what they join
            torch.testing.assert_close(model(images).float(), expected, rtol=0.05, atol=0.05)


def test_files_of_swin() -> None:
    model = stirred(SimMIMClassifier(SWIN, 5))
    theirs = swin().eval()
    published = to_published(model)
    assert published["layers.1.blocks.1.attn.relative_position_index"].shape == (16, 16)
    theirs.load_state_dict(from_swins_files(published, theirs))  # Swin's own names to timm's
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images))
    with pytest.raises(UserError, match=r"it has no 'head\.weight'"):  # timm's own names
        from_published(theirs.state_dict(), "file", Hints(image_size=(32, 32)))


def test_there_and_back(classifier: SimMIMClassifier, tmp_path: Path) -> None:
    state = to_published(classifier)
    assert not any(name.startswith("encoder.") for name in state)
    torch.save({"model": state, "epoch": 99}, tmp_path / "published.pth")
    hints = Hints(mean=(0.3,) * 3, std=(0.4,) * 3)
    ours, again = tmp_path / "ours.safetensors", tmp_path / "again.pth"
    convert.main(convert.Config(tmp_path / "published.pth", ours, hints, sigma=0.25))
    convert.main(convert.Config(ours, again))
    written = torch.load(again, weights_only=True)["model"]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    images = torch.rand(2, 3, 32, 32)
    for file in (ours, tmp_path / "published.pth"):
        loaded = nimfast.load(file, num_classes=5, shape=(3, 32, 32), hints=hints)
        with torch.no_grad():
            assert torch.equal(loaded(images), classifier((images - 0.3) / 0.4))
    assert nimfast.load(ours).sigma == 0.25


def test_fine_tuning_goes_on_from_one(tmp_path: Path) -> None:
    arch = SimMIMArchitecture((32, 32), 1, 8, 48, (2,), (3,), None, shared_bias=False)
    model = stirred(SimMIMClassifier(arch, 10))
    torch.save(to_published(model), tmp_path / "published.pth")
    ours = tmp_path / "ours.safetensors"
    hints = Hints(mean=(0.3,), std=(0.4,))
    convert.main(convert.Config(tmp_path / "published.pth", ours, hints))
    settings = Finetune(data="digits", out=tmp_path / "x.safetensors", init=ours)
    start = initial_model(settings, digits.load("train"), *read_checkpoint(ours))
    assert start.arch == arch
    assert all(
        torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True)
    )


def bigger(table: Tensor, old: int, new: int) -> Tensor:
    """Rows of distances in a square window of side `old` -> of side `new`."""
    image = table.T.reshape(1, -1, 2 * old - 1, 2 * old - 1)
    return F.interpolate(image, 2 * new - 1, mode="bicubic").flatten(2)[0].T


@pytest.mark.parametrize("kind", [SimMIM, SimMIMClassifier])
def test_windows_are_resized(kind: type[SimMIM] | type[SimMIMClassifier]) -> None:
    """SimMIM's step from 192 pixels and windows of 6 to 224 and 7, smaller."""
    arch = SimMIMArchitecture((24, 24), 3, 2, 24, (2, 2), (2, 4), 3)
    model = stirred(SimMIMClassifier(arch, 5) if kind is SimMIMClassifier else SimMIM(arch))
    hints = Hints(image_size=(40, 40), window=5)
    resized = from_published(to_published(model), "file", hints)
    assert isinstance(resized, kind) and resized.arch.image_size == (40, 40)
    assert resized.arch.window == 5
    tables = {n: v for n, v in model.state_dict().items() if n.endswith("bias_table")}
    assert len(tables) == 4
    for name, table in tables.items():
        torch.testing.assert_close(resized.state_dict()[name], bigger(table, 3, 5))
    kept = from_published(to_published(model), "file", Hints(image_size=(40, 40)))
    assert isinstance(kept, kind) and kept.arch.window == 3
    assert all(torch.equal(kept.state_dict()[name], table) for name, table in tables.items())


def test_windows_do_not_exceed_their_stage() -> None:
    """At 16 pixels the second stage has 4 x 4 tokens, fewer than a window of 5."""
    model = stirred(SimMIMClassifier(SWIN, 5))
    state = to_published(model)
    resized = from_published(state, "file", Hints(image_size=(16, 16), window=5)).state_dict()
    name = "encoder.stages.{}.blocks.0.attn.relative_position_bias_table"
    own = model.state_dict()
    torch.testing.assert_close(resized[name.format(0)], bigger(own[name.format(0)], 4, 5))
    assert torch.equal(resized[name.format(1)], own[name.format(1)])


def test_biases_of_each_block_are_resized() -> None:
    model = stirred(SimMIMClassifier(VITS[False], 5))
    resized = from_published(to_published(model), "file", Hints(image_size=(48, 48)))
    for number in range(2):
        name = f"encoder.blocks.{number}.attn.relative_position_bias_table"
        old, new = model.state_dict()[name], resized.state_dict()[name]
        torch.testing.assert_close(new[:-3], bigger(old[:-3], 4, 6))
        assert torch.equal(new[-3:], old[-3:])


@pytest.mark.parametrize("window", [None, 4])
def test_oblong_images(window: int | None) -> None:
    """1 x 5 places have as many distances as 3 x 3: the size that is given decides."""
    shape = ((8, 40), 3, 8, 48, (1,), (3,), window)
    model = stirred(SimMIMClassifier(SimMIMArchitecture(*shape), 5))
    state = to_published(model)
    read = from_published(state, "file", Hints(image_size=(8, 40), window=window))
    images = torch.randn(2, 3, 8, 40)
    with torch.no_grad():
        assert torch.equal(read(images), model(images))


def test_refusals() -> None:
    each = to_published(SimMIMClassifier(VITS[False], 5))
    swins = to_published(SimMIMClassifier(SWIN, 5))
    table = "blocks.1.attn.relative_position_bias_table"
    index = "blocks.0.attn.relative_position_index"
    mask = "layers.0.blocks.1.attn_mask"

    def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if name not in names}

    for state, given, message in (
        (without(each, "fc_norm.weight"), Hints(), r"it has no 'fc_norm\.weight'"),
        (without(each, "head.weight"), Hints(), r"it has no 'head\.weight'"),
        (without(each, "head.bias"), Hints(), r"it has no 'head\.bias'"),
        (without(each, table), Hints(), rf"it has no '{table}'"),
        (without(each, "blocks.0.gamma_1"), Hints(), r"it has no 'blocks\.0\.gamma_1'"),
        (without(swins, "norm.bias"), Hints(), r"it has no 'norm\.bias'"),
        ({"layers.0.weight": each["head.weight"]}, Hints(), "does not say what network it is for"),
        (without(swins, mask), Hints(), "does not say for what images it is; give their --image"),
        ({**each, "pos_embed": each["cls_token"]}, Hints(), "the model has no 'pos_embed'"),
        (
            {**each, "blocks.0.attn.qkv.bias": each["cls_token"]},
            Hints(),
            r"the model has no 'blocks\.0\.attn\.qkv\.bias'",
        ),
        ({**each, table: each[table][:, :1]}, Hints(), rf"'{table}' is \[52, 1\] in the file and"),
        ({**each, index: each[index] + 1}, Hints(), "relative_position_index' has other values"),
        ({**swins, mask: swins[mask] - 1}, Hints(), "attn_mask' has other values"),
        ({**swins, "mask_token": swins["norm.bias"]}, Hints(), "the model has no 'mask_token'"),
        (each, Hints(window=4), "is no Swin Transformer and has no --window"),
        (swins, Hints(window=0), "--window must be at least 1"),
        (swins, Hints(image_size=(30, 32)), r"image size \(30, 32\) is no multiple of 4"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            from_published(state, "file", given)
        assert "\n" not in str(caught.value)
