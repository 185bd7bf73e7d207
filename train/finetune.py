# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for randomised smoothing: DMAE (Wu et al., 2023), section 3.3.

The classifier sees noisy images at the noise level it will be smoothed with. Recipe ``rs`` is plain
cross-entropy (Cohen et al., 2019); ``cr`` adds consistency regularisation (Jeong and Shin, 2020).
The command that made the embedded model stands in docs/embedded_model.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nimfast import cli
from nimfast.corruption import Corruption, SigmaLaw
from nimfast.data.base import ImageDataset
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, State, read_checkpoint
from nimfast.models.vit import Architecture, ViT
from nimfast.ops import Stream, corrupt, image_keys, votes
from train.loop import Run, Settings, batches, load_data, named_architecture, recipes
from train.losses import consistency


@dataclass(frozen=True)
class Finetune(Settings):
    """Settings of a fine-tuning run; the defaults are DMAE's for ViT-B."""

    init: Path | None = None
    """pretrained autoencoder of train.pretrain; architecture and normalisation are its"""
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
    data, held_out = load_data(settings, "train"), load_data(settings, "validation")

    torch.manual_seed(settings.seed)  # of the new weights, and of drop path
    model = initial_model(settings, data, encoder, pretraining)
    corruption = Corruption(law, 0.0, settings.seed, settings.mean, settings.std)
    measured: dict[str, float] = {}
    with Run(model, settings, len(data)) as run:
        for epoch in range(settings.epochs):
            for images, labels, indices in batches(data, settings, epoch, run.device):
                noisy, _, _ = corruption(images, indices, epoch, copies=settings.copies)
                with run.autocast():
                    logits = model(noisy).float()
                target = labels.repeat_interleave(settings.copies)
                loss = F.cross_entropy(logits, target, label_smoothing=settings.label_smoothing)
                if settings.consistency or settings.entropy:
                    copies = logits.view(len(images), settings.copies, -1)
                    loss = loss + consistency(copies, settings.consistency, settings.entropy)
                run.step(loss)
            last = epoch + 1 == settings.epochs
            if last or (epoch + 1) % settings.validate_every == 0:
                measured = validate(model, held_out, settings, law.mean, run.device)
                run.end_epoch(epoch, **measured)
            else:
                run.end_epoch(epoch)
        run.save(
            "train.finetune", data, sigma=law.mean, validation=measured, pretraining=pretraining
        )


def adopt(settings: Finetune) -> tuple[Finetune, State, Header]:
    """Settings with the model and the normalisation of ``--init``, its weights and its header.

    Without ``--init``: the settings as they are, and nothing.

    Raises:
        UserError: the file is no autoencoder of ours.
    """
    if settings.init is None:
        return settings, {}, {}
    state, header = read_checkpoint(settings.init)
    if header.get("kind") != "autoencoder":
        raise UserError(f"--init {settings.init} is not an autoencoder written by train.pretrain")
    mean, std = tuple(header["mean"]), tuple(header["std"])
    model = header["settings"]["model"]
    return replace(settings, model=model, mean=mean, std=std), state, header


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
    if (arch.channels, *arch.image_size) != data.shape:
        wanted = "x".join(map(str, (arch.channels, *arch.image_size)))
        raise UserError(f"--init {settings.init} takes {wanted} images; choose such --data")
    model = ViT(arch, len(data.classes), settings.drop_path)
    own = model.state_dict()
    shared = {name: value for name, value in encoder.items() if name in own}
    model.load_state_dict(shared, strict=False)
    return model


@torch.inference_mode()
def validate(
    model: ViT, data: ImageDataset, settings: Finetune, sigma: float, device: torch.device
) -> dict[str, float]:
    """Accuracy on clean images and of the vote at `sigma`, and the mean share of right votes."""
    model.eval()
    noisy = partial(corrupt, mean=settings.mean, std=settings.std)
    samples = settings.validation_votes
    clean_right = vote_right = right_votes = 0.0
    for start in range(0, len(data), 64):
        indices = torch.arange(start, min(start + 64, len(data)), device=device)
        images, labels = _stack(data, indices, device)
        keys = image_keys(settings.seed, Stream.EVALUATION, indices)
        clean = model(noisy(images, keys, 0.0)).argmax(1)
        counts = torch.zeros(len(images), model.num_classes + 1, dtype=torch.int64, device=device)
        votes(model(noisy(images, keys, sigma, samples=samples)), counts)
        clean_right += (clean == labels).sum().item()
        vote_right += (counts.argmax(1) == labels).sum().item()
        right_votes += counts.gather(1, labels[:, None]).sum().item() / samples
    model.train()
    return {
        "clean": clean_right / len(data),
        "vote": vote_right / len(data),
        "right_votes": right_votes / len(data),
    }


def _stack(data: ImageDataset, indices: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = [data[index] for index in indices.tolist()]
    images = torch.stack([image for image, _ in pairs]).to(device)
    return images, torch.tensor([label for _, label in pairs], device=device)


if __name__ == "__main__":
    cli.run(
        finetune,
        recipes(Finetune, RECIPES),
        prog="python -m train.finetune",
        description="Fine-tune a classifier for randomised smoothing by a recipe: cr or rs",
    )
