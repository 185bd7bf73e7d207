# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by the recipes of both papers; the first word names one.

``rs`` and ``cr`` train on noisy images for randomised smoothing (DMAE: Wu et al., 2023, section
3.3): plain cross-entropy (Cohen et al., 2019), or with consistency regularisation (Jeong and Shin,
2020). ``denoised`` trains on what a frozen autoencoder makes of noisy images, as De3 will show them
(NIM: You et al., 2023, section 4.3); ``noisy`` leaves the autoencoder out, ``clean`` the noise too.
docs/finetuning.md has a tour.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nimfast import cli
from nimfast.data.base import ImageDataset
from nimfast.data.transforms import Augmentation
from nimfast.errors import UserError
from nimfast.ops import votes
from nimfast.restoration import Stats
from train.classifiers import STARTS, Classifying, initial_model
from train.inputs import Denoiser, Inputs
from train.loop import ON_INTERRUPT, Run
from train.losses import consistency
from train.mixing import Mixing
from train.settings import adopt, load_data, recipes


@dataclass(frozen=True)
class Finetune(Classifying):
    """Settings of a fine-tuning run."""

    copies: int = 2
    """noisy copies m of each image in a batch"""
    consistency: float = 2.0
    """lambda: weight of the KL divergence between the copies' predictions and their mean"""
    entropy: float = 0.5
    """eta: weight of the mean prediction's entropy; 0.1 at sigma 1"""
    denoise: bool = False
    """show the classifier what a frozen autoencoder makes of noisy images"""
    denoiser: Path | None = None
    """the autoencoder (default: that of --init)"""
    stats: Stats | None = None
    """where its patches' mean and variance come from (default: noisy with norm_pix, else none)"""
    validation_votes: int = 100
    """noisy copies per image that vote there"""
    validation_sigma: float | None = None
    """noise level of these, in pixel units (default: the mean of the training's)"""
    min_lr: float = 1e-6
    layer_decay: float = 0.65


_IMAGENET: dict[str, Any] = {
    "pictures": Augmentation(
        crop="resized", crop_scale=(0.08, 1.0), flip=True, rand_augment="rand-m9-mstd0.5-inc1"
    ),
    "label_smoothing": 0.1,
}
_DMAE = {**_IMAGENET, "mixing": Mixing(mixup=0.8, cutmix=1.0)}
_NIM = {
    **_IMAGENET,
    "mixing": Mixing(mixup=0.8, cutmix=1.0, mix_order="before"),
    "sigma": "uniform(0,30)/255",
    "lr": 1e-3,
    "layer_decay": 0.75,
    "validation_votes": 10,
}
_RS = {"copies": 1, "consistency": 0.0, "entropy": 0.0}
_CR = {"copies": 2, "consistency": 2.0, "entropy": 0.5}
_CIFAR10 = {"epochs": 50, "batch_size": 256, "pictures": Augmentation(flip=True)}

RECIPES: dict[str, dict[str, Any]] = {
    "rs": {**_RS, **_DMAE},
    "cr": {**_CR, **_DMAE},
    "rs-cifar10": {**_RS, **_CIFAR10},
    "cr-cifar10": {**_CR, **_CIFAR10},
    "denoised": {**_RS, **_NIM, "denoise": True},
    "noisy": {**_RS, **_NIM},
    "clean": {**_RS, **_NIM, "sigma": "0"},
}


def finetune(settings: Finetune) -> None:
    """Train a classifier and write its checkpoint.

    Raises:
        UserError: settings that cannot be used, or gradients that are no longer numbers.
    """
    check(settings)
    settings, weights, pretraining = adopt(settings, STARTS)
    data, held_out = load_data(settings, "train"), load_data(settings, "validation")
    model = initial_model(settings, data, weights, pretraining)
    inputs = Inputs(
        settings,
        data,
        copies=settings.copies,
        mixing=settings.mixing,
        denoiser=denoiser_of(settings, data),
        level=settings.validation_sigma,
        patch=model.arch.patch,
    )
    by = "vote" if inputs.noise else "clean"
    entries = {**inputs.entries(), "pretraining": pretraining}
    measured: dict[str, float] = {}
    with Run(model, settings, data, "train.finetune", **entries) as run:
        inputs.to(run.device)
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                noisy, targets = inputs(batch, epoch, run.steps, run.autocast)
                with run.autocast():
                    logits = run.network(noisy).float()
                run.step(loss_of(logits, targets, settings))
            measured = {}
            if settings.validates(epoch):
                measured = validate(run, held_out, inputs, settings.validation_votes)
                if settings.choose == "best":
                    run.keep_best(epoch, measured, by)
            run.end_epoch(epoch, **measured)
        run.finish(validation=run.best or {"epoch": settings.epochs - 1, **measured})


