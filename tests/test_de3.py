# SPDX-License-Identifier: Apache-2.0
"""De3 and de-masking: the published numbers, the gradient's path, keyed draws, combination."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference_files import hints, read_case
from torch import Tensor, nn

import nimfast
from nimfast.models import MAE, Architecture, PatchModel, SimMIM, SimMIMArchitecture, ViT
from nimfast.models.load import Classifier
from nimfast.models.published import from_published
from nimfast.models.vit import Trunk
from nimfast.ops import Stream, image_keys
from nimfast.ops.patches import patchify

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE: dict[str, Any] = {"mean": (0.3,), "std": (0.4,)}
SMALL = Architecture((32, 32), 1, 8, 32, 1, 1, False, 32, 1, 1)


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(1)
    body = ViT(SMALL, 5)
    nn.init.normal_(body.head.weight, std=0.3)
    return Classifier(body, "tiny", **SCALE)


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def autoencoder() -> MAE:
    torch.manual_seed(2)
    return MAE(SMALL)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_de3_equals_the_published_one(
    shared_reference: Path, norm_pix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, and the gradient with respect to the input that an attacker gets."""
    content, _, case = read_case(shared_reference, f"de3_normpix{int(norm_pix)}")

    def network(part: str) -> PatchModel:
        state = {k.removeprefix(part): v for k, v in content.items() if k.startswith(part)}
        return from_published(state, part, hints(case))

    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)

    def recorded(x: Tensor, keys: Tensor, sigma: float, patch: int, **_: Any) -> Tensor:
        return patchify((x + sigma * content["noise"] - mean) / std, patch)

    monkeypatch.setattr("nimfast.restoration.corrupt_patches", recorded)
    classifier = Classifier(network("classifier."), "reference", MEAN, STD)
    stats = "input" if norm_pix else "none"
    defence = nimfast.De3(
        network("denoiser."), classifier, sigma=case["sigma_255"], stats=stats, mean=MEAN, std=STD
    )
    normalised = content["imgs"].clone().requires_grad_()
    logits = defence(normalised * std + mean)
    torch.testing.assert_close(logits, content["logits"], rtol=1e-5, atol=1e-5)
    F.cross_entropy(logits, content["labels"]).backward()
    expected = content["input_grad"]
    largest = expected.abs().max().item()
    assert largest > 1e-4
    torch.testing.assert_close(normalised.grad, expected, rtol=0, atol=1e-5 * max(1, largest))
    torch.testing.assert_close(normalised.grad / largest, expected / largest, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stats", ["input", "noisy", "none"])
def test_patch_rows_lead_to_the_answer_of_the_pixels(classifier: Classifier, stats: Any) -> None:
    """The way without images, across two normalisations, and its gradient."""
    x, keys = images(), image_keys(0, Stream.ATTACK, torch.arange(4))
    other = {"mean": (0.2,), "std": (0.7,)}
    defence = nimfast.De3(autoencoder(), classifier, sigma=70.0, stats=stats, draws=2, **other)
    assert defence.classifier.mean != other["mean"] and defence._reads_rows
    found = []
    for draw in (defence.draw, super(nimfast.De3, defence).draw):
        leaf = x.clone().requires_grad_()
        logits = draw(leaf, keys, 3, 5)
        (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
        found.append((logits, gradient))
    assert found[0][1].abs().max() > 0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


class Constant(MAE):
    """Predicts the same rows whatever it sees: nothing of the image gets through it."""

    def forward(self, rows: Tensor, keep: Tensor | None = None) -> Tensor:
        pattern = torch.linspace(-1, 1, rows.shape[1] * 64).view(1, rows.shape[1], 64)
        return pattern.expand(len(rows), -1, -1)


def test_statistics_of_the_input_are_a_shortcut(classifier: Classifier) -> None:
    """Past noise and denoiser: the gradient is there though the denoiser lets nothing through."""
    keys = image_keys(0, Stream.ATTACK, torch.arange(4))
    found: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    for stats in ("input", "noisy", "none"):
        x = images().requires_grad_()
        defence = nimfast.De3(Constant(SMALL), classifier, sigma=70, stats=stats, **SCALE)
        logits[stats] = defence.draw(x, keys, samples=2)
        if stats == "none":  # nothing of the image is left
            assert not logits[stats].requires_grad
            continue
        # The same answer for both draws: no noise in it, nor in its gradient.
        same = [
            torch.autograd.grad(logits[stats][draw::2].square().sum(), x, retain_graph=True)[0]
            for draw in range(2)
        ]
        found[stats] = same[0]
        equal = torch.equal(*same) and torch.equal(logits[stats][::2], logits[stats][1::2])
        assert equal == (stats == "input")
    assert found["input"].abs().max() > 1e-3
    # Of the noisy patch they carry its noise: the other way round is Eq. 9's.
    assert not torch.allclose(found["input"], found["noisy"], rtol=0.05)


@pytest.mark.parametrize("stats", ["input", "noisy", "none"])
@pytest.mark.parametrize(("draws", "combine"), [(1, "mean"), (3, "mean"), (3, "vote")])
def test_draws_depend_on_the_key_alone(
    classifier: Classifier, stats: Any, draws: int, combine: Any
) -> None:
    defence = nimfast.De3(
        autoencoder(), classifier, sigma=140, stats=stats, draws=draws, combine=combine, **SCALE
    )
    keys, x = image_keys(0, Stream.ATTACK, torch.arange(4)), images()
    together = defence.draw(x, keys, samples=4).view(4, 4, 5)
    alone = torch.stack([defence.draw(x[2:3], keys[2:3], 1, s)[0] for s in range(4)])
    torch.testing.assert_close(together[2], alone, rtol=1e-4, atol=1e-4)
    if combine == "mean":
        assert (together[:, 0] - together[:, 1]).abs().max() > 1e-2


def test_combination(classifier: Classifier) -> None:
    keys, x = image_keys(0, Stream.ATTACK, torch.arange(4)), images().requires_grad_()
    model = autoencoder()
    options: dict[str, Any] = {"sigma": 140, "stats": "noisy", **SCALE}
    single = nimfast.De3(model, classifier, **options).draw(x, keys, samples=5).view(4, 5, 5)
    mean = nimfast.De3(model, classifier, draws=5, **options).draw(x, keys)
    torch.testing.assert_close(mean.exp(), single.softmax(-1).mean(1), rtol=1e-4, atol=1e-5)
    vote = nimfast.De3(model, classifier, draws=5, combine="vote", **options).draw(x, keys)
    share = F.one_hot(single.argmax(-1), 5).float().mean(1)
    torch.testing.assert_close(vote, share)
    weights = torch.randn(4, 5)
    gradients = [torch.autograd.grad((value * weights).sum(), x)[0] for value in (vote, mean.exp())]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_calls_draw_afresh(classifier: Classifier) -> None:
    x = images()

    def defence(**changes: Any) -> nimfast.De3:
        options = {"sigma": 140.0, "stats": "noisy", **SCALE, **changes}
        return nimfast.De3(autoencoder(), classifier, **options)

    for first in (defence(), defence(seed=3)):
        assert (first(x) - first(x)).abs().max() > 1e-2
    one, other = defence(seed=3), defence(seed=3)
    calls = [one(x), one(x)]
    assert torch.equal(calls[0], other(x))
    assert torch.equal(calls[1], copy.deepcopy(other)(x))
    torch.manual_seed(5)
    repeated = defence()(x)
    torch.manual_seed(5)
    assert torch.equal(repeated, defence()(x))
    off = defence(sigma=None)
    assert torch.equal(off(x), classifier(x))
    assert torch.equal(off.draw(x, torch.arange(4), 2), classifier(x).repeat_interleave(2, 0))


def test_defences_are_frozen(classifier: Classifier) -> None:
    defence = nimfast.De3(autoencoder(), classifier, sigma=70, stats="noisy", **SCALE)
    assert not any(p.requires_grad for p in defence.parameters())
    nn.Sequential(defence).train()
    assert not any(module.training for module in defence.modules())


def test_demask(classifier: Classifier) -> None:
    """Kept pixels can be pasted back; removed ones never reach the answer."""
    x, keys = images(), image_keys(0, Stream.ATTACK, torch.arange(4))
    swin = SimMIMArchitecture((32, 32), 1, 4, 16, (1, 1), (2, 2), 4)
    for model, unit in ((autoencoder(), None), (SimMIM(swin), 8)):
        options: dict[str, Any] = {"mask_ratio": 0.75, "stats": "none", "unit": unit, **SCALE}
        plain = nimfast.DeMask(model, classifier, **options)
        pasted = nimfast.DeMask(model, classifier, paste=True, **options)
        first = plain.reconstructed(x, keys, 2, 0)
        second = pasted.reconstructed(x, keys, 2, 0)
        kept = (second == x.repeat_interleave(2, 0)).view(8, -1).float().mean(1)
        torch.testing.assert_close(kept, torch.full((8,), 0.25), rtol=0, atol=0.01)
        squares = (first == second).view(8, 4, 8, 4, 8).float().mean((2, 4))
        assert ((squares > 0.99) | (squares < 0.01)).all()
        assert squares.sum((1, 2)).round().tolist() == [12.0] * 8
        assert (first[::2] - first[1::2]).abs().max() > 1e-2
        # Change what was removed: the reconstruction stays.
        removed = (first == second)[::2]
        other = torch.where(removed, torch.rand_like(x), x)
        torch.testing.assert_close(plain.reconstructed(other, keys, 1, 0), first[::2])
        y = x.clone().requires_grad_()
        plain(y).square().sum().backward()
        assert y.grad is not None and 0 < (y.grad != 0).float().mean() < 0.26


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sigma": 0.0}, ValueError, "sigma is 0.0; it must be positive"),
        ({"draws": 0}, ValueError, "draws is 0"),
        ({"combine": "median"}, ValueError, "combine is 'median'"),
        ({"stats": "clean"}, ValueError, "stats is 'clean'"),
        ({"denoiser": Trunk(SMALL)}, TypeError, "Trunk, which has no decoder"),
        ({"denoiser": ViT(SMALL, 5)}, TypeError, "ViT, which has no decoder"),
    ],
)
def test_bad_arguments(
    classifier: Classifier, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"denoiser": autoencoder(), "sigma": 70.0, "stats": "noisy", **SCALE, **change}
    with pytest.raises(error, match=message):
        nimfast.De3(classifier=classifier, **options)


def test_units_of_sigma(classifier: Classifier) -> None:
    def made(sigma: float) -> nimfast.De3:
        return nimfast.De3(autoencoder(), classifier, sigma=sigma, stats="noisy", **SCALE)

    with pytest.warns(UserWarning, match=r"read as 0.25/255 = .*was 0.25 in pixel units meant"):
        made(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(2.0)


def test_demask_arguments(classifier: Classifier) -> None:
    for change, message in (
        ({"stats": "noisy"}, "adds no noise"),
        ({"mask_ratio": 0.99}, "must remove some and keep some"),
        ({"mask_ratio": 0.0}, "must remove some and keep some"),
        ({"unit": 12}, "unit 12 must divide"),
    ):
        options: dict[str, Any] = {"mask_ratio": 0.5, "stats": "none", **SCALE, **change}
        with pytest.raises(ValueError, match=message):
            nimfast.DeMask(autoencoder(), classifier, **options)
