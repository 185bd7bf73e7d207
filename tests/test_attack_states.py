# SPDX-License-Identifier: Apache-2.0
"""Attacks in the middle: states saved and continued, draws, images that leave, the target."""

from pathlib import Path

import pytest
import torch
from attacked_models import Curved, Linear, Noisy, images, labels_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nimfast.attacks import (
    APGD,
    FAB,
    PGD,
    Attack,
    AutoAttack,
    Square,
    Target,
    distance,
)
from nimfast.ops import Stream, image_keys

ATTACKS: list[Attack] = [
    PGD(eps=0.01, steps=4, restarts=2, eot=3),
    APGD(eps=0.01, steps=12, restarts=2, eot=3),
    APGD(eps=0.01, steps=12, loss="dlr-targeted", targets=2, leave=True),
    APGD(eps=1.0, norm="l1", steps=12, widen=True),
    FAB(eps=0.01, steps=4, targets=2, restarts=2),
    FAB(eps=0.1, norm="l2", steps=4, targets=None),
    Square(eps=0.01, steps=30, restarts=2),
    Square(eps=0.1, norm="l2", steps=30),
]
NAMES = [f"{type(a).__name__}-{a.norm}-{a.eot}" for a in ATTACKS]


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_resumed_at_every_step_bit_for_bit(attack: Attack, tmp_path: Path) -> None:
    model, x = Noisy() if attack.eot > 1 else Curved(), images(6)
    y, indices = labels_of(Curved(), x), torch.tensor([3, 9, 100, 7, 5, 2**33])
    straight = attack.run(Target(model, rows=8), x, y, indices)
    state = attack.begin(Target(model, rows=8), x, y, indices)
    while not attack.done(state):
        save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / "state")
        state = load_file(tmp_path / "state")
        attack.step(Target(model, rows=8), state)
    for one, other in zip(straight, attack.result(state), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_an_image_does_not_depend_on_its_batch(attack: Attack) -> None:
    model, x = Noisy() if attack.eot > 1 else Curved(), images(7)
    y, indices = labels_of(Curved(), x), torch.arange(7) * 11
    target = Target(model, rows=12)
    together = attack.run(target, x, y, indices)
    some = torch.tensor([5, 0, 3])
    apart = attack.run(target, x[some], y[some], indices[some])
    assert torch.equal(apart.x_adv, together.x_adv[some])
    assert torch.equal(apart.broken, together.broken[some])
    if not isinstance(attack, FAB):  # its first run begins at the image, its draws come later
        other = attack.run(target, x, y, indices + 1)
        assert not torch.equal(other.x_adv, together.x_adv)
    wider = attack.run(Target(model, rows=64), x, y, indices)  # same draws, other rounding
    assert (wider.x_adv - together.x_adv).abs().median() <= 1e-6


@pytest.mark.parametrize(
    "attack", [PGD(eps=0.002, restarts=3), APGD(eps=0.002, steps=20, restarts=2)]
)
def test_leaving_changes_no_verdict_and_saves_work(attack: Attack) -> None:
    model, x = Curved(), images(20)
    y = labels_of(model, x)
    stay, go = Target(model, rows=1), Target(model, rows=1)
    full = attack.run(stay, x, y)
    short = attack.with_settings(leave=True).run(go, x, y)
    assert torch.equal(full.broken, short.broken) and 2 < full.broken.sum() < 18
    robust = ~full.broken
    assert torch.equal(full.x_adv[robust], short.x_adv[robust])
    assert (labels_of(model, short.x_adv) != y)[~robust].all()
    assert go.gradients < 0.95 * stay.gradients


def test_gradient_is_the_mean_over_the_draws_however_it_is_cut() -> None:
    model, x = Noisy(), images(5)
    y, keys = torch.arange(5), image_keys(0, Stream.ATTACK, torch.arange(5))
    leaf = x.clone().requires_grad_()
    total = torch.zeros(5)
    for s in range(6):
        logits = model.draw(leaf, keys, 1, 4 + s)
        total = total + nn.functional.cross_entropy(logits, y, reduction="none") / 6
    (expected,) = torch.autograd.grad(total.sum(), leaf)
    for rows in (None, 1, 4, 6, 7, 64):
        target = Target(model, rows=rows)
        seen = target.gradient(x, y, keys=keys, samples=6, first_sample=4)
        assert torch.allclose(seen.gradient, expected, rtol=1e-3, atol=1e-4)
        assert torch.allclose(seen.loss, total, rtol=1e-5)
        assert seen.logits.shape == (30, 10) and target.gradients == 30
        wrong = (seen.logits.view(5, 6, 10).argmax(2) != y[:, None]).sum(1)
        assert torch.equal(seen.missed, wrong)


def test_the_model_is_frozen_inside_and_as_before_afterwards() -> None:
    class Watched(Linear):
        def forward(self, x: Tensor) -> Tensor:
            states.add((self.training, self.weight.requires_grad))
            return super().forward(x)

    states: set[tuple[bool, bool]] = set()
    model = Watched().train()
    PGD(eps=0.01, steps=2)(model, images(2), torch.tensor([0, 1]))
    assert states == {(False, False)}
    assert model.training and model.weight.requires_grad and model.weight.grad is None


def test_a_piece_that_does_not_fit_is_halved() -> None:
    class Small(Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            if len(x) > 10:
                raise torch.OutOfMemoryError("too much")
            return super().forward(x)

    sizes: list[int] = []
    x, y = images(50), torch.zeros(50, dtype=torch.int64)
    seen = Target(Small()).gradient(x, y)
    assert torch.allclose(seen.gradient, Target(Linear()).gradient(x, y).gradient, atol=1e-6)
    assert max(sizes) == 50 and sizes[-1] <= 10
    with pytest.raises(torch.OutOfMemoryError):
        Target(Small(), rows=16).gradient(x, y)


def test_bf16_points_are_judged_in_fp32() -> None:
    model, x = Curved(), images(64)
    y = labels_of(model, x)
    target = Target(model, precision="bf16")
    seen = target.gradient(x, y)
    exact = target.exact().gradient(x, y).gradient
    assert seen.logits.dtype == seen.loss.dtype == seen.gradient.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(seen.gradient.flatten(), exact.flatten(), 0) > 0.99
    attack = AutoAttack(
        target, eps=0.004, version="custom", attacks_to_run=["apgd-ce", "apgd-dlr"], verbose=False
    )
    result, by = attack.ensemble(10).run(target, x, y)
    assert 0 < result.broken.sum() < 64
    assert torch.equal(labels_of(model, result.x_adv) != y, result.broken)
    assert torch.equal(by >= 0, result.broken)


def test_points_next_to_the_boundary_are_across_in_fp32() -> None:
    model, x = Curved(), images(32)
    y = labels_of(model, x)
    found = FAB(eps=0.01, steps=5, targets=2).run(Target(model, precision="bf16"), x, y)
    assert found.broken.sum() > 0
    assert torch.equal(labels_of(model, found.x_adv) != y, found.broken)


def test_nan_in_the_model_leaves_points_sound() -> None:
    class Nan(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, 0, 0, :1] > 0.5, torch.nan, super().forward(x))

    x = images(16)
    y = labels_of(Linear(), x)
    for attack in (PGD(eps=0.05), APGD(eps=0.5, norm="l2", steps=9), Square(eps=0.05, steps=9)):
        found = attack.run(Target(Nan()), x, y)
        assert found.x_adv.isfinite().all()
        assert (distance(found.x_adv.double(), x.double(), attack.norm) <= attack.eps).all()
        assert not found.best_loss[~found.broken].isnan().any()
        assert found.broken[x[:, 0, 0, 0] > 0.6].all()  # such a row is for no class
