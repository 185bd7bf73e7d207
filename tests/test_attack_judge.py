# SPDX-License-Identifier: Apache-2.0
"""Verdicts on randomised classifiers, against accuracies that are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import Tensor, nn

from nimfast.attacks import Target
from nimfast.attacks.autoattack import Ensemble, Protocol, plan
from nimfast.attacks.evaluate import Batch, Setting, Subject, evaluate
from nimfast.attacks.judge import judge, majority, share, worst_of
from nimfast.attacks.menu import parse
from nimfast.attacks.views import Fixed
from nimfast.attacks.watch import Watch
from nimfast.ops import Stream, corrupt, image_keys
from nimfast.report.attack import majority_accuracy, mean_accuracy, worst_accuracy

SIGMA, EPS, SIDE = 0.1, 0.03, 6
IMAGES, DRAWS = 150, 20


class NoisyLinear(nn.Module):
    """Two classes by the sign of ``w (x + sigma n) + b``, keyed: P(right) has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(SIDE * SIDE, generator=generator))
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum())

    def draw(self, images: Tensor, keys: Tensor, samples: int = 1, first_sample: int = 0) -> Tensor:
        noisy = corrupt(images, keys, SIGMA, samples=samples, first_sample=first_sample)
        score = noisy.flatten(1) @ self.weight + self.bias
        return torch.stack([-score, score], 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.draw(images, torch.randint(2**62, (len(images),)))

    def right(self, x: Tensor, y: Tensor, eps: float = 0.0) -> np.ndarray:
        """P(right) of each image at the worst point of the linf ball, which lies in the box."""
        weight = self.weight.detach().double()
        lead = (x.double().flatten(1) @ weight + self.bias.detach().double()) * (2 * y - 1)
        return ndtr((lead - eps * weight.abs().sum()).numpy() / (SIGMA * float(weight.norm())))


@pytest.fixture(scope="module")
def model() -> NoisyLinear:
    return NoisyLinear().eval()


@pytest.fixture(scope="module")
def batch(model: NoisyLinear) -> Batch:
    """Images whose lead at the worst point is spread around a few sigma."""
    generator = torch.Generator().manual_seed(5)
    weight = model.weight.detach()
    y = torch.arange(IMAGES) % 2
    lead = torch.rand(IMAGES, generator=generator) * 0.25 + EPS * weight.abs().sum()
    direction = weight / weight.square().sum()
    x = 0.5 + (2 * y - 1)[:, None] * lead[:, None] * direction
    x = x.view(-1, 1, SIDE, SIDE).contiguous()
    assert x.min() > EPS and x.max() < 1 - EPS
    return Batch(x, y, torch.arange(IMAGES))


def setting(**other: object) -> Setting:
    known = {"eps": EPS, "norm": "linf", "eot": 20, "draws": DRAWS, "votes": 1000}
    known |= {"protocol": "fair", "precision": "fp32", "seed": 0}
    return Setting(**{**known, **other})  # type: ignore[arg-type]


def test_clean_readings_meet_the_closed_form(model: NoisyLinear, batch: Batch) -> None:
    truth = model.right(batch.x, batch.y)
    verdict = judge(Target(model), *batch, draws=200, seed=1)
    error = math.sqrt((truth * (1 - truth)).sum() / 200) / IMAGES
    assert float(verdict.right.double().mean()) == pytest.approx(truth.mean(), abs=4 * error)
    worst = worst_of(verdict.right.sum(1).tolist(), 200, 10).mean()
    assert worst == pytest.approx((truth**10).mean(), abs=0.05)
    assert torch.equal(verdict.votes.sum(1), torch.full((IMAGES,), 200))
    # The same draws whatever the pieces they come in, and other ones from another stream.
    again = judge(Target(model), *batch, draws=200, seed=1, rows=7)
    assert torch.equal(verdict.right, again.right)
    other = judge(Target(model), *batch, draws=200, seed=1, stream=Stream.ATTACK)
    assert not torch.equal(verdict.right, other.right)


@pytest.mark.filterwarnings("ignore:apgd-dlr needs 3 classes")
def test_fair_finds_the_worst_case_and_one_draw_does_not(model: NoisyLinear, batch: Batch) -> None:
    truth = model.right(batch.x, batch.y, EPS)
    subject = Subject.of(70.0, model, batch, 0)
    assert subject.kind == "keyed"
    rows, points = evaluate(subject, parse("aa-rand"), batch, setting(), Watch())
    found = mean_accuracy(rows)
    error = math.sqrt((truth * (1 - truth)).sum() / DRAWS) / IMAGES
    assert found.value == pytest.approx(truth.mean(), abs=4 * error)
    assert float(distance_to_corner(model, batch, points)) < 1e-6
    held = [
        share(verdict.right.double().mean(1).tolist())
        for verdict in (
            judge(Target(model), points, batch.y, batch.indices, draws=DRAWS, seed=seed)
            for seed in range(20)
        )
    ]
    # A 95% interval: of 20, fewer than 16 hold the truth once in 400 times.
    assert sum(found.low < truth.mean() < found.high for found in held) >= 16
    # Of images near the boundary some stay undecided: the interval says so.
    votes = majority_accuracy(rows)
    assert votes.low <= (truth > 0.5).mean() <= votes.high
    assert not any(
        row.majority == ("wrong" if p > 0.5 else "right")
        for row, p in zip(rows, truth, strict=True)
    )
    worst = worst_accuracy(rows, 5)
    assert worst.low < (truth**5).mean() < worst.high

    # Declared broken on one draw of many, as published, far too many images seem to fall.
    lucky = one_draw_accuracy(model, batch, "official")
    assert lucky < found.low - 0.1
    assert lucky < truth.mean() - 0.2


def one_draw_accuracy(model: nn.Module, batch: Batch, protocol: Protocol) -> float:
    attacks = plan("rand", protocol, norm="linf", eps=EPS, classes=2)
    result, _ = Ensemble(tuple(attacks)).run(Target(model), *batch)
    return 1 - float(result.broken.double().mean())


def distance_to_corner(model: NoisyLinear, batch: Batch, points: Tensor) -> Tensor:
    away = -(2 * batch.y - 1)[:, None] * model.weight.detach().sign() * EPS
    return (points - batch.x - away.view_as(points)).abs().max()


def test_known_noise(model: NoisyLinear, batch: Batch) -> None:
    subject = Subject.of(70.0, model, batch, 0)
    rows, points = evaluate(subject, parse("known:pgd-5"), batch, setting(), Watch())
    # The gradient of a linear model is the same under any noise: the corner is the worst point.
    assert float(distance_to_corner(model, batch, points)) < 1e-6
    keys = image_keys(0, Stream.ATTACK, batch.indices)
    expected = model.draw(points, keys, 1, 0).argmax(1) == batch.y
    assert [row.hits for row in rows] == expected.int().tolist()
    assert all(row.draws == 1 for row in rows)
    found = mean_accuracy(rows)
    assert found.low < model.right(batch.x, batch.y, EPS).mean() < found.high


def test_known_noise_is_one_draw_for_ever(model: NoisyLinear, batch: Batch) -> None:
    keys = image_keys(0, Stream.ATTACK, batch.indices)
    logits = Fixed(model).draw(batch.x, keys, 3, 7).view(IMAGES, 3, 2)
    assert torch.equal(logits[:, 0], logits[:, 2])
    assert torch.equal(logits[:, 0], model.draw(batch.x, keys, 1, 0))
    with pytest.raises(TypeError, match="without `draw`"):
        Fixed(nn.Linear(2, 2))


def test_rows_do_not_depend_on_the_batch(model: NoisyLinear, batch: Batch) -> None:
    subject = Subject.of(70.0, model, batch, 0)
    whole, _ = evaluate(subject, parse("pgd-3"), batch, setting(votes=100), Watch())
    part = Batch(*(value[10:13] for value in batch))
    few, _ = evaluate(subject, parse("pgd-3"), part, setting(votes=100), Watch())
    assert [(r.idx, r.hits, r.votes) for r in few] == [
        (r.idx, r.hits, r.votes) for r in whole[10:13]
    ]


def test_deterministic_majority_takes_one_draw(model: NoisyLinear, batch: Batch) -> None:
    verdict = judge(Target(model), *batch, draws=1, seed=0)
    votes = majority(Target(model), *batch, verdict, most=1, seed=0)
    assert [v.verdict == "right" for v in votes] == verdict.right[:, 0].tolist()


@pytest.mark.parametrize("values", [[0.0, 1.0] * 50, [0.5] * 100, [1.0] * 100])
def test_interval_is_wilsons(values: list[float]) -> None:
    found = share(values)
    p, z = found.value, 1.96
    # Its defining equation: at each end the mean is z standard errors away.
    for end in (found.low, found.high):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / 100)
            assert abs(p - end) == pytest.approx(z * error, rel=0.001)
    assert found.low <= p <= found.high


