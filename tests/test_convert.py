# SPDX-License-Identifier: Apache-2.0
"""python -m nimfast.convert: there and back bit for bit, what it says, every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nimfast import cli, convert
from nimfast.models import (
    MAE,
    Architecture,
    PatchModel,
    SimMIM,
    SimMIMArchitecture,
    ViT,
    architecture,
)
from nimfast.models.checkpoint import build, describe, read_checkpoint, save_checkpoint
from nimfast.models.published import to_published
from nimfast.models.vit import Trunk
from nimfast.options import Hints

SMALL = Architecture((32, 32), 3, 8, 64, 2, 1, True, 32, 1, 1)
ENCODER = Architecture((32, 32), 3, 8, 64, 2, 1)  # a file without a decoder cannot tell its shape
TINY = architecture("digits", (1, 16, 16))
NORMALISED = {"mean": [0.5], "std": [0.25]}


def models() -> dict[str, PatchModel]:
    torch.manual_seed(0)
    stored = MAE(Architecture(**{**vars(SMALL), "positions": "stored"}))
    stored.positions.normal_()
    stored.decoder_positions.normal_()
    one_channel = {**vars(SMALL), "channels": 1, "class_token": False}
    found: dict[str, PatchModel] = {
        "mae": MAE(SMALL),
        "stored": stored,
        "no class token": MAE(Architecture(**one_channel)),
        "classifier": ViT(ENCODER, 5),
        "class": ViT(ENCODER, 5, pooling="class"),
        "encoder": Trunk(ENCODER),
        "vit": SimMIM(SimMIMArchitecture((32, 32), 3, 8, 64, (2,), (4,))),
        "swin": SimMIM(SimMIMArchitecture((32, 32), 3, 2, 24, (2, 2), (2, 4), 4)),
    }
    for model in found.values():
        for parameter in model.parameters():  # also those that start at a constant
            torch.nn.init.normal_(parameter)
    return found


@pytest.mark.parametrize("name", models())
def test_round_trip(tmp_path: Path, name: str) -> None:
    model = models()[name]
    save_checkpoint(tmp_path / "a.safetensors", model, NORMALISED)
    channels = model.arch.channels
    there = convert.Config(tmp_path / "a.safetensors", tmp_path / "b.pth")
    values = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    back = convert.Config(tmp_path / "b.pth", tmp_path / "c.safetensors", Hints(**values), 0.25)
    convert.main(there)
    convert.main(back)
    state, header = read_checkpoint(tmp_path / "c.safetensors")
    described = json.loads(json.dumps(describe(model)))  # tuples become lists
    assert {key: header[key] for key in described} == described
    assert tuple(header["mean"]) == values["mean"] and header["sigma"] == 0.25
    again = build(header)
    again.load_state_dict(state)
    own = model.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in own)
    published = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    second = to_published(again)
    assert published.keys() == second.keys()
    assert all(torch.equal(published[k], second[k]) for k in published)


class Unsafe:
    """Something a pickle would have to run code for."""


def test_refusals_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, published, pickled = (tmp_path / n for n in ("a.safetensors", "b.pth", "c.pth"))
    save_checkpoint(ours, ViT(TINY, 5), NORMALISED)
    torch.save({"model": to_published(ViT(TINY, 5))}, published)
    torch.save({"model": Unsafe()}, pickled)
    names = {"OURS": ours, "PTH": published, "PICKLE": pickled, "TMP": tmp_path}
    for args, message in (
        ("OURS TMP/new.safetensors", "is one of ours; a published one is written to a name that"),
        ("PTH TMP/new.pth", "is not one of ours; ours is written to a name that ends in .safet"),
        ("PTH OURS", "exists; remove it or choose another name"),
        ("OURS TMP/new.pth --heads 2", "is one of ours and says everything"),
        ("PICKLE TMP/new.safetensors", "that can be read safely (it holds test_convert.Unsafe)"),
        ("TMP/missing.pth TMP/new.safetensors", "no checkpoint at"),
        ("PTH TMP/new.safetensors", "convert it with --mean and --std, 1 values each"),
        ("PTH TMP/new.safetensors --mean 0.5 0.5 0.5 --std 1 1 1", "1 values each"),
        ("PTH TMP/new.safetensors --mean 0.5 --std 0", "--std must be positive"),
        ("PTH TMP/no/new.safetensors --mean 0.5 --std 1", "No such file or directory"),
    ):
        for name, path in names.items():
            args = args.replace(name, str(path))
        with pytest.raises(SystemExit) as ended:
            cli.run(convert.main, convert.Config, "convert", "", args.split())
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
        assert message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.pth", "c.pth"]


def test_the_assumed_normalisation_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(to_published(Trunk(ENCODER)), tmp_path / "encoder.pth")
    convert.main(convert.Config(tmp_path / "encoder.pth", tmp_path / "encoder.safetensors"))
    assert "does not store its normalisation; ImageNet's is" in " ".join(
        capsys.readouterr().out.split()
    )
    header = read_checkpoint(tmp_path / "encoder.safetensors")[1]
    assert header["kind"] == "encoder" and header["mean"] == [0.485, 0.456, 0.406]
