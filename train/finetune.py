# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for randomised smoothing: DMAE (Wu et al., 2023), section 3.3.

The classifier sees noisy images at the noise level it will be smoothed with. Recipe ``rs`` is plain
cross-entropy (Cohen et al., 2019); ``cr`` adds consistency regularisation (Jeong and Shin, 2020).
The command that made the embedded model stands in docs/embedded_model.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from nimfast import cli
from nimfast.corruption import Corruption, SigmaLaw
from nimfast.data.base import ImageDataset
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, State
from nimfast.models.vit import Architecture, ViT
from nimfast.ops import Stream, corrupt, image_keys, votes
from train.feed import in_order
from train.loop import ON_INTERRUPT, Run
from train.losses import consistency
from train.parallel import World
from train.settings import (
    Settings,
    adopt,
    check_shape,
    load_data,
    named_architecture,
    recipes,
)


@dataclass(frozen=True)
class Finetune(Settings):
    """Settings of a fine-tuning run; the defaults are DMAE's for ViT-B."""

    copies: int = 2
    """noisy copies m of each image in a batch"""
    consistency: float = 2.0
    """lambda: weight of the KL divergence between the copies' predictions and their mean"""
    entropy: float = 0.5
    """eta: weight of the mean prediction's entropy; 0.1 at sigma 1"""
    drop_path: float = 0.1
    """stochastic depth of the last block"""
    label_smoothing: float = 0.0
    """of the cross-entropy"""
    validate_every: int = 10
    """epochs between measurements on the validation split"""
    validation_votes: int = 32
    """noisy copies per image that vote there"""
    min_lr: float = 1e-6
    layer_decay: float = 0.65


RECIPES = {
    "cr": {"copies": 2, "consistency": 2.0, "entropy": 0.5},
    "rs": {"copies": 1, "consistency": 0.0, "entropy": 0.0},
}


def finetune(settings: Finetune) -> None:
    """Train a classifier and write its checkpoint.

    Raises:
        UserError: settings that cannot be used, or a loss that is no longer a number.
    """
    settings.check()
    law = SigmaLaw.parse(settings.sigma)
    if law.mean <= 0:
        raise UserError("--sigma must be positive: this classifier is for noisy images")
    if settings.copies < 1 or (settings.copies == 1 and settings.consistency > 0):
        raise UserError(f"--copies {settings.copies}: consistency compares at least 2 noisy copies")
    if settings.validate_every < 1 or settings.validation_votes < 1:
        raise UserError("--validate-every and --validation-votes must be at least 1")
    settings, encoder, pretraining = adopt(settings)
    if pretraining and pretraining["kind"] == "simmim":
        raise UserError(f"--init {settings.init} is a SimMIM; this classifier has MAE's encoder")
    data, held_out = load_data(settings, "train"), load_data(settings, "validation")
    if not data.labelled:
        raise UserError(f"--data {settings.data} has one class; there is nothing to tell apart")

    torch.manual_seed(settings.seed)  # of the new weights, and of drop path
    model = initial_model(settings, data, encoder, pretraining)
    corruption = Corruption(law, 0.0, settings.seed, settings.mean, settings.std)
    measured: dict[str, float] = {}
    entries = {"sigma": law.mean, "pretraining": pretraining}
    with Run(model, settings, data, "train.finetune", **entries) as run:
        for epoch in run.epochs():
            for images, labels, indices in run.batches(epoch):
                noisy = corruption.noisy(images, indices, epoch, copies=settings.copies)
                with run.autocast():
                    logits = run.network(noisy).float()
                target = labels.repeat_interleave(settings.copies)
                loss = F.cross_entropy(logits, target, label_smoothing=settings.label_smoothing)
                if settings.consistency or settings.entropy:
                    copies = logits.view(len(images), settings.copies, -1)
                    loss = loss + consistency(copies, settings.consistency, settings.entropy)
                run.step(loss)
            last = epoch + 1 == settings.epochs
            if last or (epoch + 1) % settings.validate_every == 0:
                measured = validate(model, held_out, settings, law.mean, run.world)
                run.end_epoch(epoch, **measured)
            else:
                run.end_epoch(epoch)
        run.finish(validation=measured)


def initial_model(
    settings: Finetune, data: ImageDataset, encoder: State, pretraining: Header
) -> ViT:
    """A classifier for `data`, with the pretrained encoder where there is one.

    The encoder's final norm and the decoder are left behind; fc_norm and head are new.

    Raises:
        UserError: the encoder takes other images than `data` has.
    """
    if not encoder:
        return ViT(named_architecture(settings, data), len(data.classes), settings.drop_path)
    arch = Architecture(**pretraining["architecture"])
    check_shape(settings, data, arch)
    model = ViT(arch, len(data.classes), settings.drop_path)
    own = model.state_dict()
    shared = {name: value for name, value in encoder.items() if name in own}
    model.load_state_dict(shared, strict=False)
    return model


@torch.inference_mode()
def validate(
    model: ViT, data: ImageDataset, settings: Finetune, sigma: float, world: World
) -> dict[str, float]:
    """Accuracy on clean images and of the vote at `sigma`, and the mean share of right votes."""
    model.eval()
    noisy = partial(corrupt, mean=settings.mean, std=settings.std)
    samples = settings.validation_votes
    device = world.device
    right = torch.zeros(3, dtype=torch.float64, device=device)  # clean, vote, single votes
    for images, labels, indices in in_order(data, 64, world):
        keys = image_keys(settings.seed, Stream.EVALUATION, indices)
        clean = model(noisy(images, keys, 0.0)).argmax(1)
        counts = torch.zeros(len(images), model.num_classes + 1, dtype=torch.int64, device=device)
        votes(model(noisy(images, keys, sigma, samples=samples)), counts)
        right[0] += (clean == labels).sum()
        right[1] += (counts.argmax(1) == labels).sum()
        right[2] += counts.gather(1, labels[:, None]).sum() / samples
    model.train()
    shares = (world.total(right) / len(data)).tolist()
    return dict(zip(("clean", "vote", "right_votes"), shares, strict=True))


if __name__ == "__main__":
    cli.run(
        finetune,
        recipes(Finetune, RECIPES),
        prog="python -m train.finetune",
        description="Fine-tune a classifier for randomised smoothing by a recipe: cr or rs",
        on_interrupt=ON_INTERRUPT,
    )
