# SPDX-License-Identifier: Apache-2.0
"""SimMIM with both encoders: against the published one, the mask, the decoder, every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference_files import read_case
from torch import Tensor

from nimfast.errors import UserError
from nimfast.models import (
    SimMIM,
    SimMIMArchitecture,
    patchify,
    simmim_architecture,
    unpatchify,
)
from nimfast.models.checkpoint import build, read_checkpoint, save_checkpoint, weights_hash
from nimfast.models.load import load_classifier
from nimfast.models.published import from_published, to_published
from nimfast.options import Hints

ARCHITECTURES = {
    "vit": SimMIMArchitecture((32, 32), 3, 8, 48, (2,), (3,)),
    "oblong vit": SimMIMArchitecture((16, 32), 1, 8, 48, (2,), (3,)),
    "swin": SimMIMArchitecture((32, 32), 3, 2, 24, (2, 2), (2, 4), 4),
    "oblong swin": SimMIMArchitecture((16, 32), 1, 2, 24, (2, 2, 1), (2, 4, 4), 4),
}


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(ARCHITECTURES[request.param])


def images(model: SimMIM) -> Tensor:
    return torch.rand(2, model.arch.channels, *model.arch.image_size)


@pytest.mark.parametrize("name", ["simmim_vit", "simmim_swin"])
def test_equals_the_published_one(shared_reference: Path, name: str) -> None:
    content, state, case = read_case(shared_reference, name)
    model = from_published(state, name, Hints())
    assert isinstance(model, SimMIM) and model.predicted_patch == case["encoder_stride"]
    mask = content["mask"].bool()  # [N, H/p, W/p]
    prediction = model(model.rows(content["imgs"]), mask.flatten(1))
    restored = unpatchify(prediction, model.predicted_patch, (32, 32))
    torch.testing.assert_close(restored, content["rec"], rtol=1e-4, atol=1e-5)
    pixels = mask.repeat_interleave(model.arch.patch, 1).repeat_interleave(model.arch.patch, 2)
    loss = (restored - content["imgs"]).abs().mean(1)[pixels].mean()
    torch.testing.assert_close(loss, content["loss"], rtol=1e-4, atol=0.0)


def test_decoder_is_a_1x1_convolution_and_pixel_shuffle(model: SimMIM) -> None:
    rows = model.rows(images(model))
    with torch.no_grad():
        torch.nn.init.normal_(model.decoder.bias)
        tokens = model.encoder(rows, None)
        stride = model.predicted_patch
        height, width = (side // stride for side in model.arch.image_size)
        grid = tokens.transpose(1, 2).reshape(2, -1, height, width)
        state = to_published(model)
        shuffled = F.pixel_shuffle(
            F.conv2d(grid, state["decoder.0.weight"], state["decoder.0.bias"]), stride
        )
        torch.testing.assert_close(model(rows), patchify(shuffled, stride))


def test_mask(model: SimMIM) -> None:
    rows = model.rows(images(model))
    mask = torch.zeros(rows.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(model(rows), model(rows, mask))
        mask[:, ::3] = True
        hidden = model(rows, mask)
        assert not torch.allclose(hidden, model(rows))
        # What a masked patch holds, even NaN, is never seen.
        torch.testing.assert_close(
            model(rows.masked_fill(mask[..., None], torch.nan), mask), hidden
        )


def test_gradients_reach_every_parameter(model: SimMIM) -> None:
    rows = model.rows(images(model))
    mask = torch.rand(rows.shape[:2]) < 0.5
    model(rows, mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_autocast_and_half_precision(model: SimMIM) -> None:
    rows = model.rows(images(model))
    mask = torch.rand(rows.shape[:2]) < 0.5
    with torch.no_grad():
        exact = model(rows, mask)
        with torch.autocast("cpu", torch.bfloat16):
            automatic = model(rows, mask)
        half = model.bfloat16()(rows.bfloat16(), mask)
    assert automatic.dtype == half.dtype == torch.bfloat16
    scale = exact.abs().max().item()
    for rounded in (automatic, half):
        assert (rounded.float() - exact).abs().max() < 0.05 * scale


def test_checkpoint(model: SimMIM, tmp_path: Path) -> None:
    path = tmp_path / "simmim.safetensors"
    save_checkpoint(path, model, {"mean": [0.5], "std": [0.5]})
    state, header = read_checkpoint(path)
    assert header["kind"] == "simmim"

    again = build(header)
    again.load_state_dict(state)
    assert again.arch == model.arch and weights_hash(again) == weights_hash(model)
    with pytest.raises(UserError, match="is a pretrained simmim, not a classifier"):
        load_classifier(str(path), num_classes=10, shape=(3, 32, 32))


@pytest.mark.parametrize(
    ("name", "size", "millions"), [("base", 224, 86.3), ("swin-base", 192, 89.9)]
)
def test_named_sizes(name: str, size: int, millions: float) -> None:
    with torch.device("meta"):
        model = SimMIM(simmim_architecture(name, (3, size, size)))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == millions
    assert model.predicted_patch == (16 if name == "base" else 32)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="choose one of nano, tiny, small, .*swin-base"):
        simmim_architecture("swin-bsae", (3, 192, 192))
    for size, options, message in (
        ((200, 192), {}, r"\(200, 192\) is no multiple of 32, the patch of the last stage"),
        ((192, 192), {"depths": (2, 2)}, "one of each per stage"),
        ((192, 192), {"window": None}, "a ViT has one stage"),
        ((192, 192), {"window": 0}, "window must be at least 1"),
        ((192, 192), {"heads": (3, 6, 12, 24)}, "width 128 must be a multiple of its 3 heads"),
    ):
        swin: dict[str, Any] = {
            **{"patch": 4, "width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
            "window": 6,
        }
        with pytest.raises(ValueError, match=message):
            SimMIMArchitecture(size, **{**swin, **options})
    with pytest.raises(ValueError, match="images must be"):
        SimMIM(ARCHITECTURES["vit"]).rows(torch.rand(1, 3, 16, 64))
