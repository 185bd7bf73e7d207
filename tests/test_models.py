# SPDX-License-Identifier: Apache-2.0
"""Networks against the published implementations; checkpoints; every refusal of --model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nimfast.data import digits
from nimfast.errors import UserError
from nimfast.models import (
    ARCHITECTURES,
    MAE,
    Architecture,
    PatchModel,
    ViT,
    architecture,
    load_classifier,
    patchify,
    removed_mask,
    take,
    unpatchify,
)
from nimfast.models.checkpoint import (
    build,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    weights_hash,
)
from nimfast.models.load import EMBEDDED
from nimfast.models.published import from_published
from nimfast.models.vit import sincos_positions
from nimfast.ops import recon_loss
from nimfast.options import Hints

REFERENCE = Path(__file__).parent / "reference"
SMALL = Architecture(
    image_size=(32, 32),
    patch=8,
    width=48,
    depth=2,
    heads=3,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=4,
)
TINY = architecture("digits", (1, 16, 16))
HEADER = {"mean": [0.3], "std": [0.4], "sigma": 0.5}


def published(name: str) -> tuple[PatchModel, dict[str, Tensor]]:
    """The model of a reference file, and the file's tensors."""
    content = load_file(REFERENCE / f"{name}.safetensors")
    state = {k.removeprefix("state."): v for k, v in content.items() if k.startswith("state.")}
    return from_published(state, name, Hints(heads=3, decoder_heads=4)).eval(), content


def test_patch_rows_are_row_column_channel() -> None:
    images = torch.rand(2, 3, 16, 24)
    rows = patchify(images, 8)
    assert rows.shape == (2, 6, 192)
    row, column, channel = 5, 3, 2
    value = images[1, channel, 8 + row, 16 + column]  # patch 5 stands in row 1, column 2
    assert rows[1, 5, (row * 8 + column) * 3 + channel] == value
    assert torch.equal(unpatchify(rows, 8, (16, 24)), images)


def test_masked_autoencoder_equals_the_published_one() -> None:
    model, ref = published("mae_normpix1")
    assert isinstance(model, MAE) and model.arch == SMALL
    assert torch.equal(model.positions, ref["state.pos_embed"][0])
    assert torch.equal(model.decoder_positions, ref["state.decoder_pos_embed"][0])
    keep = ref["mask_scores"].argsort(dim=1)[:, :4].sort(1).values
    with torch.no_grad():
        prediction = model(take(model.rows(ref["imgs"]), keep), keep)
    torch.testing.assert_close(prediction, ref["pred"], rtol=1e-4, atol=1e-5)
    mask = removed_mask(keep, SMALL.patches)
    loss = recon_loss(prediction, ref["imgs"], patch=8, norm_pix=True, mask=mask)
    torch.testing.assert_close(loss, ref["loss"], rtol=1e-5, atol=1e-6)


def test_classifier_equals_the_published_one() -> None:
    model, ref = published("dmae_vit_gap1")
    assert isinstance(model, ViT) and model.pooling == "mean"
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    images = (ref["imgs"] - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(model(images), ref["logits"], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(patchify(images, 8)), model(images))


def test_class_token_pooling() -> None:
    model = ViT(SMALL, 10, pooling="class").eval()
    nn.init.normal_(model.head.weight)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        token = model.encode(model.rows(images))[:, 0]
        torch.testing.assert_close(model(images), model.head(model.norm(token)))
    with pytest.raises(ValueError, match="needs an architecture with a class token"):
        ViT(TINY, 10, pooling="class")


def test_rows_have_their_own_places() -> None:
    model = MAE(SMALL).eval()
    rows = torch.rand(2, 16, 192)
    keep = torch.tensor([[0, 3, 9], [1, 2, 15]])
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        seen = model(take(rows, keep), keep)
        # Another order of the same rows and places is the same image ...
        torch.testing.assert_close(model(take(rows, keep[:, order]), keep[:, order]), seen)
        # ... and the same rows at other places are another.
        assert not torch.allclose(model(take(rows, keep), keep[:, order]), seen)
    with pytest.raises(ValueError, match="rows must be those of all 16 patches without keep"):
        model(take(rows, keep))


def test_stored_positions_are_saved_and_not_trained(tmp_path: Path) -> None:
    model = MAE(replace(SMALL, positions="stored"))
    model.positions.normal_()
    save_checkpoint(tmp_path / "a.safetensors", model, HEADER)
    state, header = read_checkpoint(tmp_path / "a.safetensors")
    again = build(header)
    load_weights(again, state, "a")
    assert torch.equal(again.positions, model.positions)
    assert "positions" not in dict(again.named_parameters())
    assert "positions" not in MAE(SMALL).state_dict()


def test_positions_of_an_oblong_image() -> None:
    table = sincos_positions((2, 3), 8, class_token=True)
    assert table.shape == (7, 8)
    assert table[0].abs().max() == 0
    row, column = 1, 2
    expected = [torch.tensor(f * x) for x in (column, row) for f in (1.0, 0.01)]
    values = [expected[0].sin(), expected[1].sin(), expected[0].cos(), expected[1].cos()]
    torch.testing.assert_close(table[1 + 5, :4], torch.stack(values))


def test_encoding_all_patches_equals_keeping_all() -> None:
    model = MAE(SMALL).eval()
    rows = torch.rand(2, 16, 192)
    everything = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(rows), model(rows, everything))


