# SPDX-License-Identifier: Apache-2.0
"""The engine over many images: who shares a batch with whom changes nothing, and costs nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nimfast.data import load
from nimfast.defense import De3
from nimfast.errors import UserError
from nimfast.models import MAE, load_classifier
from nimfast.models.vit import architecture
from nimfast.ops import Stream, corrupt, image_keys
from nimfast.runtime import DTYPES, Precision, prepare
from nimfast.smoothing.batch import fitting_batch_size
from nimfast.smoothing.checks import check_function, check_modules
from nimfast.smoothing.denoised import Denoised
from nimfast.smoothing.engine import Sampler, Work
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import Decision, ProtocolName, Request, judge
from nimfast.smoothing.schedule import InFlight, Piece, Schedule

ROOT = Path(__file__).parent.parent
MOST = [Request(Stream.SELECTION, 100), Request(Stream.ESTIMATION, 2000)]
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
KEY = torch.zeros(1, dtype=torch.int64)


class Hash(nn.Module):
    """A class that depends on every pixel, on nothing but the image, and never nearly ties."""

    def forward(self, images: Tensor) -> Tensor:
        bucket = (images.double().flatten(1).sum(1) * 3).floor().long() % 4
        return nn.functional.one_hot(bucket, 4).float()


class Looks:
    """Asks for prefixes up to `looks` and keeps what it is told."""

    def __init__(self, looks: Sequence[int]) -> None:
        self.looks = list(looks)
        self.told: list[list[int]] = []

    def wants(self) -> Request | None:
        done = len(self.told)
        return Request(Stream.ESTIMATION, self.looks[done]) if done < len(self.looks) else None

    def tell(self, counts: list[int]) -> None:
        self.told.append(counts)


def _judge(protocol: ProtocolName, label: int):  # type: ignore[no-untyped-def]
    return judge(
        protocol,
        sigma=0.5,
        label=label,
        num_classes=10,
        n0=100,
        n=2000,
        alpha=0.001,
        radii=RADII,
    )


def _most(protocol: str) -> list[Request]:
    return MOST if protocol in ("cohen", "dmae") else MOST[1:]


def _decide(
    sampler: Sampler, protocol: ProtocolName, indices: Sequence[int], rows: int
) -> dict[int, Decision]:
    data = load("digits")
    works = [
        Work(index, data[index][0], _judge(protocol, data[index][1]), _most(protocol))
        for index in indices
    ]
    return {found.index: found.judge.decision() for found in sampler.run(works, rows)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("protocol", ["exact", "cohen"])
def test_one_image_or_many_in_any_order(protocol: ProtocolName, precision: Precision) -> None:
    model = load_classifier("digits", num_classes=10, shape=(1, 32, 32))
    prepared = prepare(model, torch.device("cpu"), precision)
    sampler = Sampler(Network(prepared, 10, 0.5, dtype=DTYPES[precision]), seed=3)
    indices = list(range(0, 400, 23))
    together = _decide(sampler, protocol, indices, 256)
    random.Random(0).shuffle(indices)
    assert _decide(sampler, protocol, indices, 256) == together
    for index in indices[:5]:
        assert _decide(sampler, protocol, [index], 256) == {index: together[index]}
    assert len({decision.samples for decision in together.values()}) > 1 or protocol == "cohen"


@pytest.mark.parametrize("rows", [1, 8, 32, 64, 320])
@pytest.mark.parametrize("looks", [(32, 64, 200), (50, 75, 76, 333), (1, 2, 3, 1000)])
def test_judges_are_told_prefixes(rows: int, looks: tuple[int, ...]) -> None:
    # Also where looks lie inside slots that ran ahead of them.
    images = torch.linspace(0, 1, 5 * 48).view(5, 3, 4, 4)
    sampler = Sampler(Network(Hash(), 4, 0.5), seed=1)
    works = [Work(i, image, Looks(looks), MOST[1:]) for i, image in enumerate(images)]
    for found in sampler.run(works, rows):
        keys = image_keys(1, Stream.ESTIMATION, torch.tensor([found.index]))
        noisy = corrupt(images[found.index, None], keys, 0.5, samples=looks[-1])
        classes = Hash()(noisy).argmax(1)
        expected = [torch.bincount(classes[:n], minlength=5).tolist() for n in looks]
        assert found.judge.told == expected


def test_batches_are_full_while_there_are_images() -> None:
    source = iter(range(1000))
    looks = [32, 64, 96, 160, 320, 640]

    def admit(place: int) -> InFlight[Looks] | None:
        index = next(source, None)
        if index is None:
            return None
        asks = Looks(looks[: 1 + index % len(looks)])
        return InFlight(index, place, asks, [Request(Stream.ESTIMATION, 640)], 3, 32)

    schedule = Schedule(admit, slots=16, slot=32, places=16)
    drawn = needed = batches = 0
    decided: list[int] = []
    while given := schedule.fill():
        assert len({image.place for image, _ in given}) <= 16
        batches += 1
        drawn += sum(piece.end - piece.first for _, piece in given)
        votes = np.zeros((16, 4), dtype=np.int64)
        used = sum(piece.slots(32) for _, piece in given)
        assert used <= 16
        votes[:used, 0] = 32  # every look is at a multiple of it
        for image in schedule.arrive(given, votes, 1.0):
            assert image.judge.told == [[n, 0, 0, 0] for n in image.judge.looks]
            needed += image.judge.looks[-1]
            decided.append(image.index)
    assert sorted(decided) == list(range(1000))
    assert drawn <= 1.01 * needed  # nothing is drawn in vain but at the very end
    assert batches <= 1.01 * needed / (16 * 32) + 1


def test_an_image_alone_runs_ahead_of_its_judge() -> None:
    image = InFlight(0, 0, Looks([32, 64, 2000]), MOST[1:], 3, 32)
    queue = [image]
    schedule = Schedule(lambda place: queue.pop() if queue else None, 8, 32, 1)
    given = schedule.fill()
    assert [piece for _, piece in given] == [
        Piece(Stream.ESTIMATION, 32 * slot, 32 * slot + 32) for slot in range(8)
    ]
    schedule.arrive(given, np.full((8, 4), 8, dtype=np.int64), 1.0)
    assert image.judge.told == [[8] * 4, [16] * 4]


def test_counts_with_noise_on_the_grid_are_those_of_a_plain_loop() -> None:
    image = torch.randint(0, 256, (3, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    sampler = Sampler(Network(Hash(), 4, 0.5, noise="grid"), seed=1)
    (counts,) = sampler.counts(image, 9, [Request(Stream.ESTIMATION, 500)], 64)
    keys = image_keys(1, Stream.ESTIMATION, torch.tensor([9]))
    classes = Hash()(corrupt(image[None], keys, 0.5, samples=500, noise="grid")).argmax(1)
    assert counts == torch.bincount(classes, minlength=5).tolist()
    with pytest.raises(ValueError, match="8-bit"):
        sampler.counts(image + 0.001, 9, [Request(Stream.ESTIMATION, 500)], 64)


def test_grid_slack_lowers_every_bound() -> None:
    def decide(slack: float) -> Decision:
        cohen = judge(
            "cohen", sigma=0.5, label=None, num_classes=2, n0=10, n=1000, alpha=0.001, radii=(),
            slack=slack,
        )  # fmt: skip
        cohen.tell([10, 0, 0])
        cohen.tell([990, 10, 0])
        return cohen.decision()

    assert decide(1e-3).p_lower < decide(0.0).p_lower
    assert decide(1e-3).radius < decide(0.0).radius


def _de3(stats: str) -> De3:
    torch.manual_seed(0)
    shape = architecture("nano", (3, 32, 32))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    return De3(
        MAE(shape).eval(),
        classifier,
        sigma=70,
        stats=stats,  # type: ignore[arg-type]
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
    )


@pytest.mark.parametrize("stats", ["noisy", "none"])
def test_certified_de3_classifies_what_de3_does(stats: str) -> None:
    defence, image = _de3(stats), torch.rand(3, 32, 32)
    network = Network(Denoised(defence, 70 / 255), 10, 70 / 255)
    keys = image_keys(5, Stream.ESTIMATION, torch.tensor([3]))
    with torch.inference_mode():
        ours = network(image[None], keys, KEY, 64)
        torch.testing.assert_close(ours, defence.draw(image[None], keys, 64), rtol=1e-4, atol=1e-4)
        assert ours.argmax(1).unique().numel() > 1
    assert check_function(network, image, 64)  # deterministic, unlike De3 itself
    whole = Network(nn.Sequential(Denoised(defence, 70 / 255)), 10, 70 / 255)
    torch.testing.assert_close(whole(image[None], keys, KEY, 64), ours, rtol=1e-4, atol=1e-4)


def test_de3_that_cannot_be_certified() -> None:
    with pytest.raises(UserError, match="stats=input.*stats=noisy"):
        Denoised(_de3("input"), 0.25)
    off = _de3("noisy")
    off.sigma = None
    with pytest.raises(UserError, match="is off"):
        Denoised(off, 0.25)


class _Shares(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :4]
        return logits - logits.mean(0)


def test_what_is_no_function_of_the_noisy_image() -> None:
    image = torch.rand(3, 8, 8)

    class Attends(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(1)[:, None, :16]
            out = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
            return out[:, 0, :4]

    class Normalises(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.batch_norm(images, None, None, training=True).flatten(1)[:, :4]

    for module, message in (
        (_Shares(), "looks at each image by itself"),
        (Attends(), "attention dropout"),
        (Normalises(), "statistics of its batch"),
    ):
        with pytest.raises(ValueError, match=message):
            check_function(Network(module, 4, 0.5), image, 64)
    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4))
    assert check_function(Network(dropping, 4, 0.5), image, 64)  # eval mode reaches it
    dropping.eval()[1].train()
    with pytest.raises(ValueError, match="Dropout '1' stays in training mode"):
        check_modules(dropping)


def test_batches_are_halved_until_they_fit() -> None:
    tried = []

    class Large(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            tried.append(len(images))
            if len(images) > limit:
                raise torch.OutOfMemoryError("no memory")
            return images.flatten(1)[:, :4]

    network, limit = Network(Large(), 4, 0.5), 300
    assert fitting_batch_size(network, torch.rand(3, 8, 8), 4096) == 256
    assert tried == [4096, 2048, 1024, 512, 256]
    limit = 10
    with pytest.raises(UserError, match="no memory for 32 rows"):
        fitting_batch_size(network, torch.rand(3, 8, 8), 256)


def test_a_model_that_does_not_compile_runs_and_says_so() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    def broken(dynamic: bool) -> None:
        def call(images: Tensor) -> Tensor:
            raise RuntimeError("no compiler here")

        module._compiled_call_impl = call

    network, image = Network(module, 4, 0.5), torch.rand(3, 8, 8)
    before = Sampler(network, seed=0).counts(image, 0, MOST[:1], 64)
    module.compile = broken  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"does not take this model \(no compiler here\)"):
        assert not network.compile(image, 64)
    assert Sampler(network, seed=0).counts(image, 0, MOST[:1], 64) == before


@pytest.mark.slow
def test_a_compiled_model_counts_as_the_eager_one() -> None:
    model = load_classifier("digits", num_classes=10, shape=(1, 32, 32))
    network = Network(prepare(model, torch.device("cpu"), packed=False), 10, 0.5)
    image = load("digits")[7][0]
    eager = Sampler(network, seed=0).counts(image, 0, MOST, 512)
    assert network.compile(image, 512)
    compiled = Sampler(network, seed=0).counts(image, 0, MOST, 512)
    for one, other in zip(eager, compiled, strict=True):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) <= 4


def test_cifar_images_carry_noise_on_the_grid(shared_data: Path) -> None:
    image, _ = load(f"cifar10:{shared_data / 'cifar10'}")[0]
    network = Network(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), 10, 0.5, noise="grid")
    assert check_function(network, image, 64)


PROGRAM = """
import sys, torch
from nimfast.smoothing.engine import Sampler, Work
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import Request
from nimfast.smoothing.run import most_requests
from nimfast.smoothing.protocols import judge

class Means(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10]

def peak():  # MiB; the largest so far, from the system
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) / 1024

def run(images, n):
    def works():
        for index in range(images):
            asked = judge("cohen", sigma=0.5, label=None, num_classes=10, n0=100, n=n, alpha=0.001,
                          radii=())
            yield Work(index, torch.rand(3, 64, 64), asked, most_requests({"n0": 100, "n": n}))
    return sum(1 for _ in Sampler(Network(Means(), 10, 0.5), seed=0).run(works(), 128))

run(20, 320)
before = peak()
assert run(int(sys.argv[1]), int(sys.argv[2])) == int(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("images", "n"), [(4, 20_000), (400, 100)])
def test_memory_does_not_grow(images: int, n: int) -> None:
    # 400 images are 19 MiB, 80,000 noisy ones 4 GiB.
    command = [sys.executable, "-c", PROGRAM, str(images), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8
