# SPDX-License-Identifier: Apache-2.0
"""Linear probes: what trains, LARS, the batch norm, and the file that comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_runs import QUICK, assert_same, rows, stop

import nimfast
import train.linprobe
from nimfast.data import digits
from nimfast.errors import UserError
from nimfast.models import Architecture
from nimfast.models.checkpoint import build, describe, read_checkpoint, save_checkpoint
from nimfast.models.mae import MAE
from nimfast.models.vit import LayerNorm
from train.linprobe import Linprobe, linprobe, probe
from train.optim import Optimizer

SMALL = Architecture((32, 32), 1, 8, 32, 1, 1, True, 32, 1, 1)
PROBE: dict[str, Any] = {**QUICK, "validation_votes": 3, "lr": 0.5, "batch_size": 190}


@pytest.fixture(params=[True, False])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An autoencoder with or without a class token."""
    torch.manual_seed(0)
    out = tmp_path / "mae.safetensors"
    model = MAE(Architecture(**{**vars(SMALL), "class_token": request.param}))
    nn.init.normal_(model.norm.weight, 1.0, 0.2)
    save_checkpoint(out, model, {"mean": [0.3], "std": [0.4]})
    return out


def settings(out: Path, **changes: Any) -> Linprobe:
    return Linprobe(**{**PROBE, "out": out, **changes})


def test_only_the_head_trains(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"validate_every": 1, "optimizer": "sgd", "sigma": "0.1", "batch_size": 60}
    s = settings(tmp_path / "x.safetensors", init=encoder, **changes)
    linprobe(s)
    told = rows(s.out)
    assert told[-1]["loss"] < told[0]["loss"] and told[-1]["vote"] > 0.15
    before, after = load_file(encoder), load_file(s.out)
    header = read_checkpoint(s.out)[1]
    token = "cls_token" in before
    assert header["pooling"] == ("class" if token else "mean") and header["batch_norm"]
    assert ("no class token" in capsys.readouterr().out) != token
    shared = set(before) & set(after)
    assert {"patch_embed.weight", "blocks.0.mlp.fc1.weight"} <= shared
    assert ("norm.weight" in shared) == token  # the encoder's own, before the class token
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert after["batch_norm.running_mean"].abs().max() > 1e-3
    assert "batch_norm.weight" not in after
    model = nimfast.load(s.out, num_classes=10, shape=(1, 32, 32))
    images = digits.load("test").images[:50]
    alone = torch.cat([model(images[i : i + 1]) for i in range(50)])
    torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-4)  # statistics are fixed
    again = build(header)
    assert describe(again) == {k: header[k] for k in describe(again)} | describe(again)


def test_features_are_standardised(encoder: Path, tmp_path: Path) -> None:
    weights, header = read_checkpoint(encoder)
    s = settings(tmp_path / "x.safetensors", init=encoder)
    model = probe(s, digits.load("train"), weights, header)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.weight", "head.bias",
    ]  # fmt: skip
    images = digits.load("train").images[:64]
    features = model.train().features(model.rows(images))
    assert features.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(32), rtol=1e-2, atol=0)
    norm = LayerNorm(32)
    tokens = model.encode(model.rows(images))
    if model.pooling == "class":
        norm.load_state_dict({k[5:]: v for k, v in weights.items() if k.startswith("norm.")})
        pooled = norm(tokens[:, 0])
    else:
        pooled = norm(tokens.mean(1))
    expected = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def test_lars() -> None:
    """You et al., 2017: rates times 0.001 |w| / |g| for matrices; biases as they are."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    s = settings(Path("x"), weight_decay=0.0)
    optimizer = Optimizer(model, s, torch.device("cpu"))
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    speed = [torch.zeros(3, 4), torch.zeros(3)]
    for step in range(3):
        gradients = [torch.randn(3, 4), torch.randn(3)]
        model.weight.grad, model.bias.grad = (g.clone() for g in gradients)
        optimizer.step(0.7)
        trust = 1e-3 * weight.norm() / gradients[0].norm()
        speed = [0.9 * speed[0] + trust * gradients[0], 0.9 * speed[1] + gradients[1]]
        weight, bias = weight - 0.7 * speed[0], bias - 0.7 * speed[1]
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model.bias.detach(), bias, rtol=1e-4, atol=1e-6)
        if step == 1:  # a bad gradient changes nothing
            model.weight.grad = torch.full((3, 4), float("nan"))
            model.bias.grad = torch.zeros(3)
            assert optimizer.step(0.7)
            torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-4, atol=1e-6)
    assert optimizer.skipped() == 1


def test_resumed_probe_equals_the_whole_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    init = tmp_path / "mae.safetensors"
    save_checkpoint(init, MAE(SMALL), {"mean": [0.3], "std": [0.4]})
    s = settings(tmp_path / "whole.safetensors", init=init, epochs=2, save_every=0.5, resume=True)
    linprobe(s)
    cut = replace(s, out=tmp_path / "cut.safetensors")
    stop(linprobe, cut, 8)
    linprobe(cut)
    assert_same(s.out, cut.out)


def test_defaults_are_the_papers() -> None:
    s = Linprobe(data="x", out=Path("x.safetensors"), **train.linprobe.RECIPES["noisy"])
    assert (s.lr, s.batch_size, s.epochs, s.warmup) == (0.1, 16384, 90, 10.0)
    assert (s.optimizer, s.momentum, s.weight_decay) == ("lars", 0.9, 0.0)
    assert s.pictures.crop == "resized" and not s.pictures.flip
    assert s.sigma == "0.25"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "--init is needed"),
        ({"init": Path("gone.safetensors")}, "no checkpoint at"),
        ({"ema": 0.9}, "--init is needed"),
        ({"validation_votes": 0}, "--validation-votes"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        linprobe(settings(tmp_path / "x.safetensors", **change))


def test_starts_that_cannot_be_probed(tmp_path: Path) -> None:
    s = settings(tmp_path / "x.safetensors", init=tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="--ema has no average"):
        linprobe(replace(s, ema=0.9))
    save_checkpoint(s.init, nimfast.models.ViT(SMALL, 10), {"mean": [0.3], "std": [0.4]})
    with pytest.raises(UserError, match="is not an autoencoder or encoder or simmim"):
        linprobe(s)
