# SPDX-License-Identifier: Apache-2.0
"""The automatic checks: every way to look robust without being so is reported, health is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nimfast
from nimfast.attacks import PGD, Target
from nimfast.attacks.checks import Finding, check_model, randomness
from nimfast.attacks.crosschecks import (
    check_attack,
    check_points,
    check_readings,
    check_results,
    distance,
    inside,
    on_grid,
    weaker,
)
from nimfast.attacks.evaluate import Batch
from nimfast.data import load

EPS = 24 / 255


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = load("digits")
    places = data.places(None, 16, 16)
    pairs = [data[index] for index in places]
    images = torch.stack([image for image, _ in pairs])
    return Batch(images, torch.tensor([label for _, label in pairs]), torch.tensor(places))


@pytest.fixture(scope="module")
def healthy() -> nn.Module:
    return nimfast.load("digits")


def found(model: nn.Module, batch: Batch, eot: int = 1) -> dict[str, str]:
    return told(check_model(Target(model), *batch, eot=eot, seed=0))


def told(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.check: finding.text for finding in findings}


def attacked(model: nn.Module, batch: Batch, eot: int = 1, randomised: bool = False) -> set[str]:
    how = {"eps": EPS, "norm": "linf", "eot": eot, "steps": 10, "seed": 0}
    return set(told(check_attack(Target(model), *batch, randomised=randomised, **how)))  # type: ignore[arg-type]


class Changed(nn.Module):
    """The healthy model with something done to images before it and logits after it."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.model(self.before(images)))


def shatter(x: Tensor) -> Tensor:
    """A ripple of a hundredth of a grey level, whose slope hides that of the image."""
    return x + 4e-5 * torch.sin(1e6 * x)


def round_straight_through(x: Tensor) -> Tensor:
    return x + ((x * 8).round() / 8 - x).detach()


