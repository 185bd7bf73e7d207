# SPDX-License-Identifier: Apache-2.0
"""The sampling engine and the smoothed classifier: what is counted, and that it certifies."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from nimfast.data import load
from nimfast.models import Classifier, load_classifier
from nimfast.ops import Stream, corrupt, image_keys
from nimfast.runtime import DTYPES, Precision, pick_device, prepare
from nimfast.smoothing import Smooth, bounds
from nimfast.smoothing.batch import default_batch_size
from nimfast.smoothing.engine import Sampler
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import Request
from nimfast.smoothing.schedule import batch_rows

IMAGE = torch.linspace(0, 1, 3 * 4 * 5).view(3, 4, 5)
REQUESTS = [Request(Stream.SELECTION, 100), Request(Stream.ESTIMATION, 1000)]


class Halfspace(nn.Module):
    """Class 1 where the pixels' sum is positive: under noise its probability is known exactly."""

    def forward(self, images: Tensor) -> Tensor:
        score = images.sum(dim=(1, 2, 3))
        return torch.stack([-score, score, torch.full_like(score, -1e9)], dim=1)


class Quantised(nn.Module):
    """Logits on a coarse grid that depend on every pixel: near-ties exist only as exact ties."""

    def forward(self, images: Tensor) -> Tensor:
        score = images.sum(dim=(2, 3))  # [N, 3]
        return (score * 2).round()


