# SPDX-License-Identifier: Apache-2.0
"""Does the attack do what a working attack does? Findings from attacks on a few images, and from
their final points.

A stronger attack that leaves a larger margin than a weaker one is broken, or the model's gradient
misleads it. Margins are compared image by image: they tell with 16 images what the share of broken
ones would tell with hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nimfast.attacks.apgd import APGD
from nimfast.attacks.checks import Finding
from nimfast.attacks.engine import Attack, Norm
from nimfast.attacks.judge import judge
from nimfast.attacks.pgd import FGSM, PGD
from nimfast.attacks.square import Square
from nimfast.attacks.target import Target

# Draws of each point that are judged, where the model is random.
_DRAWS = 8
# Standard errors beyond which a difference counts, and its least size among the clean margins.
_SIGNIFICANT, _RELEVANT = 3.0, 0.05
# Share of images that may survive where any image is allowed.
_ALIVE = 0.1
_QUERIES = 100


def check_attack(
    target: Target,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    *,
    eps: float,
    norm: Norm,
    eot: int,
    steps: int,
    randomised: bool,
    seed: int,
) -> list[Finding]:
    """Attack a few images by PGD (l1: APGD), harder, less hard and in other ways, and compare.

    Args:
        target: the model.
        x: some clean images ``[B, C, H, W]``; 8 to 32 are enough.
        y: their labels, int64 ``[B]``.
        indices: their places in the data set, int64 ``[B]``.
        eps, norm: the ball.
        eot, steps: of the gradient attacks that are to be trusted.
        randomised: whether the model draws.
        seed: of all draws.
    """
    draws = _DRAWS if randomised else 1
    common: dict[str, Any] = {"norm": norm, "eps": eps, "seed": seed}

    def seen(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        verdict = judge(target, points, y, indices, draws=draws, seed=seed)
        return verdict.margin, verdict.loss, verdict.right.double().mean(1)

    def left(attack: Attack) -> Tensor:
        return seen(attack(target, x, y, indices))[0]

    # In l1 there are no steps of one length, and neither FGSM nor Square.
    name, make = ("APGD", APGD) if norm == "l1" else ("PGD", PGD)
    clean, loss, _ = seen(x)
    margin, loss_after, _ = seen(make(steps=steps, eot=eot, **common)(target, x, y, indices))
    everything: dict[str, Any] = {**common, "eps": whole_box(x, norm)}
    anything = make(steps=20, eot=eot, **everything)
    alive = float(seen(anything(target, x, y, indices))[2].mean())
    found = [
        _flat(loss, loss_after),
        _alive(alive),
        weaker(f"{name}-{4 * steps}", f"{name}-{steps}",
               left(make(steps=4 * steps, eot=eot, **common)), margin,
               clean, "more steps make it weaker: lower the step size, or doubt the gradient"),
    ]  # fmt: skip
    if norm != "l1":
        found += [
            weaker(f"PGD-{steps}", "FGSM", margin, left(FGSM(eot=eot, **common)), clean,
                   "the gradient holds for one step only: it is masked; try smaller steps and "
                   "Square"),
            weaker(f"PGD-{steps}", "Square", margin,
                   left(Square(steps=_QUERIES, eot=min(eot, 4), **common)), clean,
                   "a search without gradients does better: gradients are masked; trust Square, "
                   "and look for rounding, saturation or randomness in the model"),
        ]  # fmt: skip
    if randomised and eot > 1:
        single = left(make(steps=steps, **common))
        advice = "more draws make it weaker: something other than noise changes between draws"
        found.append(
            weaker(f"{name} at EOT {eot}", f"{name} at EOT 1", margin, single, clean, advice)
        )
    return [finding for finding in found if finding]


def whole_box(x: Tensor, norm: Norm) -> float:
    """Radius of a ball that holds every image."""
    values = x[0].numel()
    return {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values)}[norm]


def _flat(before: Tensor, after: Tensor) -> Finding | None:
    flat = int((after - before <= 1e-7).sum())
    if 2 * flat <= len(before):
        return None
    return Finding(
        "flat loss",
        f"the loss of {flat} of {len(before)} images is not higher after the attack than before: "
        "it goes nowhere; look at the gradients, the step size and the loss",
    )


def _alive(share: float) -> Finding | None:
    if share <= _ALIVE:
        return None
    return Finding(
        "eps 1",
        f"{share:.0%} of the draws are right after PGD in a ball that holds every image, where "
        "none should be: gradients mislead; the accuracies at a smaller eps are not to be trusted",
    )


def weaker(
    strong: str, weak: str, left: Tensor, by_weak: Tensor, clean: Tensor, advice: str
) -> Finding | None:
    """A finding where the attack `strong` leaves larger margins than `weak`, beyond chance.

    Args:
        strong, weak: names.
        left, by_weak, clean: margins ``[B]`` after the one, after the other, and before.
        advice: what it means, and what to do.
    """
    # An attack may stop where the image is broken: how far below zero it got says nothing.
    difference = (left.clamp(min=0) - by_weak.clamp(min=0)).double()
    mean = float(difference.mean())
    if not len(difference) > 1 or mean <= _RELEVANT * float(clean.double().abs().mean()):
        return None
    error = float(difference.std()) / math.sqrt(len(difference))
    if mean <= _SIGNIFICANT * error:
        return None
    return Finding(f"{strong} below {weak}", f"{strong} is weaker than {weak}; {advice}")


def check_points(x: Tensor, points: Tensor, *, eps: float, norm: Norm) -> list[Finding]:
    """Final points that lie outside the ball or the box, in float64, as they are and in 8 bits.

    Args:
        x: clean images ``[B, C, H, W]``.
        points: final points.
        eps, norm: the ball.
    """
    found = []
    rounded = on_grid(x, points, eps=eps, norm=norm)
    for name, values in (("", points), (" rounded to 8 bits", rounded)):
        outside = ~inside(x, values, eps=eps, norm=norm)
        if outside.any():
            found.append(
                Finding(
                    f"points{name}",
                    f"{int(outside.sum())} of {len(x)} final points{name} lie outside the ball or "
                    "the box: the attack is not allowed them; a fault of the attack, report it"
                    if not name
                    else f"{int(outside.sum())} of {len(x)} final points lie outside the ball once "
                    "rounded to 8 bits: the clean images are no 8-bit images or eps is below "
                    "1/255; as files they are no valid attacks",
                )
            )
    return found


def distance(x: Tensor, points: Tensor, norm: Norm) -> Tensor:
    """Distance of each point from its clean image, fp64 ``[B]``."""
    away = (points.double() - x.double()).flatten(1)
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    found: Tensor = torch.linalg.vector_norm(away, order, dim=1)
    return found


def inside(x: Tensor, points: Tensor, *, eps: float, norm: Norm) -> Tensor:
    """Whether each point lies in ball and box, bool ``[B]``; fp32 rounding is allowed for."""
    # x + eps in fp32 is off by half a unit in the last place, 2^-25 below 1; sums by more.
    slack = 2.0**-24 if norm == "linf" else 1e-5 * eps
    box = ((points >= 0) & (points <= 1)).flatten(1).all(1)
    return box & (distance(x, points, norm) <= eps + slack)


def on_grid(x: Tensor, points: Tensor, *, eps: float, norm: Norm) -> Tensor:
    """Points as 8-bit images, rounded so that they stay in the ball where that can be.

    To the nearest of the 256 levels that the ball allows (linf), or towards the clean image.

    Returns:
        fp32 like `points`, multiples of 1/255.
    """
    clean, level = 255 * x.double(), 255 * points.double()
    if norm == "linf":
        # What is a level but for rounding is that level.
        low, high = (clean - 255 * eps - 1e-4).ceil(), (clean + 255 * eps + 1e-4).floor()
        nearest = level.round()
        level = torch.where(low <= high, torch.minimum(torch.maximum(nearest, low), high), nearest)
    else:
        towards = torch.where(level > clean, (level + 1e-4).floor(), (level - 1e-4).ceil())
        level = torch.where(level == clean, level.round(), towards)
    return (level.clamp(0, 255) / 255).float()


def check_results(margins: Mapping[str, np.ndarray], white_box: str) -> list[Finding]:
    """Compare the attacks of a finished run, image by image.

    Args:
        margins: attack -> margins left, fp64 ``[B]``, all of the same images; ``none``: clean ones.
        white_box: the strongest white-box attack that was asked for.
    """
    clean = torch.as_tensor(margins["none"])
    found = []
    for name, left in margins.items():
        if name in ("none", white_box) or white_box not in margins:
            continue
        advice = {
            "bare": "an attack on the classifier alone transfers better: the defence's gradient "
            "misleads; trust the transfer",
            "bpda": "the gradient around the denoiser is better than the one through it: the "
            "denoiser masks gradients; trust BPDA",
        }.get(name.partition(":")[0], "the stronger attack should win: more steps, other losses")
        after, by_other, before = torch.as_tensor(margins[white_box]), torch.as_tensor(left), clean
        if white_box.startswith("aa-"):  # it gives back what it cannot break: only verdicts count
            after, by_other, before = ((m > 0).double() for m in (after, by_other, before))
        found.append(weaker(white_box, name, after, by_other, before, advice))
    return [finding for finding in found if finding]


def check_readings(
    attack: str,
    draws: int,
    hits: Sequence[int],
    hits_8bit: Sequence[int],
    hits_low: Sequence[int | None],
) -> list[Finding]:
    """Compare what was judged in fp32 with the same points in 8 bits, and at lower precision.

    Args:
        attack: its name.
        draws: of each image.
        hits, hits_8bit, hits_low: draws that are right, for each image; see `records.Row`.
    """
    total = draws * len(hits)
    found = []
    gained = np.array(hits_8bit) - np.array(hits)
    if gained.sum() > 0.02 * total and gained.mean() > _SIGNIFICANT * _error(gained):
        found.append(
            Finding(
                "8 bits",
                f"after {attack} {sum(hits) / total:.1%} of the draws are right, and "
                f"{sum(hits_8bit) / total:.1%} once the points are rounded to 8 bits: part of the "
                "attack is smaller than a level; for images in files the second is the number",
            )
        )
    if all(low is not None for low in hits_low):
        differ = int(np.abs(np.array(hits_low, dtype=int) - np.array(hits)).sum())
        if differ > 0.01 * total:
            found.append(
                Finding(
                    "precision",
                    f"after {attack} at least {differ} of {total} verdicts are others at the "
                    "attack's precision than in fp32 (which counts): attack with --precision fp32",
                )
            )
    return found


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