def check(settings: Finetune) -> None:
    """Raise `UserError` for what no fine-tuning can use."""
    settings.check()
    s = settings
    regular = s.consistency > 0 or s.entropy > 0
    if s.copies < 1 or s.consistency < 0 or s.entropy < 0:
        raise UserError("--copies must be at least 1, --consistency and --entropy at least 0")
    if regular and s.copies < 2:
        raise UserError(
            f"--copies {s.copies}: consistency compares at least 2 noisy copies; give --copies 2, "
            "or --consistency 0 --entropy 0"
        )
    if regular and s.mixing.on and s.mixing.mix_mode == "elem":
        raise UserError(
            "--mix-mode elem mixes each copy of an image differently, which consistency would "
            "punish; give --mix-mode batch"
        )
    if s.validation_votes < 1:
        raise UserError(f"--validation-votes must be at least 1, not {s.validation_votes}")


def denoiser_of(settings: Finetune, data: ImageDataset) -> Denoiser | None:
    """The autoencoder that ``--denoise`` asks for; None without."""
    path = settings.denoiser or settings.init
    if not settings.denoise:
        return None
    if path is None:
        raise UserError("--denoise needs an autoencoder: give --denoiser, or --init")
    return Denoiser(path, settings.stats, data)


def loss_of(logits: Tensor, targets: Tensor, settings: Finetune) -> Tensor:
    """Cross-entropy over all copies, and the consistency of the copies.

    Args:
        logits: fp32 ``[B * m, K]``, image-major.
        targets: probabilities ``[B, K]``.
        settings: m, weights and label smoothing.
    """
    s = settings
    repeated = targets.repeat_interleave(s.copies, 0)
    loss = F.cross_entropy(logits, repeated, label_smoothing=s.label_smoothing)
    if s.consistency or s.entropy:
        copies = logits.view(len(targets), s.copies, -1)
        loss = loss + consistency(copies, s.consistency, s.entropy)
    return loss


@torch.inference_mode()
def validate(run: Run, data: ImageDataset, inputs: Inputs, samples: int) -> dict[str, float]:
    """Accuracy on clean images and of the vote under noise, and the mean share of right votes.

    The noise is the same every time. Without noise: accuracy on clean images alone.
    """
    # Clean, vote, single votes; of how many.
    right = torch.zeros(4, dtype=torch.float64, device=run.device)
    classes = len(data.classes)
    rows = max(64, run.settings.split_batch(run.world.size)[0])  # at once
    with run.evaluation():
        for images, labels, indices in run.in_order(data, 64):
            right[3] += len(images)
            with run.autocast():
                clean = run.model(inputs.clean(images)).argmax(1)
            right[0] += (clean == labels).sum()
            if not inputs.noise:
                continue
            counts = torch.zeros(len(images), classes + 1, dtype=torch.int64, device=run.device)
            step = max(1, rows // len(images))
            for first in range(0, samples, step):
                noisy = inputs.samples(
                    images, indices, min(step, samples - first), first, run.autocast
                )
                with run.autocast():
                    logits = run.model(noisy)
                votes(logits, counts)
            right[1] += (counts.argmax(1) == labels).sum()
            right[2] += counts.gather(1, labels[:, None]).sum() / samples
    total = run.world.total(right)
    shares = (total[:3] / total[3]).tolist()
    names = ("clean", "vote", "right_votes") if inputs.noise else ("clean",)
    return dict(zip(names, shares, strict=False))


if __name__ == "__main__":
    cli.run(
        finetune,
        recipes(Finetune, RECIPES),
        prog="python -m train.finetune",
        description="Fine-tune a classifier by a recipe",
        on_interrupt=ON_INTERRUPT,
    )