def purify(x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(leaf.square().sum(), leaf)
    return x - 0.01 * slope


def test_health_is_not_reported(healthy: nn.Module, batch: Batch) -> None:
    assert not found(healthy, batch)
    assert not attacked(healthy, batch)


@pytest.mark.slow
def test_health_behind_de3_is_not_reported(batch: Batch) -> None:
    defence = nimfast.load("de3:digits+digits?sigma=70")
    assert not found(defence, batch, eot=20)
    assert not attacked(defence, batch, eot=20, randomised=True)


@pytest.mark.parametrize(
    ("check", "before", "after"),
    [
        ("probabilities", None, lambda z: z.softmax(1)),
        ("gradients", lambda x: (x * 15).round() / 15, None),  # a quantised input
        ("gradients", None, lambda z: 300 * z),  # a saturated softmax
        ("gradients", None, lambda z: 0 * z),  # a constant loss
        ("gradients", None, lambda z: z.detach()),
        ("gradients", lambda x: x + (x - x).abs().sqrt(), None),  # infinite at 0
        ("finite differences", shatter, None),
        ("finite differences", round_straight_through, None),
        ("gradient inside", purify, None),
        ("randomised", lambda x: x + 0.2 * torch.randn_like(x), None),
    ],
)
def test_each_ailment_is_reported(
    healthy: nn.Module,
    batch: Batch,
    check: str,
    before: Callable[[Tensor], Tensor] | None,
    after: Callable[[Tensor], Tensor] | None,
) -> None:
    changes = {"before": before, "after": after}
    model = Changed(healthy, **{name: f for name, f in changes.items() if f is not None})
    assert check in found(model, batch)


@pytest.mark.parametrize("seed", range(6))
def test_one_image_tells_whether_a_model_draws(healthy: nn.Module, batch: Batch, seed: int) -> None:
    """One of four patches is removed: every fourth of two draws are the same."""
    demask = nimfast.load("demask:digits+digits?mask_ratio=0.25")
    one = batch.x[:1], batch.indices[:1], seed
    assert randomness(Target(demask), *one) == "keyed"
    assert randomness(Target(healthy), *one) == "none"


def test_eot_cures_randomness_only_where_there_is_enough(healthy: nn.Module, batch: Batch) -> None:
    model = Changed(healthy, lambda x: x + 0.2 * torch.randn_like(x))
    assert "randomised" not in found(model, batch, eot=8)
    drowned = Changed(healthy, lambda x: x + 2 * torch.randn_like(x))
    assert "--eot" in found(drowned, batch, eot=2)["gradient noise"]


def test_train_mode(healthy: nn.Module, batch: Batch) -> None:
    model = nn.Sequential(healthy, nn.Dropout(0.5))
    assert "Dropout" in found(model, batch)["train mode"]
    assert model.training  # looked at, and left as it was
    healthy.eval()


def test_attacks_that_go_nowhere_are_reported(healthy: nn.Module, batch: Batch) -> None:
    masked = attacked(Changed(healthy, shatter), batch)
    assert {"eps 1", "PGD-10 below Square"} <= masked
    assert "flat loss" in attacked(Changed(healthy, after=lambda z: 0 * z), batch)


def test_a_weaker_strong_attack_needs_more_than_chance() -> None:
    chance = torch.Generator().manual_seed(0)
    clean = torch.ones(20)
    by_weak = torch.randn(20, generator=chance)
    assert weaker("a", "b", by_weak + 0.5, by_weak, clean, "")
    assert not weaker("a", "b", by_weak - 0.5, by_weak, clean, "")
    assert not weaker("a", "b", torch.randn(20, generator=chance), by_weak, clean, "")
    assert not weaker("a", "b", by_weak + 1e-3, by_weak, clean, "")  # certain, and nothing


def test_transfer_better_than_white_box() -> None:
    clean = np.full(30, 3.0)
    margins = {"none": clean, "pgd-10": clean - 1, "bare:pgd-10": clean - 2, "fgsm": clean - 0.5}
    assert set(told(check_results(margins, "pgd-10"))) == {"pgd-10 below bare:pgd-10"}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_on_the_border_are_allowed_and_others_are_not(
    healthy: nn.Module, batch: Batch, norm: str
) -> None:
    eps = {"linf": EPS, "l2": 1.5}[norm]
    points = PGD(eps=eps, norm=norm, steps=5)(healthy, batch.x, batch.y)  # type: ignore[arg-type]
    assert not check_points(batch.x, points, eps=eps, norm=norm)  # type: ignore[arg-type]
    assert 0.98 * eps < float(distance(batch.x, points, norm).max())  # type: ignore[arg-type]
    away = batch.x + 1.03 * (points - batch.x)
    assert "points" in told(check_points(batch.x, away, eps=eps, norm=norm))  # type: ignore[arg-type]
    outside = points.clone()
    outside[0, 0, 0, 0] = -1e-6
    assert "points" in told(check_points(batch.x, outside, eps=2 * eps, norm=norm))  # type: ignore[arg-type]


def test_eight_bits_stay_in_the_ball() -> None:
    chance = torch.Generator().manual_seed(1)
    x = torch.rand(8, 3, 5, 5, generator=chance)
    levels = torch.randint(256, (8, 3, 5, 5), generator=chance) / 255
    for clean in (x, levels):
        for eps in (4 / 255, 1.5 / 255):
            noise = (2 * torch.rand(x.shape, generator=chance) - 1) * eps
            points = (clean + noise).clamp(0, 1)
            rounded = on_grid(clean, points, eps=eps, norm="linf")
            assert torch.equal(rounded, (rounded * 255).round() / 255)
            assert inside(clean, rounded, eps=eps, norm="linf").all()
            nearest = (points * 255).round() / 255
            allowed = (nearest - clean).abs() <= eps
            assert torch.equal(rounded[allowed], nearest[allowed])
    towards = on_grid(levels, levels + 0.9 / 255 * (levels < 0.5), eps=0.01, norm="l2")
    assert torch.allclose(towards, levels)
    # Between two levels a smaller ball holds neither.
    told_off = check_points(x, x, eps=0.2 / 255, norm="linf")
    assert list(told(told_off)) == ["points rounded to 8 bits"]


def test_readings_that_differ_by_precision() -> None:
    same = check_readings("pgd", 20, [10] * 50, [10] * 50, [10] * 50)
    assert not same
    other = check_readings("pgd", 20, [10] * 50, [14] * 50, [11] * 50)
    assert set(told(other)) == {"8 bits", "precision"}
    assert not check_readings("pgd", 20, [10] * 50, [10] * 50, [None] * 50)


def test_embedded_denoiser_is_small_and_says_how_it_was_made() -> None:
    from nimfast.models.checkpoint import read_checkpoint
    from nimfast.models.load import EMBEDDED_AUTOENCODERS

    path: Path = EMBEDDED_AUTOENCODERS["digits"]
    assert path.stat().st_size < 300_000
    command = read_checkpoint(path)[1]["command"]
    assert command.startswith("python -m train.pretrain nim-mae --model digits-denoiser")


def test_de3_with_the_embedded_models_keeps_the_digits() -> None:
    data = load("digits")
    images, labels = (torch.stack(v) if torch.is_tensor(v[0]) else torch.tensor(v)
                      for v in zip(*(data[i] for i in range(0, 400, 3)), strict=True))  # fmt: skip
    for sigma, least in ((70, 0.95), (140, 0.9)):
        logits = nimfast.load(f"de3:digits+digits?sigma={sigma}&seed=0")(images)
        assert (logits.argmax(1) == labels).double().mean() > least


def test_an_ensemble_is_compared_by_its_verdicts() -> None:
    clean = np.full(20, 5.0)
    by_fgsm = np.where(np.arange(20) < 10, -1.0, 2.0)
    whole = np.where(np.arange(20) < 12, -0.1, clean)  # gives back what it cannot break
    assert not check_results({"none": clean, "fgsm": by_fgsm, "aa-rand": whole}, "aa-rand")
    assert check_results({"none": clean, "fgsm": by_fgsm, "aa-rand": clean}, "aa-rand")
