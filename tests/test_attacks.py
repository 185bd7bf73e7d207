# SPDX-License-Identifier: Apache-2.0
"""Attacks: what they reach where the answer is known, states, draws, soundness, refusals."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linprog
from torch import Tensor, nn

from nimfast.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    Attack,
    AutoAttack,
    Square,
    Target,
    confine,
    distance,
    plan,
    to_8_bits,
)
from nimfast.attacks.geometry import project_l1, to_hyperplane
from nimfast.ops import Stream, corrupt, image_keys

SHAPE = (3, 8, 8)


def images(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """8-bit images that touch both ends of the range."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(-40, 296, (count, *shape), generator=draw).clamp(0, 255)
    return values.float() / 255


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        label: Tensor = model(x).argmax(1)
    return label


class Linear(nn.Module):
    """Logits linear in the pixels."""

    def __init__(self, classes: int = 10, seed: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            0.1 * torch.randn(classes, 192, generator=torch.Generator().manual_seed(seed))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T.to(x.dtype)


class Curved(Linear):
    """Not linear, cheap, and smooth."""

    def forward(self, x: Tensor) -> Tensor:
        return 5 * torch.sin(10 * super().forward(x)) + 3 * super().forward(x)


class Noisy(Curved):
    """Gaussian noise on the input, by key; each call of forward draws from torch's generator."""

    def __init__(self, sigma: float = 0.1, **options: int) -> None:
        super().__init__(**options)
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.sigma * torch.randn_like(x))

    def draw(self, x: Tensor, keys: Tensor, samples: int = 1, first_sample: int = 0) -> Tensor:
        noisy = corrupt(x, keys, self.sigma, samples=samples, first_sample=first_sample)
        return Curved.forward(self, noisy)


# --- geometry -------------------------------------------------------------------------------------


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


# --- what attacks reach ---------------------------------------------------------------------------


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


# --- states and draws -----------------------------------------------------------------------------

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


# --- the target -----------------------------------------------------------------------------------


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


# --- AutoAttack -----------------------------------------------------------------------------------


def test_autoattack_as_the_published_class_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = Curved(), images(24)
    y = labels_of(model, x)
    y[:3] = (y[:3] + 1) % 10  # misclassified from the start
    some = [APGD(eps=0.003, steps=20), "apgd-dlr"]
    options = {"version": "custom", "attacks_to_run": some}
    attack = AutoAttack(model, norm="Linf", eps=0.003, **options)  # type: ignore[arg-type]
    adv = attack.run_standard_evaluation(x, y, bs=10)
    wrong = labels_of(model, adv) != y
    assert (adv - x).abs().max() <= 0.003 + 1e-7
    assert torch.equal(adv[:3], x[:3]) and torch.equal(adv[~wrong], x[~wrong])
    said = capsys.readouterr().out
    assert "initial accuracy: 87.50%" in said
    assert f"after apgd-dlr: {float((~wrong).float().mean()):.2%}" in said
    assert 3 < wrong.sum() < 24
    assert torch.equal(adv, AutoAttack(model, "linf", 0.003, verbose=False, **options)(x, y))  # type: ignore[arg-type]


def test_versions_and_budgets() -> None:
    options: dict[str, Any] = {"norm": "linf", "eps": 8 / 255, "classes": 10}
    names = {
        version: [n for n, _ in plan(version, "official", **options)]
        for version in ("standard", "plus", "rand")
    }  # type: ignore[arg-type]
    assert names["standard"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert names["plus"] == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert names["rand"] == ["apgd-ce", "apgd-dlr"]
    for protocol, steps in (("official", 100), ("fair", 100), ("nim", 10)):
        for _, attack in plan("rand", protocol, **options):  # type: ignore[arg-type]
            assert (attack.steps, attack.eot, attack.restarts) == (steps, 20, 1)
    square = dict(plan("standard", "official", **options))["square"]
    assert square.steps == 5000 and square.with_settings(steps=3).steps == 3


@pytest.mark.parametrize(("protocol", "lucky"), [("official", True), ("fair", False)])
def test_fair_does_not_count_a_lucky_draw(protocol: Any, lucky: bool) -> None:
    """A model that errs in one draw of eight whatever the image: nothing is to be attacked."""

    class Coin(nn.Module):
        def draw(self, x: Tensor, keys: Tensor, samples: int = 1, first_sample: int = 0) -> Tensor:
            shape = (len(x), 1, 1, 2)
            noise = corrupt(
                torch.zeros(shape), keys, 1.0, samples=samples, first_sample=first_sample
            )
            side = (noise[:, 0, 0, 0] > 1.15).float() * 2 - 1
            value = side + 0 * x.mean((1, 2, 3)).repeat_interleave(samples)
            return torch.stack([-value, value], 1)

    x, y = images(200, shape=(1, 2, 2)), torch.zeros(200, dtype=torch.int64)
    attack = AutoAttack(
        Coin(), eps=0.01, version="custom", protocol=protocol, verbose=False,
        attacks_to_run=["apgd-ce", "apgd-ce", "apgd-ce"],
    )  # fmt: skip
    result, _ = attack.ensemble(2).run(Target(Coin()), x, y)
    if lucky:  # one draw before the attacks and one after each of three
        expected = 1 - 0.875**4
        assert float(result.broken.float().mean()) == pytest.approx(expected, abs=0.1)
    else:
        assert not result.broken.any()


# --- refusals -------------------------------------------------------------------------------------


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


def test_few_classes_and_unknown_names() -> None:
    for classes, instead in ((3, "dlr"), (2, "ce")):
        model, x = Linear(classes=classes), images(6)
        y = labels_of(model, x)
        attack = AutoAttack(
            model, eps=0.01, version="custom", attacks_to_run=["apgd-ce", "apgd-t"], verbose=False
        )
        with pytest.warns(
            UserWarning, match=f"needs 4 classes and the model has {classes}.*{instead}"
        ):
            attack.run_standard_evaluation(x, y)
    with pytest.raises(ValueError, match="there is no attack 'cw'"):
        AutoAttack(Linear(), version="custom", attacks_to_run=["cw"])
    with pytest.raises(ValueError, match="in l1 there are APGD attacks only"):
        AutoAttack(Linear(), norm="L1", eps=12.0)
    with pytest.raises(ValueError, match="version is 'fast'"):
        AutoAttack(Linear(), version="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name attacks with version 'custom'"):
        AutoAttack(Linear(), version="custom")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoAttack(Linear(), norm="L1", eps=12.0, version="custom", attacks_to_run=["apgd-ce"])
