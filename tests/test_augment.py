# SPDX-License-Identifier: Apache-2.0
"""Crops, flips and colours: their law, what they depend on, what a broken image does to a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import picture, png, write_folder, write_parquet
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from nimfast.data import load
from nimfast.data.base import ImageDataset
from nimfast.data.colours import erase, rand_augment
from nimfast.data.transforms import Augmentation, Augmented, Item, Skipped, _crop_box
from nimfast.errors import UserError
from train.feed import in_order
from train.parallel import World

RESIZED = Augmentation("resized", flip=True)


def noise_picture(number: int, height: int, width: int) -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def photos(tmp_path: Path) -> ImageDataset:
    """Twelve pictures, each of another size."""
    images = {f"{'ab'[i % 2]}/{i:02}.png": noise_picture(i, 30 + i, 50 - i) for i in range(12)}
    return load(f"imagefolder:{write_folder(tmp_path / 'photos', images)}?size=16")


def epoch_of(data: ImageDataset, augmentation: Augmentation, images: int) -> list[Item]:
    """The first images of an epoch."""
    return Augmented(data, augmentation, 7).__getitems__([(3, index) for index in range(images)])


def draws(count: int) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()


@pytest.mark.parametrize("shape", [(3, 60, 80), (3, 200, 40)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.67, 1.0)])
def test_crop_has_the_law_of_torchvision(
    shape: tuple[int, int, int], scale: tuple[float, float]
) -> None:
    """Place and size of the crop: five quantiles of each, over many draws."""
    torch.manual_seed(0)
    count, image = 4000, torch.zeros(shape)
    theirs = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(count)]
    ours = [_crop_box(shape, u[0], u[1], u[2:], scale) for u in torch.rand(count, 22).tolist()]
    for one, other in zip(np.transpose(ours), np.transpose(theirs), strict=True):
        for point in np.quantile(other, [0.1, 0.3, 0.5, 0.7, 0.9]):
            assert abs((one <= point).mean() - (other <= point).mean()) < 0.045  # 4 sigma


def test_crop_of_a_long_picture_falls_back_to_its_middle() -> None:
    assert _crop_box((3, 300, 30), 0.9, 0.9, [0.999] * 20, (0.2, 1.0)) == (130, 0, 40, 30)
    assert _crop_box((3, 30, 300), 0.1, 0.1, [0.999] * 20, (0.2, 1.0)) == (0, 130, 30, 40)


def test_resized_crop_is_that_of_pillow() -> None:
    stored = noise_picture(0, 40, 60)
    tensor = torch.from_numpy(np.array(stored)).permute(2, 0, 1)
    u = draws(23)
    top, left, height, width = _crop_box(tensor.shape, u[1], u[2], u[3:], (0.2, 1.0))
    box = (left, top, left + width, top + height)
    expected = np.array(stored.crop(box).resize((24, 24), Image.Resampling.BICUBIC))
    crop = Augmentation("resized")(tensor, u, (24, 24))
    assert crop.shape == (3, 24, 24) and crop.dtype == torch.float32 and crop.is_contiguous()
    # Pillow and torch round intermediate results each in their own way, by one step of 255.
    error = (crop.permute(1, 2, 0) * 255 - torch.from_numpy(expected)).abs().max()
    assert error < 1.01
    # Pixels that are floats already, as of 16-bit pictures, overshoot unless they are clipped.
    floats = Augmentation("resized")(tensor / 255, u, (24, 24))
    assert floats.min() >= 0 and floats.max() <= 1
    assert (floats - crop).abs().mean() < 0.003


def test_padded_crop_moves_the_image() -> None:
    image = torch.arange(1, 1 + 3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    seen = set()
    for u in torch.rand(500, 23, generator=torch.Generator().manual_seed(1)).tolist():
        moved = (Augmentation("padded", padding=4)(image, u, (8, 8)) * 255).round().byte()
        down, right = int(u[1] * 9) - 4, int(u[2] * 9) - 4
        seen.add((down, right))
        rows, columns = slice(max(0, down), 8 + min(0, down)), slice(max(0, right), 8 + right)
        there = image[:, rows, slice(columns.start, min(8, columns.stop))]
        inside = moved[:, max(0, -down) :, max(0, -right) :]
        inside = inside[:, : there.shape[1], : there.shape[2]]
        assert torch.equal(inside, there) and moved.count_nonzero() == there.count_nonzero()
    assert len(seen) == 81
    # Of another size: the short side first takes the wanted one.
    assert Augmentation("padded")(torch.ones(1, 20, 30), [0.5] * 23, (10, 10)).shape == (1, 10, 10)


def test_flip_alone_keeps_the_image() -> None:
    data = load("digits", "train")
    items = epoch_of(data, Augmentation(flip=True), 200)
    flipped = 0
    for image, label, index, asked, _ in items:
        original, own_label = data[index]
        assert (label, index) == (own_label, asked)
        flipped += torch.equal(image, original.flip(2)) and not torch.equal(image, original)
        assert torch.equal(image, original) or torch.equal(image, original.flip(2))
    assert 70 < flipped < 130
    for item in epoch_of(data, Augmentation(), 9):
        assert torch.equal(item.image, data[item.place][0])


def test_without_crop_the_image_is_the_evaluated_one(photos: ImageDataset) -> None:
    for image, _, index, _, _ in epoch_of(photos, Augmentation(), 12):
        # Pillow in evaluation, bytes of torch in training: a few steps of 255 apart.
        assert (image - photos[index][0]).abs().max() <= 3.01 / 255


def test_an_image_depends_on_seed_epoch_and_index_alone(photos: ImageDataset) -> None:
    def epoch(number: int, seed: int, order: list[int], **options: int) -> dict[int, torch.Tensor]:
        keys = [(number, index) for index in order]
        loader = DataLoader(Augmented(photos, RESIZED, seed), sampler=keys, **options)
        return {
            index: image
            for batch in loader
            for index, image in zip(batch.place.tolist(), batch.image, strict=True)
        }

    first = epoch(1, 5, list(range(12)), batch_size=12)
    assert len({tuple(image.flatten().tolist()) for image in first.values()}) == 12
    again = [
        epoch(1, 5, list(range(11, -1, -1)), batch_size=5),
        epoch(1, 5, list(range(12)), batch_size=4, num_workers=2),
        epoch(1, 5, list(range(0, 12, 2)), batch_size=1) | epoch(1, 5, list(range(1, 12, 2))),
    ]
    for other in again:
        assert all(torch.equal(first[index], other[index]) for index in range(12))
    mixed = Augmented(photos, RESIZED, 5).__getitems__([(1, 3), (2, 3)])
    assert torch.equal(mixed[0].image, first[3]) and not torch.equal(mixed[1].image, first[3])
    for other in (epoch(2, 5, list(range(12))), epoch(1, 6, list(range(12)))):
        assert not any(torch.equal(first[index], other[index]) for index in range(12))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.2, 1.5)])
def test_bad_scale(scale: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="--crop-scale must grow"):
        Augmentation(crop_scale=scale).check()


def test_bad_padding() -> None:
    with pytest.raises(UserError, match="--padding must be at least 0"):
        Augmentation(padding=-1).check()


# --- broken images ----------------------------------------------------------------------------


def with_broken(folder: Path, count: int, broken: tuple[int, ...]) -> ImageDataset:
    cells = [png(picture(i % 100)) for i in range(count)]
    for index in broken:
        cells[index] = cells[index][:50]
    return load(f"parquet:{write_parquet(folder / 'x.parquet', cells, [0] * count)}", "all")


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_counted_and_named(tmp_path: Path, workers: int) -> None:
    data = with_broken(tmp_path, 400, (5, 6, 399))
    skipped, got = Skipped(data), []
    for epoch in range(2):
        loader = DataLoader(
            Augmented(data, Augmentation("padded"), 0),
            sampler=[(epoch, index) for index in range(400)],
            batch_size=100,
            num_workers=workers,
        )
        for batch in loader:
            assert batch.image.shape == (100, 3, 4, 6)
            skipped.note(batch.asked, batch.place)
            got.append(batch.place)
    # The next image that can be read stands in, so that every batch is full.
    assert [int(got[0][5]), int(got[0][6]), int(got[3][99])] == [7, 7, 0]
    total, *lines = skipped.report()
    assert "3 broken images among the 400 of" in total
    assert [f"row {i} of" in line for i, line in zip((5, 6, 399), lines, strict=True)] == [True] * 3
    assert Skipped(data).report() == []


def test_broken_held_out_images_are_left_out(tmp_path: Path) -> None:
    data = with_broken(tmp_path, 300, (5, 128))
    skipped, world = Skipped(data), World(torch.device("cpu"))
    seen = [batch.indices.tolist() for batch in in_order(data, 64, world, skipped)]
    assert list(chain(*seen)) == [index for index in range(300) if index not in (5, 128)]
    assert [len(indices) for indices in seen] == [63, 64, 63, 64, 44]
    total, *lines = skipped.report()
    assert "2 broken images among the 300 of" in total
    assert ["row 5 of" in lines[0], "row 128 of" in lines[1]] == [True, True]


def received(data: ImageDataset) -> torch.Tensor:
    return torch.tensor([item.place for item in epoch_of(data, RESIZED, len(data))])


def test_too_many_broken_images(tmp_path: Path) -> None:
    data = with_broken(tmp_path, 100, (20, 21))
    skipped, asked = Skipped(data), torch.arange(100)
    got = received(data)
    skipped.note(asked[:21], got[:21])  # one in a hundred is still borne
    with pytest.raises(
        UserError, match=r"2 broken images .* more than 1% .* row 20 of .*x.parquet"
    ):
        skipped.note(asked, got)


def test_all_images_broken(tmp_path: Path) -> None:
    data = with_broken(tmp_path / "some", 40, tuple(i for i in range(40) if i % 5))
    got = received(data)
    with pytest.raises(UserError, match="32 broken images"):
        Skipped(data).note(torch.arange(40), got)
    with pytest.raises(UserError, match="row 0 of .* is not an image that can be read"):
        with_broken(tmp_path / "all", 40, tuple(range(40)))


# --- decoding on a GPU, as far as that goes without one -----------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": picture()})
    with pytest.raises(UserError, match=r"\?decode=cuda needs a CUDA device"):
        load(f"imagefolder:{tmp_path}?size=8&decode=cuda")


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_batches_for_nvjpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for nvJPEG: files it takes go there in one call, the others to Pillow."""
    import torchvision.io

    calls: list[int] = []
    on_cpu = torchvision.io.decode_jpeg

    def decode_jpeg(files: list[torch.Tensor], device: str) -> list[torch.Tensor]:
        assert device == "cuda"
        calls.append(len(files))
        return on_cpu(files)

    monkeypatch.setattr(torchvision.io, "decode_jpeg", decode_jpeg)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    images = {f"a/{i}.jpg": noise_picture(i, 20, 20) for i in range(4)}
    root = write_folder(tmp_path, {**images, "a/4.png": noise_picture(4, 20, 20)})
    plain, fast = load(f"imagefolder:{root}"), load(f"imagefolder:{root}?decode=cuda")
    assert plain.identity() != fast.identity() and fast.on_gpu and not plain.on_gpu
    assert load(f"imagefolder:{root}?decode=cuda", "train").on_gpu
    calls.clear()
    for one, other in zip(plain.pictures(range(5)), fast.pictures(range(5)), strict=True):
        assert (one[0].int() - other[0].int()).abs().max() <= 3
    assert calls == [4]
    (root / "a/2.jpg").write_bytes((root / "a/2.jpg").read_bytes()[:9])
    found = fast.pictures(range(5))
    assert [isinstance(item, tuple) for item in found] == [True, True, False, True, True]
    for first, second in pairwise([found[0], found[4]]):
        assert first[0].shape == second[0].shape == (3, 20, 20)