def test_removed_patches() -> None:
    mask = removed_mask(torch.tensor([[0, 1], [1, 3]]), 4)
    assert mask.tolist() == [[False, False, True, True], [True, False, True, False]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_named_sizes(name: str) -> None:
    arch = ARCHITECTURES[name]
    # Blocks: attention 4 w^2, feed-forward 8 w^2, and 13 w of biases and norms.
    blocks = arch.depth * (12 * arch.width**2 + 13 * arch.width)
    with torch.device("meta"):
        model = ViT(arch, 10)
    assert sum(p.numel() for p in model.blocks.parameters()) == blocks
    with pytest.raises(ValueError, match="no multiple of patch"):
        architecture(name, (3, 30, 30))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(1)
    model = ViT(TINY, 10).eval()
    nn.init.normal_(model.head.weight)
    save_checkpoint(path, model, HEADER)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]  # nothing left behind
    loaded = load_classifier(str(path), num_classes=10, shape=(1, 16, 16))
    assert not loaded.training
    assert (loaded.mean, loaded.std, loaded.sigma) == ((0.3,), (0.4,), 0.5)
    assert loaded.weights_hash == weights_hash(model)
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model((images - 0.3) / 0.4))
        assert torch.equal(loaded.body((images - 0.3) / 0.4), loaded(images))


def test_hash_sees_values_and_names() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(other)
    assert weights_hash(nn.Sequential(one)) != weights_hash(one)
    with torch.no_grad():
        other.bias[0] += 1e-6
    assert weights_hash(one) != weights_hash(other)


def test_torch_state_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n\n\ndef linear():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 10))\n\n\nvalue = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec, like = "my_models:linear", {"num_classes": 10, "shape": (1, 4, 4)}
    weight, bias = torch.rand(10, 16), torch.rand(10)
    for content in (
        {"1.weight": weight, "1.bias": bias},
        {"model": {"1.weight": weight, "1.bias": bias}},
        {"epoch": 3, "state_dict": {"module.1.weight": weight, "module.1.bias": bias}},
    ):
        torch.save(content, tmp_path / "state.pt")
        loaded = load_classifier(spec, checkpoint=tmp_path / "state.pt", **like)
        images = torch.rand(2, 1, 4, 4)
        torch.testing.assert_close(loaded(images), images.flatten(1) @ weight.T + bias)
        assert loaded.sigma is None
    torch.save({"1.weight": torch.rand(1000, 16), "1.bias": bias}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"'1.weight' is \[1000, 16\] in the file and \[10, 16\]"):
        load_classifier(spec, checkpoint=tmp_path / "state.pt", **like)
    torch.save({"1.bias": bias}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="has no '1.weight'"):
        load_classifier(spec, checkpoint=tmp_path / "state.pt", **like)
    with pytest.raises(UserError, match="has 10 classes and the data 1000"):
        load_classifier(spec, num_classes=1000, shape=(1, 4, 4))
    with pytest.raises(UserError, match="does not take the data's 3x4x4 images"):
        load_classifier(spec, num_classes=10, shape=(3, 4, 4))
    with pytest.raises(UserError, match="must be a function"):
        load_classifier("my_models:value", **like)
    with pytest.raises(UserError, match="has no 'other'"):
        load_classifier("my_models:other", **like)


