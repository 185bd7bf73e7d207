# SPDX-License-Identifier: Apache-2.0
"""Adversarial training of a ViT (Madry et al., 2018), by the recipe of NIM's Table 2.

You et al., 2023, take that of Mo et al., 2022: PGD-5 in l_inf against the model in eval mode, SGD,
gradients clipped at 1, mixup and CutMix at times; from scratch or from any checkpoint (``--init``).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nimfast import cli
from nimfast.data.base import ImageDataset
from nimfast.data.transforms import Augmentation
from nimfast.errors import UserError
from nimfast.ops import Stream, ascend, corrupt, image_keys
from train.classifiers import STARTS, Classifying, initial_model
from train.inputs import Inputs
from train.loop import ON_INTERRUPT, Run
from train.mixing import Mixing, one_hot
from train.settings import adopt, load_data, recipes


@dataclass(frozen=True)
class Adversarial(Classifying):
    """Settings of an adversarial training run; the defaults are NIM's."""

    sigma: str = "0"
    """no noise; the inputs are attacked instead"""
    eps: float = 4.0
    """radius of the attack in l_inf, in units of 1/255"""
    attack_steps: int = 5
    """steps of PGD; 0: no attack"""
    attack_step: float = 1.0
    """length of one, in units of 1/255"""
    random_start: bool = True
    """begin anywhere in the ball, not at the image"""
    validate_every: int = 1
    epochs: int = 20
    batch_size: int = 512
    lr: float = 0.1
    lr_batch: int = 512
    schedule: Literal["cosine", "multistep"] = "multistep"
    milestones: tuple[float, ...] = (0.75, 0.9)
    warmup: float = 0.0
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "sgd", "lars"] = "sgd"
    clip: float = 1.0
    drop_path: float = 0.0


RECIPES = {
    "pgd": {
        "pictures": Augmentation(crop="padded", padding=4, flip=True),
        "mixing": Mixing(mixup=0.8, cutmix=1.0, mix_probability=0.3, mix_order="before"),
    }
}


def adversarial(settings: Adversarial) -> None:
    """Train a classifier on attacked images and write its checkpoint.

    Raises:
        UserError: settings that cannot be used, or gradients that are no longer numbers.
    """
    check(settings)
    settings, weights, pretraining = adopt(settings, STARTS)
    data, held_out = load_data(settings, "train"), load_data(settings, "validation")
    model = initial_model(settings, data, weights, pretraining)
    inputs = Inputs(settings, data, mixing=settings.mixing)
    measured: dict[str, float] = {}
    with Run(model, settings, data, "train.adversarial", pretraining=pretraining) as run:
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                images, targets = inputs.mixed(batch, epoch, run.steps)
                keys = image_keys(settings.seed, Stream.TRAINING, batch.indices)
                attacked = pgd(run, inputs, images, targets, keys, epoch)
                with run.autocast():
                    logits = run.network(inputs.clean(attacked)).float()
                smoothing = settings.label_smoothing
                run.step(F.cross_entropy(logits, targets, label_smoothing=smoothing))
            measured = {}
            if settings.validates(epoch):
                measured = validate(run, held_out, inputs)
                if settings.choose == "best":
                    run.keep_best(epoch, measured, "robust")
            run.end_epoch(epoch, **measured)
        run.finish(validation=run.best or {"epoch": settings.epochs - 1, **measured})


def check(settings: Adversarial) -> None:
    """Raise `UserError` for what no adversarial training can use."""
    settings.check()
    if not 0 <= settings.eps <= 255 or settings.attack_step < 0 or settings.attack_steps < 0:
        raise UserError("--eps must lie in [0, 255], --attack-step and --attack-steps be positive")
    if 0 < settings.eps < 0.25:
        pixels = f"{settings.eps:g} of the range of pixels is --eps {255 * settings.eps:.4g}"
        warnings.warn(f"--eps is read as {settings.eps:g}/255; {pixels}", stacklevel=2)
    if settings.sigma != "0":
        raise UserError("--sigma: adversarial training adds no noise; train.finetune does")
    if settings.mixing.on and settings.mixing.mix_order != "before":
        raise UserError("--mix-order must be before: what is attacked is the mixed image")


def pgd(
    run: Run, inputs: Inputs, images: Tensor, targets: Tensor, keys: Tensor, sample: int
) -> Tensor:
    """Projected gradient descent against the model as it is now, in eval mode.

    Args:
        run: whose model is attacked, with the settings' radius and steps.
        inputs: how images reach it.
        images: ``[B, C, H, W]`` in [0, 1].
        targets: probabilities of the classes ``[B, K]``; attacked is their cross-entropy.
        keys: int64 ``[B]``, of the random start.
        sample: which start.

    Returns:
        fp32 ``[B, C, H, W]`` in [0, 1], within eps of `images`.
    """
    s = run.settings
    assert isinstance(s, Adversarial)
    eps = s.eps / 255
    if not s.attack_steps or not eps:
        return images
    x = images
    if s.random_start:
        # erf makes keyed normals uniform in (-1, 1), as a start of its own kernel would be.
        normal = corrupt(torch.zeros_like(images), keys, 1.0, first_sample=sample)
        x = (images + eps * torch.erf(normal / 2**0.5)).clamp(0, 1)
    training = run.model.training
    run.model.eval()
    for _ in range(s.attack_steps):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            with run.autocast():
                logits = run.model(inputs.clean(x)).float()
            loss = F.cross_entropy(logits, targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
        x = ascend(x, images, gradient, step=s.attack_step / 255, eps=eps)
    run.model.train(training)
    return x


@torch.no_grad()
def validate(run: Run, data: ImageDataset, inputs: Inputs) -> dict[str, float]:
    """Accuracy on clean and on attacked images; the starts are the same every time."""
    right = torch.zeros(3, dtype=torch.float64, device=run.device)  # clean, attacked, of how many
    with run.evaluation():
        for images, labels, indices in run.in_order(data, 64):
            right[2] += len(images)
            keys = image_keys(run.settings.seed, Stream.EVALUATION, indices)
            targets = one_hot(labels, len(data.classes))
            attacked = pgd(run, inputs, images, targets, keys, 0)
            for place, shown in enumerate((images, attacked)):
                with run.autocast():
                    logits = run.model(inputs.clean(shown))
                right[place] += (logits.argmax(1) == labels).sum()
    clean, robust, seen = run.world.total(right)
    return {"clean": float(clean / seen), "robust": float(robust / seen)}


if __name__ == "__main__":
    cli.run(
        adversarial,
        recipes(Adversarial, RECIPES),
        prog="python -m train.adversarial",
        description="Train a classifier on attacked images",
        on_interrupt=ON_INTERRUPT,
    )
