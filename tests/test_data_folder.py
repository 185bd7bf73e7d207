# SPDX-License-Identifier: Apache-2.0
"""Folders of images: what is read, what identifies it, broken and unequal pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import complaint, picture, png, write_folder
from PIL import Image

from nimfast.data import load
from nimfast.data.base import UnreadableImage
from nimfast.errors import UserError


def test_folder(tmp_path: Path) -> None:
    images = {"b/1.png": picture(1), "a/2.png": picture(2), "a/deep/3.png": picture(3)}
    data = load(f"imagefolder:{write_folder(tmp_path / 'birds', images)}", "all")
    assert (data.name, data.split, data.classes) == ("imagefolder:birds", "all", ("a", "b"))
    assert (len(data), data.shape) == (3, (3, 4, 6))
    assert [data[i][1] for i in range(3)] == [0, 0, 1]
    pixels, _ = data[2]
    expected = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1) / 255
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels, expected)
    assert torch.equal(data[-1][0], pixels)
    with pytest.raises(IndexError):
        data[3]


def test_folder_of_splits(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train/a/1.png": picture(), "val/a/1.png": picture(9)})
    for name in ("val", "validation"):
        data = load(f"imagefolder:{tmp_path}", name)
        assert float(data[0][0][0, 0, 0]) == pytest.approx(9 / 255)
    assert "has no split 'test' but train, val" in complaint(f"imagefolder:{tmp_path}")
    # A folder that is itself a split serves any name.
    assert len(load(f"imagefolder:{tmp_path}/val", "test")) == 1


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"car/1.png": picture(), "train/1.png": picture()})
    assert load(f"imagefolder:{tmp_path}").classes == ("car", "train")


def test_empty_folder(tmp_path: Path) -> None:
    assert "no images in" in complaint(f"imagefolder:{tmp_path}")
    (tmp_path / "a").mkdir()
    assert "no images in" in complaint(f"imagefolder:{tmp_path}")


def test_unequal_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": picture(), "a/2.png": picture(height=5, width=7)})
    message = complaint(f"imagefolder:{tmp_path}")
    assert "4x6" in message and "5x7" in message and "2.png" in message and "?size=" in message
    assert load(f"imagefolder:{tmp_path}?size=3").shape == (3, 3, 3)


def test_unequal_sizes_beyond_those_looked_at_first(tmp_path: Path) -> None:
    images = {f"a/{i:02}.png": picture(height=5 if i == 1 else 4) for i in range(32)}
    data = load(f"imagefolder:{write_folder(tmp_path, images)}")
    assert data[2][0].shape == data.shape
    with pytest.raises(UserError, match="4x6.*5x6.*01.png"):
        data[1]


def test_size_is_the_imagenet_recipe(tmp_path: Path) -> None:
    from torchvision import transforms

    original = picture(height=40, width=50)
    write_folder(tmp_path, {"a/1.png": original})
    recipe = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
        ]
    )
    assert torch.equal(load(f"imagefolder:{tmp_path}?size=28")[0][0], recipe(original))


def test_not_an_image(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": picture()})
    whole = png(picture(height=64, width=64))
    half = whole[: len(whole) // 2]
    for content, reason in ((b"hello", "unknown format"), (b"", "unknown format"), (half, "")):
        (tmp_path / "a/2.png").write_bytes(content)
        data = load(f"imagefolder:{tmp_path}")  # one broken image does not hide the others
        with pytest.raises(UnreadableImage, match=f"2.png is not an image .*\\({reason}"):
            data[1]
        good, broken = data.pictures([0, 1])
        assert isinstance(good, tuple) and isinstance(broken, UnreadableImage)
    (tmp_path / "a/1.png").write_text("hello")
    assert "1.png is not an image that can be read (unknown format)" in complaint(
        f"imagefolder:{tmp_path}"
    )


def test_first_image_broken(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/1.png": picture(), "a/2.png": picture(), "a/3.png": picture()})
    (tmp_path / "a/1.png").write_text("hello")
    assert load(f"imagefolder:{tmp_path}").shape == (3, 4, 6)
    picture(height=5).save(tmp_path / "a/3.png")
    assert "4x6" in (message := complaint(f"imagefolder:{tmp_path}")) and "2.png" in message


def test_pictures_are_those_stored(tmp_path: Path) -> None:
    """Training crops from the whole picture, whatever size it is evaluated in."""
    images = {"a/1.png": picture(height=9, width=12), "a/2.png": picture(mode="L")}
    data = load(f"imagefolder:{write_folder(tmp_path, images)}?size=3")
    assert data.shape == (3, 3, 3) and not data.labelled
    (one, _), (other, _) = data.pictures([0, 1])
    assert (one.shape, other.shape) == ((3, 9, 12), (3, 4, 6)) and one.dtype == torch.uint8
    assert torch.equal(one, torch.from_numpy(np.array(images["a/1.png"])).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("mode", "suffix", "channels"),
    [
        ("1", "png", 1),
        ("L", "png", 1),
        ("LA", "png", 1),
        ("P", "png", 3),
        ("RGBA", "png", 3),
        ("CMYK", "jpg", 3),
    ],
)
def test_colours(tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
    image = picture(mode=mode)
    write_folder(tmp_path, {f"a/1.{suffix}": image})
    pixels, _ = load(f"imagefolder:{tmp_path}")[0]
    assert pixels.shape == (channels, 4, 6)
    reference = np.array(image.convert("RGB"), dtype=np.float32) / 255
    # JPEG loses a little; everything else is exact.
    error = np.abs(pixels.permute(1, 2, 0).numpy() - reference).max()
    assert error <= (0.1 if suffix == "jpg" else 1e-6)


def test_16_bit_grayscale_keeps_its_depth(tmp_path: Path) -> None:
    values = np.array([[0, 1, 1000], [40000, 65534, 65535]], dtype=np.uint16)
    write_folder(tmp_path, {"a/1.png": Image.fromarray(values)})
    pixels, _ = load(f"imagefolder:{tmp_path}")[0]
    assert torch.equal(pixels[0], torch.from_numpy(values.astype(np.float32) / 65535))


def test_grayscale_among_colour(tmp_path: Path) -> None:
    """ImageNet has a few grayscale files; they become equal channels."""
    write_folder(tmp_path, {"a/1.png": picture(mode="L"), "a/2.png": picture()})
    pixels, _ = load(f"imagefolder:{tmp_path}")[0]
    assert pixels.shape == (3, 4, 6) and torch.equal(pixels[0], pixels[2])


def test_colour_among_grayscale_beyond_those_looked_at_first(tmp_path: Path) -> None:
    images = {f"a/{i:02}.png": picture(mode="RGB" if i == 1 else "L") for i in range(32)}
    data = load(f"imagefolder:{write_folder(tmp_path, images)}")
    with pytest.raises(UserError, match="01.png has colours"):
        data[1]


def test_folder_identity(tmp_path: Path) -> None:
    def identity(root: Path, split: str = "test", **changed: int) -> str:
        images = {f"a/{i}.png": picture(i) for i in range(3)}
        images |= {f"{name}.png".replace("_", "/"): picture(v) for name, v in changed.items()}
        return load(f"imagefolder:{write_folder(tmp_path / root / 'x', images)}", split).identity()

    same = identity(Path("one"))
    assert identity(Path("two")) == same  # wherever the folder lies
    others = [
        identity(Path("one"), "train"),
        identity(Path("three"), a_1=77),  # other pixels
        identity(Path("four"), a_3=3),  # one image more
        load(f"imagefolder:{tmp_path}/one/x?size=3").identity(),
    ]
    assert len({same, *others}) == 5
