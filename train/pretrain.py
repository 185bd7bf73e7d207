# SPDX-License-Identifier: Apache-2.0
"""Pretraining by reconstruction: MAE (He et al., 2022), NIM (You et al.), DMAE (Wu et al., 2023).

One script for the three: they differ in the noise on the input, the mask and the loss. The first
word names the recipe and sets those; every other option has the recipe's default. The command that
made the embedded model stands in docs/embedded_model.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from nimfast import cli
from nimfast.corruption import Corruption, SigmaLaw
from nimfast.errors import UserError
from nimfast.models import MAE, removed_mask, take
from nimfast.ops import recon_loss
from train.loop import Run, Settings, batches, load_data, named_architecture, recipes


@dataclass(frozen=True)
class Pretrain(Settings):
    """Settings of a pretraining run; the defaults are DMAE's."""

    patch: int | None = None
    """patch side in pixels (default: the model's)"""
    mask_ratio: float = 0.75
    """share of the patches that the encoder never sees"""
    norm_pix: bool = True
    """predict each patch standardised by its own mean and variance"""
    region: Literal["all", "removed"] = "all"
    """patches the loss looks at"""
    epochs: int = 1100
    batch_size: int = 4096
    lr: float = 1.5e-4
    warmup: float = 40.0
    betas: tuple[float, float] = (0.9, 0.95)


RECIPES = {
    "mae": {"sigma": "0", "mask_ratio": 0.75, "region": "removed", "epochs": 800},
    "nim": {"sigma": "gamma(25,3)/255", "mask_ratio": 0.0, "region": "all", "epochs": 800},
    "dmae": {"sigma": "0.25", "mask_ratio": 0.75, "region": "all", "epochs": 1100},
}


def pretrain(settings: Pretrain) -> None:
    """Train an autoencoder and write its checkpoint.

    Raises:
        UserError: settings that cannot be used, or a loss that is no longer a number.
    """
    settings.check()
    if not 0 <= settings.mask_ratio < 1:
        raise UserError(f"--mask-ratio must lie in [0, 1), not {settings.mask_ratio}")
    if settings.region == "removed" and settings.mask_ratio == 0:
        raise UserError("--region removed needs a --mask-ratio above 0")
    data = load_data(settings, "train")
    arch = named_architecture(settings, data, settings.patch)
    torch.manual_seed(settings.seed)
    model = MAE(arch)
    law = SigmaLaw.parse(settings.sigma)
    corruption = Corruption(law, settings.mask_ratio, settings.seed, settings.mean, settings.std)
    error = partial(
        recon_loss,
        patch=arch.patch,
        norm_pix=settings.norm_pix,
        mean=settings.mean,
        std=settings.std,
    )
    with Run(model, settings, len(data)) as run:
        for epoch in range(settings.epochs):
            for images, _, indices in batches(data, settings, epoch, run.device):
                noisy, _, keep = corruption(images, indices, epoch, patches=arch.patches)
                with run.autocast():
                    prediction = model(take(model.rows(noisy), keep), keep)
                mask = None  # every patch counts
                if settings.region == "removed" and keep is not None:
                    mask = removed_mask(keep, arch.patches)
                run.step(error(prediction, images, mask=mask))
            run.end_epoch(epoch)
        run.save("train.pretrain", data)


if __name__ == "__main__":
    cli.run(
        pretrain,
        recipes(Pretrain, RECIPES),
        prog="python -m train.pretrain",
        description="Pretrain an autoencoder by a recipe: mae, nim or dmae",
    )
