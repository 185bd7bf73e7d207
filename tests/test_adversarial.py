# SPDX-License-Identifier: Apache-2.0
"""Adversarial training: the attack inside it, its recipe, and that it makes models robust."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_runs import QUICK, assert_same, rows, stop

import nimfast
import train.adversarial
from nimfast.data import digits
from nimfast.data.transforms import Augmentation
from nimfast.errors import UserError
from nimfast.models import ViT, architecture
from nimfast.ops import Stream, image_keys
from train.adversarial import RECIPES, Adversarial, adversarial, check, pgd
from train.inputs import Inputs
from train.loop import Run
from train.mixing import Mixing, one_hot

TRAINED = {k: v for k, v in QUICK.items() if k not in ("sigma", "lr")}
PLAIN: dict[str, Any] = {**TRAINED, "batch_size": 190, "lr": 0.2, "eps": 16.0, "attack_step": 4.0}


def settings(out: Path, **changes: Any) -> Adversarial:
    return Adversarial(**{**PLAIN, "out": out, **changes})


def test_recipe_is_the_papers() -> None:
    s = Adversarial(data="x", out=Path("x.safetensors"), **RECIPES["pgd"])
    train.adversarial.check(s)
    assert (s.eps, s.attack_step, s.attack_steps) == (4.0, 1.0, 5)
    assert (s.optimizer, s.lr, s.lr_batch, s.batch_size) == ("sgd", 0.1, 512, 512)
    assert (s.momentum, s.weight_decay, s.clip, s.epochs) == (0.9, 1e-4, 1.0, 20)
    assert [share * s.epochs for share in s.milestones] == [15, 18]
    assert s.mixing == Mixing(0.8, 1.0, mix_probability=0.3, mix_order="before")
    assert s.pictures == Augmentation(crop="padded", padding=4, flip=True)


def test_pgd(tmp_path: Path) -> None:
    """Inside ball and box, uphill, in eval mode; a start follows from image and number alone."""
    torch.manual_seed(0)
    data = digits.load("train")
    model = ViT(architecture("digits", (1, 32, 32)), 10, drop_path=0.5)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    s = settings(tmp_path / "x.safetensors")
    images = torch.stack([data[i][0] for i in range(8)])
    targets = one_hot(torch.tensor([data[i][1] for i in range(8)]), 10)
    keys = image_keys(0, Stream.TRAINING, torch.arange(8))
    modes = []
    with Run(model, s, data, "train.adversarial") as run:
        inputs = Inputs(s, data)
        forward = model.forward
        model.forward = lambda x: modes.append(model.training) or forward(x)  # type: ignore[func-returns-value]
        attacked = pgd(run, inputs, images, targets, keys, 3)
        assert modes == [False] * 5 and model.training
        assert not attacked.requires_grad and model.head.weight.grad is None
        assert (attacked - images).abs().max() <= 16 / 255 + 1e-6
        assert attacked.min() >= 0 and attacked.max() <= 1
        again = pgd(run, inputs, images[5:6], targets[5:6], keys[5:6], 3)
        assert (again - attacked[5:6]).abs().max() < 1e-5
        assert not torch.equal(pgd(run, inputs, images, targets, keys, 4), attacked)
        start = replace(s, attack_step=0.0, attack_steps=1, eps=64.0)
        run.settings = start
        moved = (pgd(run, inputs, torch.full_like(images, 0.5), targets, keys, 3) - 0.5) * 255 / 64
        assert moved.abs().max() <= 1 + 1e-5  # uniform in the ball
        assert moved.std().item() == pytest.approx(3**-0.5, rel=0.03)
        model.forward = forward
        model.eval()
        losses = [
            F.cross_entropy(model(inputs.clean(x)), targets, reduction="none")
            for x in (images, attacked)
        ]
        assert (losses[1] > losses[0]).all()
        # One step by hand.
        run.settings = replace(s, random_start=False, attack_steps=1)
        x = images.clone().requires_grad_()
        F.cross_entropy(model((x - 0.3) / 0.4), targets, reduction="sum").backward()
        expected = (images + 4 / 255 * x.grad.sign()).clamp(0, 1)
        torch.testing.assert_close(pgd(run, inputs, images, targets, keys, 0), expected)


def test_it_makes_models_robust(tmp_path: Path) -> None:
    """Against training without the attack, judged by the same attack on held-out images."""
    found = {}
    for steps in (0, 3):
        s = settings(tmp_path / f"{steps}.safetensors", epochs=12, attack_steps=steps, eps=24.0)
        s = replace(s, attack_step=12.0, validate_every=12, choose="last")
        adversarial(s)
        found[steps] = s.out
    data = digits.load("validation")
    images = torch.stack([data[i][0] for i in range(len(data))])
    labels = torch.tensor([data[i][1] for i in range(len(data))])
    robust = {}
    for steps, out in found.items():
        model = nimfast.load(out)
        x = images
        for _ in range(5):
            x = x.detach().requires_grad_()
            F.cross_entropy(model(x), labels).backward()
            x = images + (x + 8 / 255 * x.grad.sign() - images).clamp(-24 / 255, 24 / 255)
            x = x.clamp(0, 1)
        robust[steps] = (model(x).argmax(1) == labels).float().mean().item()
    assert robust[3] > robust[0] + 0.05
    assert rows(found[3])[-1]["robust"] == pytest.approx(robust[3], abs=0.06)


def test_resumed_run_equals_the_whole_one(tmp_path: Path) -> None:
    mixing = RECIPES["pgd"]["mixing"]
    s = settings(
        tmp_path / "whole.safetensors", epochs=2, save_every=0.5, resume=True, mixing=mixing,
        attack_steps=2, pictures=Augmentation(crop="padded"), precision="bf16", ema=0.5,
    )  # fmt: skip
    adversarial(s)
    cut = replace(s, out=tmp_path / "cut.safetensors")
    stop(adversarial, cut, 8)
    adversarial(cut)
    assert_same(s.out, cut.out)
    assert set(rows(cut.out)[-1]) >= {"clean", "robust", "loss"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -1.0}, "--eps must lie in"),
        ({"attack_steps": -1}, "--eps must lie in"),
        ({"sigma": "0.25"}, "adds no noise"),
        ({"mixing": Mixing(mixup=0.8)}, "--mix-order must be before"),
        ({"validate_every": 0}, "--validate-every"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        adversarial(settings(tmp_path / "x.safetensors", **change))


def test_a_radius_in_pixel_units_draws_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"read as 0.03/255; 0.03 .* --eps 7.65"):
        check(settings(tmp_path / "x.safetensors", eps=0.03))