class Normalised(nn.Module):
    """A classifier with its normalisation inside, as `nimfast.models` has them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.std = Quantised(), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        logits: Tensor = self.body((images - mean) / std)
        return logits


class SometimesNan(nn.Module):
    """NaN or infinity for a known share of the noisy images, class 0 for the rest."""

    def forward(self, images: Tensor) -> Tensor:
        score = images[:, 0, 0, 0]
        logits = torch.tensor([1.0, 0.0, 0.0]).repeat(len(images), 1)
        logits[score > 1] = math.nan
        logits[score < -1, 1] = math.inf
        return logits


def _sampler(
    classifier: nn.Module,
    num_classes: int,
    sigma: float,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Sampler:
    return Sampler(Network(classifier, num_classes, sigma, dtype=dtype), seed=seed)


def _half(probability: float) -> Tensor:
    """An image of which `Halfspace` sees class 1 with this probability at sigma 1."""
    return torch.full((3, 4, 5), float(norm.ppf(probability)) / math.sqrt(60))


def test_counts_are_those_of_a_plain_loop() -> None:
    sampler = _sampler(Quantised(), 3, 0.5, seed=3)
    found = sampler.counts(IMAGE, 7, REQUESTS, batch_size=64)
    for request, counts in zip(REQUESTS, found, strict=True):
        keys = image_keys(3, request.stream, torch.tensor([7]))
        noisy = corrupt(IMAGE[None], keys, 0.5, samples=request.n)
        classes = Quantised()(noisy).argmax(1)
        assert counts == [*torch.bincount(classes, minlength=3).tolist(), 0]


@pytest.mark.parametrize("batch_size", [1, 7, 32, 64, 96, 1000, 100_000])
def test_counts_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    sampler = _sampler(Quantised(), 3, 0.5, seed=3)
    assert sampler.counts(IMAGE, 7, REQUESTS, batch_size) == sampler.counts(IMAGE, 7, REQUESTS, 50)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_counts_on_cuda_are_those_on_the_cpu(precision: Precision) -> None:
    on_cpu = _sampler(Quantised(), 3, 0.5, seed=3).counts(IMAGE, 7, REQUESTS, 64)
    sampler = _sampler(Quantised(), 3, 0.5, seed=3, dtype=DTYPES[precision])
    on_cuda = sampler.counts(IMAGE.cuda(), 7, REQUESTS, 64)
    # Noise agrees within 1e-5, or the rounding of the type: few sums cross a grid point.
    few = 3 if DTYPES[precision] == torch.float32 else 60
    for found, expected in zip(on_cuda, on_cpu, strict=True):
        assert sum(found) == sum(expected)
        assert all(abs(a - b) <= few for a, b in zip(found, expected, strict=True))


def test_seed_index_and_stream_each_change_the_noise() -> None:
    def counts(seed: int, index: int, stream: Stream) -> list[int]:
        return _sampler(Quantised(), 3, 0.5, seed=seed).counts(
            IMAGE, index, [Request(stream, 5000)], 64
        )[0]

    base = counts(1, 2, Stream.ESTIMATION)
    assert counts(1, 2, Stream.ESTIMATION) == base
    others = [
        counts(2, 2, Stream.ESTIMATION),
        counts(1, 3, Stream.ESTIMATION),
        counts(1, 2, Stream.SELECTION),
    ]
    assert all(other != base for other in others)


def test_every_forward_pass_has_the_same_shape() -> None:
    shapes = set()

    class Spy(Halfspace):
        def forward(self, images: Tensor) -> Tensor:
            shapes.add(tuple(images.shape))
            assert not self.training
            return super().forward(images)

    drawn: list[int] = []
    _sampler(Spy().train(), 3, 0.5, seed=0).counts(IMAGE, 0, REQUESTS, 200, drawn.append)
    assert shapes == {(batch_rows(200, REQUESTS), 3, 4, 5)}
    assert sum(drawn) == 1100


@pytest.mark.parametrize("batch_size", [1, 20, 32, 64, 100, 1000, 10**6])
def test_batch_rows_fit_the_limit_waste_little_and_are_stable(batch_size: int) -> None:
    rows = batch_rows(batch_size, REQUESTS)
    assert rows <= batch_size
    assert batch_rows(rows, REQUESTS) == rows
    assert -(-1200 // rows) * rows < 1200 + 2 * rows


def test_normalisation_is_left_to_the_kernel_without_changing_the_counts() -> None:
    model = Normalised()
    whole = _sampler(nn.Sequential(model), 3, 0.5, seed=3).counts(IMAGE, 7, REQUESTS, 64)
    fused = _sampler(model, 3, 0.5, seed=3).counts(IMAGE, 7, REQUESTS, 64)
    # A logit in 1,000 may round to the other side of a grid point when normalised in another order.
    assert all(
        abs(a - b) <= 2
        for x, y in zip(whole, fused, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_rows_with_nan_or_infinity_are_no_votes() -> None:
    image = torch.zeros(3, 4, 5)
    (counts,) = _sampler(SometimesNan(), 3, 1.0, seed=0).counts(
        image, 0, [Request(Stream.ESTIMATION, 4000)], 64
    )
    assert counts[0] + counts[3] == 4000
    assert counts[1] == counts[2] == 0
    assert binomtest(counts[3], 4000, 2 * norm.sf(1)).pvalue > 1e-4
    found = Smooth(SometimesNan(), 3, 1.0, seed=0).certificate(image, 100, 4000, 0.001, 64)
    assert found.predict == 0
    assert found.invalid > 1000
    assert found.p_lower <= found.count / 4000  # of all samples, not of the finite ones


def test_a_model_that_always_returns_nan_abstains() -> None:
    class Nan(Halfspace):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * math.nan

    smoothed = Smooth(Nan(), 3, 1.0, seed=0)
    found = smoothed.certificate(IMAGE, 10, 100, 0.001, 64)
    assert (found.predict, found.radius, found.count, found.invalid) == (
        Smooth.ABSTAIN,
        0.0,
        0,
        110,
    )
    assert smoothed.predict(IMAGE, 100, 0.001, 64) == Smooth.ABSTAIN


@pytest.mark.parametrize("probability", [0.7, 0.9, 0.99])
def test_certify_covers_the_truth(probability: float) -> None:
    # The exact radius of a half-space is sigma * Phi^-1(p). With alpha = 0.05, at most about 5% of
    # the certificates may go beyond it; 300 tries are within 4 standard deviations of that.
    smoothed, tries, alpha = Smooth(Halfspace(), 3, 1.0, seed=11), 300, 0.05
    exact = norm.ppf(probability)
    answers = [smoothed.certify(_half(probability), 50, 200, alpha, 256) for _ in range(tries)]
    beyond = sum(radius > exact or predict == 0 for predict, radius in answers)
    assert beyond <= tries * alpha + 4 * math.sqrt(tries * alpha)
    certified = [radius for predict, radius in answers if predict == 1]
    assert len(certified) > tries * 0.8
    assert 0.4 * exact < sum(certified) / len(certified) < exact


def test_certify_is_count_bound_and_radius_together() -> None:
    smoothed = Smooth(Halfspace(), 3, 0.5, seed=1)
    image = _half(0.9) / 2
    found = smoothed.certificate(image, 100, 1000, 0.001, 64, index=5)
    votes = smoothed._sampler.counts(image, 5, [Request(Stream.ESTIMATION, 1000)], 64)[0]
    assert (found.predict, found.count, found.samples) == (1, votes[1], 1100)
    assert found.p_lower == bounds.lower_bound(votes[1], 1000, 0.001)
    assert found.radius == bounds.radius(found.p_lower, 0.5)
    assert smoothed.certify(image, 100, 1000, 0.001, 64, index=5) == (1, found.radius)


def test_certify_abstains_on_a_coin_and_predict_too() -> None:
    smoothed = Smooth(Halfspace(), 3, 1.0, seed=1)
    coin = torch.zeros(3, 4, 5)
    assert smoothed.certify(coin, 100, 500, 0.001, 64) == (Smooth.ABSTAIN, 0.0)
    assert smoothed.predict(coin, 500, 0.001, 64) == Smooth.ABSTAIN
    assert smoothed.predict(_half(0.9), 500, 0.001, 64) == 1


def test_sequential_predict_answers_or_abstains() -> None:
    smoothed = Smooth(Halfspace(), 3, 1.0, seed=1)
    assert smoothed.predict_sequential(_half(0.9), 1000, 0.001, 64) == 1
    assert smoothed.predict_sequential(_half(0.1), 1000, 0.001, 64) == 0
    assert smoothed.predict_sequential(torch.zeros(3, 4, 5), 500, 0.001, 64) == Smooth.ABSTAIN
    drawn: list[int] = []
    smoothed.base_classifier.register_forward_hook(lambda m, x, y: drawn.append(len(y)))
    smoothed.predict_sequential(_half(0.99), 100_000, 0.001, 64)
    assert sum(drawn) <= 256


def test_sequential_certify_stops_early_and_needs_no_label() -> None:
    smoothed = Smooth(Halfspace(), 3, 1.0, seed=1)
    radii = (0.0, 0.5, 1.0)
    for image, label, expected in (
        (_half(0.9), None, (1, 1.0)),  # the true radius is 1.28
        (_half(0.9), 1, (1, 1.0)),
        (_half(0.4), None, (0, 0.0)),
        (_half(0.9), 0, (Smooth.ABSTAIN, 0.0)),
        (torch.zeros(3, 4, 5), None, (Smooth.ABSTAIN, 0.0)),
    ):
        found = smoothed.certify_sequential(image, radii, 3000, 0.001, 64, label=label)
        assert (found.predict, found.radius) == expected
        assert found.samples <= 3000 if expected[0] < 0 else found.samples < 2500
    with pytest.raises(ValueError, match="radius 9 has no plan"):
        smoothed.certify_sequential(IMAGE, (0.0, 9.0), 3000, 0.001, 64)


def test_images_of_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"image is torch.uint8; pixels must be floats in \[0, 1\]"):
        Smooth(Halfspace(), 3, 1.0).certify(torch.zeros(3, 4, 5).byte(), 10, 100, 0.001, 64)


def test_calls_draw_fresh_noise_unless_an_index_is_named() -> None:
    smoothed = Smooth(Quantised(), 3, 0.5, seed=1)
    fresh = {smoothed.certificate(IMAGE, 10, 2000, 0.001, 512).count for _ in range(4)}
    named = {smoothed.certificate(IMAGE, 10, 2000, 0.001, 512, index=3).count for _ in range(4)}
    assert len(fresh) > 1
    assert len(named) == 1
    assert Smooth(Quantised(), 3, 0.5).seed != Smooth(Quantised(), 3, 0.5).seed


def test_a_script_written_for_the_original_class_runs() -> None:
    from nimfast.smoothing import Smooth as ChangedImport

    base_classifier = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    smoothed_classifier = ChangedImport(base_classifier, 3, 0.25)
    prediction, radius = smoothed_classifier.certify(IMAGE, 10, 100, 0.001, 1000)
    assert prediction in (ChangedImport.ABSTAIN, 0, 1, 2)
    assert radius >= 0
    assert smoothed_classifier.predict(IMAGE, 100, 0.001, 1000) in (-1, 0, 1, 2)
    assert all(
        weight.requires_grad and weight.dtype == torch.float32
        for weight in base_classifier.parameters()
    )


def test_bf16_runs_a_converted_copy() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    full = Smooth(base, 3, 0.5, seed=0).certificate(IMAGE, 10, 2000, 0.001, 64, index=0)
    half = Smooth(base, 3, 0.5, seed=0, precision="bf16").certificate(
        IMAGE, 10, 2000, 0.001, 64, index=0
    )
    assert base[1].weight.dtype == torch.float32
    assert half.count != 0
    assert abs(half.count - full.count) < 20


def test_default_batch_size_is_a_rule() -> None:
    cpu, cuda, small, image = (
        torch.device("cpu"),
        torch.device("cuda"),
        nn.Linear(4, 4),
        (3, 32, 32),
    )
    assert default_batch_size(small, cpu, image) == 1024
    assert default_batch_size(Halfspace(), cpu, image) == 1024
    assert default_batch_size(nn.Linear(1000, 1000, device="meta"), cpu, image) == 128
    assert default_batch_size(nn.Linear(4000, 4000, device="meta"), cpu, image) == 32
    assert default_batch_size(small, cuda, image) == 4096
    assert default_batch_size(small, cuda, (3, 224, 224)) == 320


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Smooth(Halfspace(), 3, 0.0), "sigma"),
        (lambda: Smooth(Halfspace(), 3, math.nan), "sigma"),
        (lambda: Smooth(Halfspace(), 1, 0.5), "num_classes"),
        (
            lambda: Smooth(Halfspace(), 4, 0.5).certify(IMAGE, 10, 100, 0.001, 64),
            r"logits of shape \(64, 4\)",
        ),
        (lambda: Smooth(Halfspace(), 3, 0.5).certify(IMAGE[0], 10, 100, 0.001, 64), r"\[C, H, W\]"),
        (
            lambda: Smooth(Halfspace(), 3, 0.5).certify(IMAGE, 0, 100, 0.001, 64),
            "n0 must be at least 1",
        ),
        (
            lambda: Smooth(Halfspace(), 3, 0.5).certify(IMAGE, 10, 0, 0.001, 64),
            "n must be at least 1",
        ),
        (lambda: Smooth(Halfspace(), 3, 0.5).certify(IMAGE, 10, 100, 0.7, 64), "alpha"),
        (lambda: Smooth(Halfspace(), 3, 0.5).predict(IMAGE, 100, 0.0, 64), "alpha"),
        (lambda: Smooth(Halfspace(), 3, 0.5).predict(IMAGE, 100, 0.1, 0), "batch_size"),
    ],
)
def test_arguments_out_of_range(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def _classes(
    sampler: Sampler, body: nn.Module, images: list[Tensor], batch_size: int, n: int
) -> Tensor:
    """The class of each of n samples of every image."""
    seen: list[Tensor] = []
    hook = body.register_forward_hook(lambda module, inputs, logits: seen.append(logits.argmax(1)))
    for index, image in enumerate(images):
        sampler.counts(image, index, [Request(Stream.ESTIMATION, n)], batch_size)
    hook.remove()
    return torch.cat(seen).view(len(images), -1)[:, :n]  # padding stands at the end of each image


def _balanced_vit_tiny() -> Classifier:
    """Random weights, with the head's bias set so that noise alone decides between the classes."""
    options = {"img_size": 32, "patch_size": 4, "num_classes": 10}
    body = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options).eval()
    with torch.no_grad():
        body.head.bias -= body(torch.randn(64, 3, 32, 32)).mean(0)
    return Classifier(body, "vit_tiny", (0.5,) * 3, (0.5,) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["digits", "vit_tiny"])
def test_samples_that_differ_between_compute_shapes(model: str, precision: Precision) -> None:
    # The measurement that docs/certification.md quotes: run with -m slow -s to see the numbers.
    torch.manual_seed(0)
    digits = [load("digits")[index][0] for index in range(0, 400, 40)]
    if model == "digits":
        classifier = load_classifier("digits", num_classes=10, shape=(1, 32, 32))
        images = digits
    else:
        classifier = _balanced_vit_tiny()
        images = [torch.full((3, 32, 32), 0.5)]
    device = pick_device()
    classifier = prepare(classifier, device, precision)
    sampler = _sampler(classifier, 10, 0.5, seed=0, dtype=DTYPES[precision])
    base = _classes(sampler, classifier.body, images, 64, n=512)
    for batch_size in (1, 32, 96, 512):
        other = _classes(sampler, classifier.body, images, batch_size, n=512)
        differing = int((base != other).sum())
        run = f"{model} {precision} on {device}, 64 against {batch_size} rows"
        print(f"{run}: {differing} of {base.numel()} samples differ")
        assert differing <= base.numel() * (1e-3 if precision == "fp32" else 0.05)
