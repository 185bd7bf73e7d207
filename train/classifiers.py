# SPDX-License-Identifier: Apache-2.0
"""What all training of classifiers shares: some settings, and what a classifier starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro
from torch import nn

from nimfast.data.base import ImageDataset
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, State
from nimfast.models.simmim import SimMIMArchitecture
from nimfast.models.simmim_classifier import SimMIMClassifier
from nimfast.models.vit import Architecture, ViT
from train.mixing import Mixing
from train.settings import Settings, check_shape, named_architecture

STARTS = ("autoencoder", "encoder", "simmim", "classifier", "simmim classifier")  # kinds of --init


@dataclass(frozen=True)
class Classifying(Settings):
    """Settings of a run that trains a classifier whole."""

    new_head: bool = False
    """leave the head of a classifier given as --init behind"""
    drop_path: float = 0.1
    """stochastic depth of the last block"""
    label_smoothing: float = 0.0
    """of the cross-entropy"""
    mixing: Annotated[Mixing, tyro.conf.arg(name="")] = field(default_factory=Mixing)
    """mixup and CutMix"""
    validate_every: int = 10
    """epochs between measurements on held-out training images"""
    choose: Literal["best", "last"] = "best"
    """epoch whose weights are kept: that with most of these images right, or the last"""

    def check(self) -> None:
        """Raise `UserError` for what no such run can use."""
        super().check()
        self.mixing.check()
        for name in ("label_smoothing", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} must lie in [0, 1), not {getattr(self, name)}")
        if self.validate_every < 1:
            raise UserError(f"--validate-every must be at least 1, not {self.validate_every}")

    def validates(self, epoch: int) -> bool:
        """Whether something is measured after `epoch`."""
        return epoch + 1 == self.epochs or (epoch + 1) % self.validate_every == 0


def check_labels(settings: Settings, data: ImageDataset) -> None:
    """Raise `UserError` for data without anything to tell apart."""
    if not data.labelled:
        raise UserError(f"--data {settings.data} has one class; there is nothing to tell apart")


def initial_model(
    settings: Classifying, data: ImageDataset, weights: State, pretraining: Header
) -> ViT | SimMIMClassifier:
    """A classifier for `data`, with the encoder of ``--init`` where there is one.

    Of an autoencoder the last norm and the decoder are left behind; fc_norm and head are new.

    Raises:
        UserError: the encoder takes other images than `data` has, or tells other classes apart.
    """
    check_labels(settings, data)
    torch.manual_seed(settings.seed)  # of the new weights
    classes = len(data.classes)
    if not weights:
        return ViT(named_architecture(settings, data), classes, settings.drop_path)
    model = classifier_on(pretraining, classes, settings.drop_path)
    check_shape(settings, data, model.arch)
    if "num_classes" in pretraining:
        if settings.new_head:
            weights = {n: v for n, v in weights.items() if not n.startswith("head.")}
        elif pretraining["num_classes"] != classes:
            raise UserError(
                f"--init {settings.init} tells {pretraining['num_classes']} classes apart and "
                f"--data {settings.data} has {classes}; choose other data, or add --new-head"
            )
    take_over(model, weights)
    return model


def classifier_on(
    pretraining: Header, classes: int, drop_path: float = 0.0
) -> ViT | SimMIMClassifier:
    """A classifier with fresh weights, of the encoder that a header describes."""
    if pretraining["kind"].startswith("simmim"):
        return SimMIMClassifier(
            SimMIMArchitecture(**pretraining["architecture"]), classes, drop_path
        )
    pooling = pretraining.get("pooling", "mean")
    return ViT(Architecture(**pretraining["architecture"]), classes, drop_path, pooling)


def take_over(model: nn.Module, weights: State) -> None:
    """Copy those of `weights` that `model` has."""
    own = model.state_dict()
    shared = {name: value for name, value in weights.items() if name in own}
    model.load_state_dict(shared, strict=False)
