# SPDX-License-Identifier: Apache-2.0
"""Pretraining: the recipes, how images are shown to the networks, and the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import COMMON

import train.pretrain
import train.tasks
from nimfast.data import digits
from nimfast.data.transforms import Augmentation
from train.augment import Affine
from train.losses import Reconstruction
from train.pretrain import Pretrain
from train.tasks import Removing, Replacing


def test_recipes_are_the_papers() -> None:
    kinds = train.pretrain.RECIPES
    given: dict[str, Any] = {"data": "x", "out": Path("x.safetensors")}
    made = {name: Pretrain(**given | entries) for name, entries in kinds.items()}
    assert {"mae", "simmim", "nim-mae", "nim-simmim", "dmae", "digits-demo"} == set(made)
    for name, (sigma, ratio, p, norm_pix, region) in {
        "mae": ("0", 0.75, 2, True, "removed"),
        "simmim": ("0", 0.6, 1, False, "removed"),
        "nim-mae": ("gamma(25,3)/255", 0.0, 2, True, "all"),
        "nim-simmim": ("gamma(25,3)/255", 0.0, 1, False, "all"),
        "dmae": ("0.25", 0.75, 2, True, "all"),
    }.items():
        s = made[name]
        assert (s.sigma, s.mask_ratio, s.p, s.norm_pix, s.region) == (
            sigma, ratio, p, norm_pix, region,
        )  # fmt: skip
        train.pretrain.check(s)
    for name in ("mae", "nim-mae", "dmae"):
        s = made[name]
        assert (s.network, s.batch_size, s.lr, s.lr_batch) == ("mae", 4096, 1.5e-4, 256)
        assert s.crop_and_flip == Augmentation("resized", (0.2, 1.0), flip=True)
        assert (s.betas, s.warmup, s.schedule, s.clip) == ((0.9, 0.95), 40, "cosine", 0)
    for name in ("simmim", "nim-simmim"):
        s = made[name]
        assert (s.network, s.lr, s.lr_batch, s.epochs) == ("simmim", 1e-4, 512, 800)
        assert (s.betas, s.warmup, s.schedule, s.clip) == ((0.9, 0.999), 10, "multistep", 5)
        assert s.crop_and_flip == Augmentation("resized", (0.67, 1.0), flip=True)
        assert replace(s, augment=Affine(shift=1)).crop_and_flip == Augmentation()
        assert [share * s.epochs for share in s.milestones] == [700]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction(p: int, norm_pix: bool) -> None:
    images, prediction = torch.rand(3, 2, 8, 8), torch.randn(3, 4, 32)
    hidden = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    mean, std = (0.4, 0.5), (0.2, 0.3)
    losses = []
    for n in range(3):
        for place in range(4):
            row, column = divmod(place, 2)
            patch = images[n, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            patch = (patch - torch.tensor(mean).view(2, 1, 1)) / torch.tensor(std).view(2, 1, 1)
            target = patch.permute(1, 2, 0).flatten()
            if norm_pix:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            losses.append((prediction[n, place] - target).abs().pow(p).mean())
    each = torch.stack(losses)
    loss = Reconstruction(4, norm_pix, p, "all", mean, std)
    torch.testing.assert_close(loss(prediction, images, hidden), each.mean())
    loss = replace(loss, region="removed")
    torch.testing.assert_close(loss(prediction, images, hidden), each[hidden.flatten()].mean())


def test_removing_shows_the_kept_patches() -> None:
    settings = Pretrain(**{**COMMON, "sigma": "0"}, out=Path("x"), patch=8, mask_ratio=0.5)
    data = digits.load("train")
    model = train.tasks.masked_autoencoder(settings, data)
    images = torch.stack([data[i][0] for i in range(4)])
    (rows, keep), hidden, _ = Removing(model, settings)(images, torch.arange(4), 0)
    assert rows.shape == (4, 8, 64)
    assert hidden.sum(1).tolist() == [8] * 4
    assert not hidden.gather(1, keep).any()
    clean = model.rows((images - 0.3) / 0.4)
    torch.testing.assert_close(rows, clean.gather(1, keep[..., None].expand(-1, -1, 64)))


def test_replacing_hides_whole_squares() -> None:
    settings = Pretrain(
        **COMMON, out=Path("x"), network="simmim", patch=4, mask_ratio=0.6, mask_unit=8
    )
    model = train.tasks.simmim(settings, digits.load("train"))
    replacing = Replacing(model, settings)
    indices = torch.tensor([3, 1, 4])
    (rows, mask), hidden, _ = replacing(torch.rand(3, 1, 32, 32), indices, 2)
    assert rows.shape == (3, 64, 16)
    assert mask.dtype == torch.bool
    squares = mask.view(3, 4, 2, 4, 2).float().mean((2, 4))
    assert squares.unique().tolist() == [0.0, 1.0]
    assert squares.sum((1, 2)).tolist() == [10.0] * 3  # ceil(0.6 * 16)
    assert torch.equal(hidden, mask)  # a ViT predicts the patches it embeds
    again = replacing(torch.rand(1, 1, 32, 32), indices[1:2], 2).inputs[1]
    assert torch.equal(again[0], mask[1])
    other = replacing(torch.rand(3, 1, 32, 32), indices, 3).inputs[1]
    assert not torch.equal(other, mask)