@pytest.fixture
def generators() -> Iterator[None]:
    """Fails where a test leaves a global generator moved."""
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    yield
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_follow_from_the_seed(channels: int, generators: None) -> None:
    picture = (torch.arange(channels * 1024).view(channels, 32, 32) % 251).byte()
    made = [rand_augment(picture, "rand-m9-mstd0.5-inc1", seed) for seed in range(200)]
    assert all(torch.equal(rand_augment(picture, "rand-m9-mstd0.5-inc1", s), made[s])
               for s in (0, 7, 199))  # fmt: skip
    assert all(value.shape == picture.shape and value.dtype == torch.uint8 for value in made)
    assert 100 < sum(not torch.equal(value, picture) for value in made) < 200  # p = 0.5, twice
    pixels = picture / 255
    erased = [erase(pixels, 0.25, seed) for seed in range(400)]
    assert torch.equal(erase(pixels, 0.25, 9), erased[9])
    changed = [(value != pixels).any(0) for value in erased]
    hit = torch.stack([value.any() for value in changed])
    assert hit.double().mean().item() == pytest.approx(0.25, abs=0.07)
    areas = torch.stack([value.double().mean() for value in changed])[hit]
    assert areas.min() > 0.015 and areas.max() < 0.36
    assert all(value.min() >= 0 and value.max() <= 1 for value in erased)
