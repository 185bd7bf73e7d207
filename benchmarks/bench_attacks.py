# SPDX-License-Identifier: Apache-2.0
"""Whole attacks against torchattacks: the same model, images, budget, and robust accuracy.

pytest benchmarks/bench_attacks.py --results benchmarks/results/NAME.json

Every row also gives the gradients per second, what share that is of the rate at which the model
alone goes forward and backward (same precision and batch; no attack), and the robust accuracy in
percent: of a randomised model the mean over 20 fresh draws.
"""

import time
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nimfast
from nimfast import data
from nimfast.attacks import APGD, FAB, PGD, Ensemble, Target, plan
from nimfast.defense import De3
from nimfast.models import MAE
from nimfast.models.vit import ARCHITECTURES
from nimfast.ops import Stream, image_keys, vote_loss

torchattacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks")

EPS, IMAGES, DRAWS = 16 / 255, 64, 20


def de3() -> tuple[nn.Module, Tensor, Tensor]:
    images = data.load("digits", "test")
    chosen = [images[i] for i in range(0, 4 * IMAGES, 4)]
    x, y = torch.stack([image for image, _ in chosen]), torch.tensor([label for _, label in chosen])
    return nimfast.load("de3:digits+digits?sigma=70"), x, y


def vit_tiny() -> tuple[nn.Module, Tensor, Tensor]:
    # Speed does not depend on the weights, so none are downloaded; its accuracy means nothing.
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)
    x = torch.rand(8, 3, 32, 32)
    return model.eval(), x, model(x).argmax(1)


def de3_tiny() -> tuple[nn.Module, Tensor, Tensor]:
    classifier, x, _ = vit_tiny()
    arch = replace(
        ARCHITECTURES["tiny"], image_size=(32, 32), patch=4, decoder_width=96, decoder_depth=2,
        decoder_heads=3,
    )  # fmt: skip
    half = (0.5, 0.5, 0.5)
    model = De3(MAE(arch), classifier, sigma=70.0, stats="noisy", mean=half, std=half)
    return model, x[:2], model(x[:2]).argmax(1)


def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    _, x, y = de3()
    return nimfast.load("digits"), x, y


MODELS = {
    "the embedded classifier": classifier,
    "De3 of the embedded models, sigma 70": de3,
    "timm vit_tiny, 32x32, patch 4": vit_tiny,
    "De3 of two ViT-tiny, sigma 70": de3_tiny,
}
CASES = [
    ("PGD-10", "timm vit_tiny, 32x32, patch 4"),
    ("PGD-10", "De3 of the embedded models, sigma 70"),
    ("APGD-CE, 2 steps, EOT 20", "De3 of two ViT-tiny, sigma 70"),
    ("APGD-CE, 10 steps", "De3 of the embedded models, sigma 70"),
    ("rand, 10 steps, EOT 20", "De3 of the embedded models, sigma 70"),
    ("FAB-T, 10 steps, 9 classes", "the embedded classifier"),
]


def theirs(attack: str, model: nn.Module) -> Any:
    if attack == "PGD-10":
        return torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10)
    if attack == "APGD-CE, 10 steps":
        return torchattacks.APGD(model, eps=EPS, steps=10)
    if attack == "APGD-CE, 2 steps, EOT 20":
        return torchattacks.APGD(model, eps=EPS, steps=2, eot_iter=DRAWS)
    if attack == "FAB-T, 10 steps, 9 classes":
        return torchattacks.FAB(model, eps=EPS, steps=10, multi_targeted=True, n_classes=10)
    return torchattacks.AutoAttack(model, eps=EPS, version="rand", n_classes=10)


def ours(attack: str) -> Any:
    if attack == "PGD-10":
        return PGD(eps=EPS, steps=10, step_size=EPS / 4)
    if attack == "APGD-CE, 10 steps":
        return APGD(eps=EPS, steps=10)
    if attack == "APGD-CE, 2 steps, EOT 20":
        return APGD(eps=EPS, steps=2, eot=DRAWS)
    if attack == "FAB-T, 10 steps, 9 classes":
        return FAB(eps=EPS, steps=10, leave=True)
    return Ensemble(tuple(plan("rand", "nim", norm="linf", eps=EPS, classes=10)), fair=True)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    keys = image_keys(0, Stream.EVALUATION, torch.arange(len(x), device=x.device))
    target = Target(model)
    draws = DRAWS if target.keyed else 1
    missed = target.loss(x, y, keys=keys, samples=draws).missed
    return 100 * (1 - float(missed.sum()) / (draws * len(x)))


def model_seconds(target: Target, x: Tensor, y: Tensor, samples: int, finish: Any) -> float:
    """Seconds of one forward and backward per row, by the model alone."""
    model, rows = target.prepared, min(len(x) * samples, target.rows_at_once)
    images = min(len(x), max(1, rows // samples))
    leaf, labels = x[:images].clone(), y[:images]
    keys = image_keys(0, Stream.ATTACK, torch.arange(images, device=x.device))
    times = []
    for _ in range(5):
        finish()
        begin = time.perf_counter()
        leaf.requires_grad_()
        keyed = target.keyed
        logits: Any = model.draw(leaf, keys, samples) if keyed else model(leaf.to(target.dtype))  # type: ignore[operator]
        torch.autograd.grad(vote_loss(logits.float(), labels)[0].sum(), leaf)
        finish()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2] / (images * samples)


@pytest.mark.parametrize("who", ["published", "fp32", "bf16"])
@pytest.mark.parametrize(("attack", "name"), CASES)
def test_attack(benchmark, device, finish, attack: str, name: str, who: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"{attack} on {name}"
    model, x, y = MODELS[name]()
    model, x, y = model.to(device).requires_grad_(False), x.to(device), y.to(device)
    target = Target(model, precision="bf16" if who == "bf16" else "fp32", packed=True)
    found = []
    if who == "published":
        attacker = theirs(attack, model)

        def run() -> None:
            found.append(attacker(x, y))
            finish()
    else:
        chosen = ours(attack)

        def run() -> None:
            result = chosen.run(target, x, y)
            found.append((result[0] if isinstance(chosen, Ensemble) else result).x_adv)
            finish()

    target.gradient(x, y, keys=torch.arange(len(x), device=x.device))  # warms up
    target.gradients = 0
    rounds = 1 if "EOT" in attack else 3
    benchmark.pedantic(run, rounds=rounds)
    seconds = benchmark.stats.stats.median
    if who != "published":
        samples = DRAWS if "EOT" in attack else 1
        gradients = target.gradients / rounds
        benchmark.extra_info["gradients/s"] = gradients / seconds
        alone = model_seconds(target, x, y, samples, finish) * gradients
        benchmark.extra_info["of the model's rate"] = alone / seconds
    benchmark.extra_info["robust %"] = accuracy(model, found[-1], y)
