# SPDX-License-Identifier: Apache-2.0
"""Attacks: what they reach where the answer is known, and what they refuse."""

from typing import Any

import numpy as np
import pytest
import torch
from attacked_models import SHAPE, Curved, Linear, images, labels_of
from scipy.optimize import linprog
from torch import Tensor, nn

from nimfast.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    Square,
    Target,
    distance,
)
from nimfast.attacks.geometry import to_hyperplane


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.3), ("l1", 4.0)])
def test_linear_model_is_solved(norm: Any, eps: float) -> None:
    """With two classes the worst point is known: the step along w that the box allows."""
    model = Linear(classes=2)
    x = images(12)
    y = labels_of(model, x)
    w = (model.weight[1] - model.weight[0]).detach().view(1, *SHAPE) * (1 - 2 * y).view(-1, 1, 1, 1)
    if norm == "linf":
        worst = torch.where(w > 0, (x + eps).clamp(max=1), (x - eps).clamp(min=0))
    elif norm == "l2":
        low, high = torch.zeros(12, 1, 1, 1), torch.full((12, 1, 1, 1), 1e3)
        for _ in range(60):
            middle = (low + high) / 2
            step = (x + middle * w).clamp(0, 1) - x
            over = step.flatten(1).norm(dim=1).view(-1, 1, 1, 1) > eps
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        worst = (x + low * w).clamp(0, 1)
    else:
        room = torch.where(w > 0, 1 - x, x).flatten(1)
        solved = []
        for i in range(12):
            gain = w[i].abs().flatten().numpy()
            bounds = [(0, float(r)) for r in room[i]]
            ones = np.ones((1, len(gain)))
            solved.append(linprog(-gain, A_ub=ones, b_ub=[eps], bounds=bounds).x)
        worst = x + w.sign() * torch.tensor(np.array(solved)).float().view(x.shape)
    best = (w * worst).flatten(1).sum(1)
    adv = APGD(eps=eps, norm=norm, steps=60)(model, x, y)
    reached = (w * adv).flatten(1).sum(1)
    clean = (w * x).flatten(1).sum(1)
    assert (reached <= best + 1e-3).all()
    share = (reached - clean) / (best - clean)
    # Published steps clip to ball and box in turn (l2), and move few values at a time (l1).
    assert share.min() > {"linf": 0.9999, "l2": 0.995, "l1": 0.95}[norm]
    if norm == "linf":
        assert torch.allclose(FGSM(eps=eps)(model, x, y), worst, atol=1e-6)
        assert torch.allclose(PGD(eps=eps, restarts=2)(model, x, y), worst, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targets", [9, None])
def test_fab_finds_the_nearest_boundary_of_a_linear_model(norm: Any, targets: int | None) -> None:
    model, x = Linear(), images(8)
    y = labels_of(model, x)
    found = FAB(norm=norm, eps=10.0, steps=8, targets=targets).run(Target(model), x, y)
    nearest = torch.full((8,), torch.inf)
    logits = model(x).detach()
    for k in range(10):
        normal = (model.weight[k] - model.weight[y]).detach().view(x.shape)
        rise = logits[torch.arange(8), y] - logits[:, k]
        step = to_hyperplane(x, normal, rise, norm)
        nearest = torch.where(k == y, nearest, nearest.minimum(distance(step, 0 * x, norm)))
    assert found.broken.all()
    # No nearer than the boundary, and no further than the last step's overshoot leaves it.
    assert (-found.best_loss >= 0.999 * nearest).all()
    assert (-found.best_loss <= 1.06 * nearest).all()
    assert torch.allclose(distance(found.x_adv, x, norm), -found.best_loss, rtol=1e-5)


def test_targeted_reaches_the_class() -> None:
    model, x = Linear(), images(16)
    aim = (labels_of(model, x) + 3) % 10
    for attack in (
        PGD(eps=0.2, targeted=True, steps=20),
        Square(eps=0.2, targeted=True, steps=400),
    ):
        found = attack.run(Target(model), x, aim)
        assert found.broken.float().mean() > 0.9
        assert torch.equal(labels_of(model, found.x_adv) == aim, found.broken)


def test_restarts_and_targets_only_help() -> None:
    model, x = Curved(), images(64)
    y = labels_of(model, x)
    for norm, eps in (("linf", 0.004), ("l2", 0.05)):
        once = PGD(eps=eps, norm=norm, seed=1).run(Target(model), x, y)  # type: ignore[arg-type]
        thrice = PGD(eps=eps, norm=norm, seed=1, restarts=3).run(Target(model), x, y)  # type: ignore[arg-type]
        assert (thrice.best_loss >= once.best_loss).all()
        assert (thrice.broken >= once.broken).all() and 0 < once.broken.sum() < 64
        assert torch.equal(labels_of(model, thrice.x_adv) != y, thrice.broken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "eps is 0.0; it must be positive"),
        ({"eps": -1.0}, "must be positive"),
        ({"eps": float("nan")}, "must be positive"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"eot": 0}, "eot is 0"),
        ({"norm": "l3"}, "norm is 'l3'"),
        ({"step_size": 0.0}, "step_size is 0.0"),
    ],
)
def test_settings_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**settings)


def test_images_labels_and_models_refused() -> None:
    model, x = Linear(), images(2)
    y, attack = torch.tensor([0, 1]), PGD(steps=1)
    for bad, error, message in (
        ((2 * x - 1, y), ValueError, r"range from -1 to 1; .*normalisation inside the model"),
        ((x * torch.nan, y), ValueError, "range from nan"),
        ((x, torch.tensor([0, 10])), ValueError, "labels range from 0 to 10; the model has 10"),
        ((x, torch.tensor([-1, 0])), ValueError, "labels range from -1"),
        ((x, torch.tensor([0])), ValueError, "there are 2 images"),
        ((x[0], y), ValueError, r"\[B, C, H, W\]"),
        ((x.double(), y), TypeError, "float32"),
        ((x, y.int()), TypeError, "int64"),
    ):
        with pytest.raises(error, match=message):
            attack(model, *bad)

    class Quantised(Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(ValueError, match="no gradient .* use Square"):
        attack(Quantised(), x, y)
    assert Square(steps=3)(Quantised(), x, y).shape == x.shape
    with pytest.raises(ValueError, match=r"must return logits \[1, classes\], not"):
        attack(nn.Identity(), x, y)
    with pytest.warns(UserWarning, match="probabilities, not logits"):
        attack(nn.Sequential(Linear(), nn.Softmax(1)), x, y)
    assert len(attack(model, x[:0], y[:0])) == 0


def test_a_gradient_is_a_tensor_of_its_own_whatever_autograd_returns() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x.sum((1, 2, 3))  # its gradient is one number, expanded
            return torch.stack([total, 1 - total], 1)

    class Permuted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1).contiguous().square().flatten(1)[:, :4]

    x, y = torch.rand(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64)
    for model in (Sums(), Permuted()):
        seen = Target(model).gradient(x, y)
        assert seen.gradient.is_contiguous()
        assert seen.gradient.stride() == x.stride()
        seen.gradient.zero_()
        assert bool(PGD(eps=0.1, steps=3)(model, x, y).isfinite().all())
