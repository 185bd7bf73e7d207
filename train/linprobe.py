# SPDX-License-Identifier: Apache-2.0
"""Linear probe: what a frozen encoder's features are worth (MAE: He et al., 2022, appendix A).

A batch norm without weights and a linear layer on the class token, by LARS (You et al., 2017), on
noisy images as DMAE has it (Wu et al., 2023, section 4.3). Only the linear layer trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from nimfast import cli
from nimfast.data.base import ImageDataset
from nimfast.data.transforms import Augmentation
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, State
from nimfast.models.simmim import SimMIMArchitecture
from nimfast.models.simmim_classifier import SimMIMClassifier
from nimfast.models.vit import Architecture, ViT
from train.classifiers import check_labels, take_over
from train.finetune import validate
from train.inputs import Inputs
from train.loop import ON_INTERRUPT, Run
from train.settings import Settings, adopt, check_shape, load_data, recipes


@dataclass(frozen=True)
class Linprobe(Settings):
    """Settings of a linear probe; the defaults are the papers'."""

    validate_every: int = 10
    """epochs between measurements on held-out training images"""
    validation_votes: int = 100
    """noisy copies per image that vote there"""
    choose: Literal["best", "last"] = "best"
    """epoch whose weights are kept: that with most of these images right, or the last"""
    epochs: int = 90
    batch_size: int = 16384
    lr: float = 0.1
    warmup: float = 10.0
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "sgd", "lars"] = "lars"


RECIPES: dict[str, dict[str, Any]] = {
    "noisy": {"pictures": Augmentation(crop="resized", crop_scale=(0.08, 1.0))},
    "clean": {"pictures": Augmentation(crop="resized", crop_scale=(0.08, 1.0)), "sigma": "0"},
}


def linprobe(settings: Linprobe) -> None:
    """Train a linear layer on frozen features and write the classifier.

    Raises:
        UserError: settings that cannot be used.
    """
    settings.check()
    if settings.validate_every < 1 or settings.validation_votes < 1:
        raise UserError("--validate-every and --validation-votes must be at least 1")
    if settings.init is None:
        raise UserError("--init is needed: the pretrained encoder that is probed")
    if settings.ema:
        raise UserError("--ema has no average of batch statistics; leave it out")
    settings, weights, pretraining = adopt(settings, ("autoencoder", "encoder", "simmim"))
    data, held_out = load_data(settings, "train"), load_data(settings, "validation")
    model = probe(settings, data, weights, pretraining)
    inputs = Inputs(settings, data, patch=model.arch.patch)
    by = "vote" if inputs.noise else "clean"
    entries = {**inputs.entries(), "pretraining": pretraining}
    measured: dict[str, float] = {}
    with Run(model, settings, data, "train.linprobe", **entries) as run:
        if run.world.main and not reads_class_token(model) and not run.complete:
            cli.console.print("no class token to read: the mean of the patch tokens is probed")
        for epoch in run.epochs():
            for images, labels, indices in run.batches(epoch):
                noisy = inputs.noisy(images, indices, epoch)
                with run.autocast():
                    logits = run.network(noisy).float()
                run.step(F.cross_entropy(logits, labels))
            measured = {}
            if epoch + 1 == settings.epochs or (epoch + 1) % settings.validate_every == 0:
                measured = validate(run, held_out, inputs, settings.validation_votes)
                if settings.choose == "best":
                    run.keep_best(epoch, measured, by)
            run.end_epoch(epoch, **measured)
        run.finish(validation=run.best or {"epoch": settings.epochs - 1, **measured})


def probe(
    settings: Linprobe, data: ImageDataset, weights: State, pretraining: Header
) -> ViT | SimMIMClassifier:
    """A classifier of which only the head trains.

    It reads the class token behind the encoder's own norm; where there is none, the mean of the
    patch tokens behind a norm without learned weights. Of SimMIM's encoders, whose class token no
    loss has looked at, it reads the mean of the normed patch tokens.
    """
    check_labels(settings, data)
    torch.manual_seed(settings.seed)  # of the new head
    classes = len(data.classes)
    model: ViT | SimMIMClassifier
    if pretraining["kind"] == "simmim":
        simmim = SimMIMArchitecture(**pretraining["architecture"])
        model = SimMIMClassifier(simmim, classes, batch_norm=True)
    else:
        arch = Architecture(**pretraining["architecture"])
        pooling: Literal["class", "mean"] = "class" if arch.class_token else "mean"
        model = ViT(arch, classes, pooling=pooling, batch_norm=True)
    check_shape(settings, data, model.arch)
    take_over(model, weights)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    nn.init.trunc_normal_(model.head.weight, std=0.01)
    return model


def reads_class_token(model: ViT | SimMIMClassifier) -> bool:
    """Whether the head sees the class token, and not the mean of the patch tokens."""
    return isinstance(model, ViT) and model.pooling == "class"


if __name__ == "__main__":
    cli.run(
        linprobe,
        recipes(Linprobe, RECIPES),
        prog="python -m train.linprobe",
        description="Train a linear layer on a frozen encoder, on noisy or clean images",
        on_interrupt=ON_INTERRUPT,
    )
