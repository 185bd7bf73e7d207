# SPDX-License-Identifier: Apache-2.0
"""Pretraining by reconstruction: MAE (He et al., 2022), SimMIM (Xie et al., 2022), NIM (You et
al., 2023), DMAE (Wu et al., 2023).

One script for all: they differ in the network, in the corruption of its input (noise and mask) and
in the loss. The first word names the recipe and sets those; every other option has the recipe's
default. docs/pretraining.md has a tour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nimfast import cli
from nimfast.data.base import ImageDataset
from nimfast.data.transforms import Augmentation
from nimfast.errors import UserError
from nimfast.models.checkpoint import build, load_weights
from train.loop import ON_INTERRUPT, Run
from train.losses import Reconstruction, Region
from train.settings import Settings, adopt, check_shape, load_data, recipes
from train.tasks import KINDS, Removing, Replacing


@dataclass(frozen=True)
class Pretrain(Settings):
    """Settings of a pretraining run; the defaults are DMAE's."""

    network: Literal["mae", "simmim"] = "mae"
    """masked patches are left out (mae) or replaced by a token (simmim: model also swin-base)"""
    patch: int | None = None
    """patch side in pixels (default: the model's)"""
    mask_ratio: float = 0.75
    """share of the patches that the encoder never sees"""
    mask_unit: int = 32
    """simmim masks whole squares, this many pixels wide"""
    norm_pix: bool = True
    """predict each patch standardised by its own mean and variance, not the pixels"""
    p: Literal[1, 2] = 2
    """the loss is the mean of |error|^p"""
    region: Region = "all"
    """patches the loss looks at"""
    validate_every: int = 0
    """epochs between measurements of the loss on the validation split; 0: never"""
    epochs: int = 1100
    batch_size: int = 4096
    lr: float = 1.5e-4
    warmup: float = 40.0
    betas: tuple[float, float] = (0.9, 0.95)


# SimMIM's schedule: 1e-4 for each 512 images, a tenth of it for the last 100 of 800 epochs.
_SIMMIM = {
    "network": "simmim",
    "norm_pix": False,
    "p": 1,
    "epochs": 800,
    "batch_size": 2048,
    "lr": 1e-4,
    "lr_batch": 512,
    "schedule": "multistep",
    "warmup": 10.0,
    "betas": (0.9, 0.999),
    "clip": 5.0,
    "pictures": Augmentation(crop="resized", crop_scale=(0.67, 1.0), flip=True),
}
_PICTURES = Augmentation(crop="resized", crop_scale=(0.2, 1.0), flip=True)
_NIM = {"sigma": "gamma(25,3)/255", "mask_ratio": 0.0, "region": "all", "epochs": 800}

RECIPES: dict[str, dict[str, Any]] = {
    "mae": {
        "sigma": "0",
        "mask_ratio": 0.75,
        "region": "removed",
        "epochs": 800,
        "pictures": _PICTURES,
    },
    "simmim": {**_SIMMIM, "sigma": "0", "mask_ratio": 0.6, "region": "removed"},
    "nim-mae": {**_NIM, "pictures": _PICTURES},
    "nim-simmim": {**_SIMMIM, **_NIM},
    "dmae": {
        "sigma": "0.25",
        "mask_ratio": 0.75,
        "region": "all",
        "epochs": 1100,
        "pictures": _PICTURES,
    },
    "digits-demo": {
        "data": "digits",
        "out": Path("runs/digits-demo.safetensors"),
        "model": "digits",
        "patch": 8,
        "mean": (0.305,),
        "std": (0.376,),
        "epochs": 120,
        "batch_size": 128,
        "lr": 4e-3,
        "warmup": 10.0,
        "precision": "fp32",
        "threads": 1,  # the network is too small to share
        "validate_every": 10,
        "save_every": 20.0,
    },
}


def pretrain(settings: Pretrain) -> None:
    """Train an autoencoder and write its checkpoint.

    Raises:
        UserError: settings that cannot be used, or gradients that are no longer numbers.
    """
    check(settings)
    settings, weights, header = adopt(settings)
    data = load_data(settings, "train")
    held_out = load_data(settings, "validation") if settings.validate_every else None
    kind = KINDS[settings.network]

    torch.manual_seed(settings.seed)
    model = build(header) if header else kind.build(settings, data)
    if header:
        if not isinstance(model, kind.network):
            raise UserError(f"--init {settings.init} is no {settings.network}; change --network")
        check_shape(settings, data, model.arch)
        load_weights(model, weights, settings.init)
    corruption = kind.corruption(model, settings)
    loss = Reconstruction(
        model.predicted_patch,
        settings.norm_pix,
        settings.p,
        settings.region,
        settings.mean,
        settings.std,
    )
    freeze_unused(model, settings)

    with Run(model, settings, data, "train.pretrain") as run:
        for epoch in run.epochs():
            for images, _, indices in run.batches(epoch):
                inputs, hidden, target = corruption(images, indices, epoch)
                with run.autocast():
                    prediction = run.network(*inputs)
                run.step(loss(prediction, target, hidden))
            if held_out and (epoch + 1) % settings.validate_every == 0:
                run.end_epoch(epoch, validation=validate(run, held_out, corruption, loss))
            else:
                run.end_epoch(epoch)
        run.finish()


def check(settings: Pretrain) -> None:
    """Raise `UserError` for what no pretraining can use."""
    settings.check()
    if not 0 <= settings.mask_ratio < 1:
        raise UserError(f"--mask-ratio must lie in [0, 1), not {settings.mask_ratio}")
    if settings.region == "removed" and settings.mask_ratio == 0:
        raise UserError("--region removed needs a --mask-ratio above 0")
    if settings.network == "simmim" and settings.layer_decay != 1:
        raise UserError("--layer-decay is for ViT encoders without a mask token, not for simmim")
    if settings.validate_every < 0:
        raise UserError(f"--validate-every must not be negative, not {settings.validate_every}")


def freeze_unused(model: torch.nn.Module, settings: Pretrain) -> None:
    """Freeze the mask token where nothing is masked: processes would wait for its gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token") and settings.mask_ratio == 0:
            parameter.requires_grad_(False)


@torch.inference_mode()
def validate(
    run: Run, data: ImageDataset, corruption: Removing | Replacing, loss: Reconstruction
) -> float:
    """Mean loss over `data`, with the same noise and masks every time."""
    total = torch.zeros(2, dtype=torch.float64, device=run.device)  # of losses, of images
    with run.evaluation():
        for images, _, indices in run.in_order(data, 64):
            inputs, hidden, target = corruption(images, indices, 0)
            with run.autocast():
                prediction = run.model(*inputs)
            total[0] += loss(prediction, target, hidden) * len(images)
            total[1] += len(images)
    losses, images_seen = run.world.total(total).tolist()
    return float(losses / images_seen) if images_seen else math.nan


if __name__ == "__main__":
    cli.run(
        pretrain,
        recipes(Pretrain, RECIPES),
        prog="python -m train.pretrain",
        description="Pretrain an autoencoder by a recipe",
        on_interrupt=ON_INTERRUPT,
    )