class Unsafe:
    """Something a pickle would have to run code for."""


def test_refusals(tmp_path: Path) -> None:
    like = {"num_classes": 10, "shape": (1, 32, 32)}
    text = tmp_path / "text.pt"
    text.write_text("no checkpoint")
    pickled = tmp_path / "pickled.pt"
    torch.save({"weight": Unsafe()}, pickled)
    numbers = tmp_path / "numbers.pt"
    torch.save({"epoch": 3}, numbers)
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(1)}, plain)
    autoencoder = tmp_path / "mae.safetensors"
    save_checkpoint(autoencoder, MAE(TINY), HEADER)
    seven = tmp_path / "seven.safetensors"
    save_checkpoint(seven, ViT(TINY, 7), HEADER)
    for spec, checkpoint, message in (
        ("nonsense", None, "unknown model 'nonsense'"),
        ("missing.safetensors", None, "no checkpoint at missing.safetensors"),
        (str(plain), None, "does not say what network"),
        (str(autoencoder), None, "fine-tune it first"),
        (str(seven), None, "does not take the data's 1x32x32 images"),
        ("digits", tmp_path / "missing.pt", "no checkpoint at"),
        ("digits", text, "not a checkpoint that can be read safely"),
        ("digits", pickled, "not a checkpoint that can be read safely"),
        ("digits", numbers, "no state dict"),
        ("digits", seven, r"'head.weight' is \[7, 32\] in the file and \[10, 32\]"),
        ("timm:vit_tyni_patch16_224", None, "did you mean vit_tiny_patch16_224"),
        ("no_such_package:f", None, "cannot import"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_classifier(spec, checkpoint=checkpoint, **like)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has 7 classes and the data 10"):
        load_classifier(str(seven), num_classes=10, shape=(1, 16, 16))


def test_timm_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="pretrained weights of timm:resnet10t cannot be had"):
        load_classifier("timm:resnet10t", num_classes=1000, shape=(3, 64, 64))


def test_timm_with_a_checkpoint(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=10).eval()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = load_classifier(
        "timm:test_vit", num_classes=10, shape=(3, 160, 160), checkpoint=tmp_path / "state.pt"
    )
    images = torch.rand(1, 3, 160, 160)
    normalised = (images - torch.tensor(loaded.mean).view(3, 1, 1)) / torch.tensor(loaded.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(loaded(images), model(normalised))


def test_embedded_model() -> None:
    path = EMBEDDED["digits"]
    assert path.stat().st_size <= 2_000_000
    _, header = read_checkpoint(path)
    assert header["command"].startswith("python -m train.finetune cr ")
    assert header["pretraining"]["command"].startswith("python -m train.pretrain dmae ")
    for part in (header, header["pretraining"]):
        assert {"architecture", "mean", "std", "seed", "settings", "versions", "data"} <= set(part)
        assert part["data"]["split"] == "train"
        assert part["data"]["identity"] == digits.load("train").identity()
    assert header["sigma"] == 0.5

    model = load_classifier("digits", num_classes=10, shape=(1, 32, 32))
    test = digits.load("test")
    images = torch.stack([test[i][0] for i in range(len(test))])
    labels = torch.tensor([test[i][1] for i in range(len(test))])
    with torch.inference_mode():
        accuracy = (model(images).argmax(1) == labels).float().mean()
    assert accuracy >= 0.97


def test_models_import_no_later_layer() -> None:
    names = {name for name in sys.modules if name.startswith("nimfast.")}
    assert "nimfast.models" in names  # the check below would pass on an empty list
    source = "".join(
        p.read_text() for p in Path(sys.modules["nimfast.models"].__path__[0]).glob("*.py")
    )
    for later in ("smoothing", "attacks", "report", "certify"):
        assert f"nimfast.{later}" not in source


def test_a_file_of_a_later_version(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "later.safetensors", ViT(TINY, 10), {**HEADER, "format": 99})
    with pytest.raises(UserError, match=r"written by nimfast [\d.]+; upgrade this one"):
        read_checkpoint(tmp_path / "later.safetensors")
