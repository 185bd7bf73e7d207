# SPDX-License-Identifier: Apache-2.0
"""Classifiers on SimMIM's encoders: what they take over, how they train, where they load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_runs import QUICK, assert_same, rows, stop

import nimfast
from nimfast import certify, convert
from nimfast.data import digits
from nimfast.models import SimMIM, SimMIMArchitecture, SimMIMClassifier
from nimfast.models.checkpoint import build, describe, read_checkpoint, save_checkpoint
from nimfast.models.published import to_published
from nimfast.options import Hints
from train.classifiers import initial_model
from train.finetune import Finetune, finetune
from train.linprobe import Linprobe, linprobe
from train.optim import parameter_groups

VIT = SimMIMArchitecture((32, 32), 1, 8, 32, (2,), (2,))
SWIN = SimMIMArchitecture((32, 32), 1, 4, 16, (1, 2), (1, 2), 4)
HEADER = {"mean": [0.3], "std": [0.4]}
TUNE: dict[str, Any] = {
    **QUICK,
    "epochs": 2,
    "lr": 2e-2,
    "sigma": "0.1",
    "layer_decay": 0.9,
    "drop_path": 0.0,
    "copies": 1,
    "consistency": 0.0,
    "entropy": 0.0,
    "validation_votes": 4,
}


@pytest.fixture(params=[VIT, SWIN], ids=["vit", "swin"])
def simmim(request: pytest.FixtureRequest) -> SimMIM:
    torch.manual_seed(0)
    model = SimMIM(request.param)
    for parameter in model.parameters():  # norms and relative positions are not at rest either
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def init(simmim: SimMIM, tmp_path: Path) -> Path:
    path = tmp_path / "simmim.safetensors"
    save_checkpoint(path, simmim, HEADER)
    return path


def settings(out: Path, init: Path, **changes: Any) -> Finetune:
    return Finetune(**{**TUNE, "out": out, "init": init, **changes})


def test_the_encoder_is_taken_over(simmim: SimMIM, init: Path) -> None:
    """Features are the mean of the encoder's tokens; of a ViT, before its norm and normed anew."""
    weights, header = read_checkpoint(init)
    model = initial_model(settings(Path("x"), init), digits.load("train"), weights, header).eval()
    assert isinstance(model, SimMIMClassifier)
    rows = model.rows(torch.randn(3, 1, 32, 32))
    simmim.eval()
    if simmim.arch.window is None:
        seen: list[Tensor] = []
        handle = simmim.encoder.norm.register_forward_pre_hook(
            lambda _, given: seen.append(given[0])
        )
        simmim(rows)
        handle.remove()
        mean = seen[0][:, 1:].mean(1)
        expected = torch.nn.functional.layer_norm(mean, mean.shape[1:], eps=1e-6)
    else:
        expected = simmim.encoder(rows, None).mean(1)
    torch.testing.assert_close(model.features(rows), expected)
    assert "encoder.mask_token" not in model.state_dict()
    with pytest.raises(ValueError, match="mask token"):
        model.encoder(rows, torch.ones(3, rows.shape[1], dtype=torch.bool))


def test_learning_rates_follow_the_blocks(simmim: SimMIM) -> None:
    model = SimMIMClassifier(simmim.arch, 10)
    groups = parameter_groups(model, 0.05, 0.5)
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    found = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    depth = simmim.arch.depth
    blocks = [f"encoder.blocks.{i}" for i in range(2)]
    if simmim.arch.window is not None:
        blocks = ["encoder.stages.0.blocks.0", *(f"encoder.stages.1.blocks.{i}" for i in range(2))]
        assert found["encoder.stages.1.downsample.reduction.weight"] == 0.5 ** (depth - 1)
        assert found["encoder.embed_norm.weight"] == 0.5 ** (depth + 1)
    assert [found[f"{block}.mlp.fc1.weight"] for block in blocks] == [
        0.5 ** (depth - i) for i in range(depth)
    ]
    assert found["encoder.patch_embed.weight"] == 0.5 ** (depth + 1)
    assert found["head.weight"] == 1.0


def test_fine_tuned_resumed_loaded_and_certified(init: Path, tmp_path: Path) -> None:
    s = settings(tmp_path / "x.safetensors", init, drop_path=0.1, save_every=0.5)
    finetune(s)
    told = rows(s.out)
    assert told[-1]["loss"] < told[0]["loss"]
    again = settings(tmp_path / "y.safetensors", init, drop_path=0.1, save_every=0.5, resume=True)
    stop(finetune, again, 5)
    finetune(again)
    assert_same(s.out, again.out)
    classifier = nimfast.load(s.out, num_classes=10, shape=(1, 32, 32))
    assert isinstance(classifier.body, SimMIMClassifier) and classifier.sigma == 0.1
    rebuilt = build(describe(classifier.body))
    assert rebuilt.state_dict().keys() == load_file(s.out).keys()
    words = ["--model", str(s.out), "--data", "digits", "--limit", "2", "--n", "300"]
    table = tmp_path / "certified.tsv"
    with pytest.raises(SystemExit) as end:
        certify.command([*words, "--sigma", "0.1", "--out", str(table)])
    assert end.value.code in (0, None)
    assert len(table.read_text().splitlines()) == 3
    second = settings(tmp_path / "z.safetensors", s.out, epochs=1, lr=1e-3)  # a classifier goes on
    finetune(second)
    assert rows(second.out)[0]["loss"] < told[0]["loss"]


def test_published_layout_is_converted_first(simmim: SimMIM, init: Path, tmp_path: Path) -> None:
    torch.save({"model": to_published(simmim)}, tmp_path / "published.pth")
    ours = tmp_path / "converted.safetensors"
    hints = Hints(mean=(0.3,), std=(0.4,), image_size=(32, 32))
    convert.main(convert.Config(tmp_path / "published.pth", ours, hints))
    outs = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for out, start in zip(outs, (init, ours), strict=True):
        finetune(settings(out, start, epochs=1))
    assert_same(*outs)


def test_probe_trains_the_head_alone(init: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    given = {**QUICK, "lr": 0.2, "batch_size": 60, "optimizer": "sgd", "sigma": "0.1"}
    linprobe(Linprobe(**given, out=out, init=init, validation_votes=3))
    told = rows(out)
    assert told[-1]["loss"] < told[0]["loss"]
    before, after = load_file(init), load_file(out)
    shared = set(before) & set(after)
    assert "encoder.norm.weight" in shared
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert nimfast.load(out)(torch.rand(2, 1, 32, 32)).shape == (2, 10)