@pytest.mark.parametrize("images", [8, 60])
@pytest.mark.parametrize("wrong", [0.0, 0.02, 0.05, 0.1, 0.5])
def test_interval_holds_the_truth(images: int, wrong: float) -> None:
    """A share `wrong` of all images is wrong in every draw: a sample may hold none of these."""
    chance = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        p = np.where(chance.random(images) < wrong, 0, chance.beta(9, 1, size=images))
        found = share(chance.binomial(20, p) / 20)
        missed += not found.low <= 0.9 * (1 - wrong) <= found.high
    assert missed / 400 < 0.08


def test_nonsense_is_refused(model: NoisyLinear, batch: Batch) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        judge(Target(model), *batch, draws=0, seed=0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), not 0 to 5"):
        judge(Target(model), batch.x[:2], torch.tensor([0, 5]), batch.indices[:2], draws=1, seed=0)
    with pytest.raises(ValueError, match="between 1 and the 20 draws"):
        worst_of([3], 20, 21)
    with pytest.raises(ValueError, match="at least one image"):
        share([])


def test_logits_that_are_no_numbers_are_wrong(batch: Batch) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :2] * math.nan

    verdict = judge(Target(Broken()), *batch, draws=1, seed=0)
    assert not verdict.right.any()
    assert verdict.votes[:, 2].tolist() == [1] * IMAGES
