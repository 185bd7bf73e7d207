# SPDX-License-Identifier: Apache-2.0
"""Projections and points: nearest, and inside ball and box."""

from typing import Any

import numpy as np
import pytest
import torch
from attacked_models import SHAPE, Curved, images, labels_of

from nimfast.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    Attack,
    Square,
    confine,
    distance,
    to_8_bits,
)
from nimfast.attacks.geometry import project_l1, to_hyperplane


def test_projection_on_l1_ball_and_box() -> None:
    origin = images(6)
    x = origin + torch.randn(origin.shape, generator=torch.Generator().manual_seed(2))
    for eps in (0.1, 5.0, 60.0, 500.0):
        found = project_l1(x, origin, eps)
        assert distance(found.double(), origin.double(), "l1").max() <= eps + 1e-4
        # Nearest: by bisection for the multiplier, in float64.
        away, start = (x - origin).double(), origin.double()
        room = torch.where(away > 0, 1 - start, start)
        low, high = torch.zeros(6, 1, 1, 1).double(), away.abs().amax((1, 2, 3), keepdim=True)
        for _ in range(100):
            middle = (low + high) / 2
            size = torch.minimum((away.abs() - middle).clamp(min=0), room).sum((1, 2, 3), True)
            low, high = torch.where(size > eps, middle, low), torch.where(size > eps, high, middle)
        size = torch.minimum((away.abs() - low).clamp(min=0), room)
        if eps == 500.0:  # more than the box allows
            assert torch.equal(found, x.clamp(0, 1))
        assert torch.allclose(found.double(), start + away.sign() * size, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_step_to_a_hyperplane_is_the_shortest(norm: str) -> None:
    x, normal = images(5), torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))
    rise = torch.tensor([1.0, -3.0, 0.0, 20.0, 1e6])
    step = to_hyperplane(x, normal, rise, norm)
    assert (x + step).min() >= -1e-6 and (x + step).max() <= 1 + 1e-6
    gained = (normal.double() * step.double()).flatten(1).sum(1)
    assert torch.allclose(gained[:4], rise[:4].double(), atol=1e-4)
    best = torch.where(normal > 0, 1 - x, x)[4]  # out of reach: as far as the box allows
    assert torch.allclose(step[4].abs(), best, atol=1e-6)
    for i in (0, 1, 3):
        w = normal[i].flatten().double().numpy() * np.sign(rise[i].item())
        room = np.where(w > 0, 1 - x[i].flatten().numpy(), x[i].flatten().numpy())
        low, high = 0.0, 1e6
        for _ in range(200):  # the multiplier of the constraint, by bisection
            middle = (low + high) / 2
            move = np.minimum(middle * (np.abs(w) if norm == "l2" else 1.0), room)
            low, high = (middle, high) if np.abs(w) @ move < abs(rise[i]) else (low, middle)
        order = 2 if norm == "l2" else np.inf
        size = np.linalg.norm(step[i].flatten().numpy(), order)
        assert size == pytest.approx(np.linalg.norm(move, order), rel=1e-4)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 4 / 255), ("l2", 0.5), ("l1", 6.0)])
def test_points_are_sound_in_float64_and_in_8_bits(norm: Any, eps: float) -> None:
    model, x = Curved(), images(16)
    y = labels_of(model, x)
    attacks: list[Attack] = [APGD(eps=eps, norm=norm, steps=8)]
    if norm != "l1":
        attacks += [PGD(eps=eps, norm=norm), FAB(eps=eps, norm=norm, steps=5, targets=2)]
        attacks += [Square(eps=eps, norm=norm, steps=40), FGSM(eps=eps, norm=norm)]
    for attack in attacks:
        adv = attack(model, x, y)
        assert (adv != x).any()
        assert adv.min() >= 0 and adv.max() <= 1
        assert (distance(adv.double(), x.double(), norm) <= eps).all()
        bits = to_8_bits(adv, x, eps, norm)
        moved = distance(bits.double(), (255 * x).round().double(), norm)
        assert (moved <= 255 * eps * (1 + 1e-9)).all()
        if norm == "linf":
            assert ((bits.float() / 255 - adv).abs() <= 0.5 / 255 + 1e-6).all()
    # A start far outside, so that only `confine` brings it back.
    far = confine(x + 0.3 * torch.randn(x.shape), x, eps, norm)
    assert (distance(far.double(), x.double(), norm) <= eps).all()
    with pytest.raises(ValueError, match="multiples of 1/255"):
        to_8_bits(x * 0.999, x * 0.999, eps, norm)
