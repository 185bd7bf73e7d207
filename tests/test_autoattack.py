# SPDX-License-Identifier: Apache-2.0
"""AutoAttack: as the published class is called, its budgets, lucky draws, few classes."""

import warnings
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attacked_models import Curved, Linear, images, labels_of
from torch import Tensor, nn

import nimfast
from nimfast.attacks import (
    APGD,
    AutoAttack,
    Target,
    menu,
    plan,
    watch,
)
from nimfast.errors import UserError
from nimfast.ops import corrupt


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


def test_scripts_of_the_published_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = Curved(), images(12)
    y = labels_of(model, x)
    y[:3] = (y[:3] + 1) % 10
    some: dict[str, Any] = {"version": "custom", "attacks_to_run": ["apgd-ce", "apgd-dlr"]}
    log = tmp_path / "log"
    attack = AutoAttack(
        model, norm="Linf", eps=0.003, seed=None, device="cpu", log_path=log, **some
    )
    assert attack.clean_accuracy(x, y, bs=5) == 0.75
    adv, labels = attack.run_standard_evaluation(x, y, bs=5, return_labels=True)
    assert torch.equal(labels, labels_of(model, adv))
    alone = attack.run_standard_evaluation_individual(x, y, bs=5)
    assert list(alone) == ["apgd-ce", "apgd-dlr"]
    for points in alone.values():
        assert points.shape == x.shape and torch.equal(points[:3], x[:3])
        assert (labels_of(model, points) == y).sum() >= (labels == y).sum()
    assert "clean accuracy: 75.00%" in log.read_text()
    assert "robust accuracy by apgd-dlr: " in capsys.readouterr().out
    none = attack.run_standard_evaluation_individual(x[:0], y[:0])
    assert all(len(points) == 0 for points in none.values())
    with pytest.raises(ValueError, match="holds no images"):
        attack.clean_accuracy(x[:0], y[:0])
    # A function serves as well as a module.
    options: dict[str, Any] = {"norm": "Linf", "eps": 0.003, "verbose": False, **some}
    by_function = AutoAttack(lambda images: model(images), **options)(x, y)
    assert torch.equal(by_function, AutoAttack(model, **options)(x, y))
    # What is attacked is the model as it is then, not as it was when the attack was made.
    vit = nimfast.load("digits")
    attack = AutoAttack(vit, eps=0.01, verbose=False)
    digits, labels = torch.rand(4, 1, 32, 32), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        vit.body.head.weight.zero_()
        vit.body.head.bias.copy_(torch.arange(10.0))
    assert attack.clean_accuracy(digits, labels + 9) == 1.0
    with pytest.raises(ValueError, match="the model lies on cpu, not on meta"):
        AutoAttack(model, device="meta")


class Killed(Exception):
    """What stops an evaluation in the tests below."""


@pytest.mark.parametrize("free", [False, True])
def test_state_path_continues_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: bool
) -> None:
    """Killed again and again, at once after a state was saved: the same points bit for bit."""

    class Model(Curved):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.01 * torch.randn_like(x) if free else x)

    model, x = Model(), images(9)
    y = labels_of(Curved(), x)
    some = [APGD(eps=0.003, steps=6), APGD(eps=0.003, steps=5, loss="dlr")]
    options: dict[str, Any] = {"verbose": False, "version": "custom", "attacks_to_run": some}
    options["eps"] = 0.003
    torch.manual_seed(5)
    straight = AutoAttack(model, **options).run_standard_evaluation(x, y, 4)
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=count(step=31).__next__))
    save, killed = watch.random_states, []

    def dies() -> dict[str, Tensor]:
        if len(killed) % 9 == 8:
            killed.append(None)
            raise Killed
        killed.append(None)
        return save()

    monkeypatch.setattr(watch, "random_states", dies)
    folder = tmp_path / "kept here"
    torch.manual_seed(5)
    for deaths in count():
        try:
            found = AutoAttack(model, **options).run_standard_evaluation(x, y, 4, False, folder)
            break
        except Killed:
            torch.manual_seed(deaths)  # a new process knows nothing of the old one's generator
    assert deaths > 3 and torch.equal(found, straight)
    again = AutoAttack(model, **options).run_standard_evaluation(x, y, 4, state_path=folder)
    assert torch.equal(again, straight)
    other = AutoAttack(model, **{**options, "eps": 0.002})
    with pytest.raises(UserError, match="eps is 0.003 there, 0.002 now; .* another state_path"):
        other.run_standard_evaluation(x, y, 4, state_path=folder)
    with pytest.raises(UserError, match="x_orig is "):
        AutoAttack(model, **options).run_standard_evaluation(x.flip(0), y, 4, state_path=folder)


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
    # The same for single attacks of the command.
    for name, loss in (("apgd-t-2", "ce"), ("apgd-dlr-2", "ce")):
        with pytest.warns(UserWarning, match=f"{name} needs . classes and the model has 2"):
            built = menu.build(
                menu.parse(name), eps=0.01, norm="linf", eot=1, seed=0, classes=2,
                randomised=False, protocol="fair",
            )  # fmt: skip
        assert isinstance(built, APGD) and built.loss == loss
        x = images(6)
        assert built(Linear(classes=2), x, labels_of(Linear(classes=2), x)).shape == x.shape
    with pytest.raises(ValueError, match="two or more classes, not 1; of one logit z"):
        AutoAttack(Linear(classes=1), verbose=False)(images(2), torch.zeros(2, dtype=torch.int64))
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
