# SPDX-License-Identifier: Apache-2.0
"""From stored pictures to tensors of one size: what the file, parquet and hub readers share."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nimfast.data.base import ImageDataset
from nimfast.errors import UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")

# ImageNet's evaluation recipe: short side to 256, then the central 224 x 224.
_RESIZE_PER_CROP = 256 / 224

# Opening a parquet row group or a file on a network disk is slow, so sizes and colours are
# learnt from this many images; the others are checked when they are read.
_PROBED = 16


class PictureDataset(ImageDataset):
    """Data set of encoded pictures, decoded when asked for.

    Grayscale stays one channel unless the data also has colour pictures; alpha is dropped;
    palette and CMYK become RGB; 16-bit grayscale is scaled by 1/65535 and 8-bit by 1/255.

    Args:
        name, split, classes: see `ImageDataset`.
        labels: one integer label per image.
        size: side S of the images: the short side is resized to 8/7 S (bicubic), then the central
            S x S is cut out, as ImageNet is evaluated. ``None`` keeps the pictures as they are.

    Raises:
        UserError: no images, a label without a class, not an image, unequal sizes.
    """

    def __init__(
        self,
        name: str,
        split: str,
        classes: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        size: int | None,
    ) -> None:
        self.name, self.split = name, split
        self.labels = np.asarray(labels, dtype=np.int64)
        if not len(self.labels):
            raise UserError(f"{name} has no images in split {split!r}; choose other data")
        low, high = int(self.labels.min()), int(self.labels.max())
        # Published test sets often hide their labels as -1.
        if low < 0 or (classes and high >= len(classes)):
            wrong = low if low < 0 else high
            raise UserError(
                f"{name}, split {split!r}: label {wrong} names none of its {len(classes)} classes;"
                " choose a split with labels"
            )
        self.classes = tuple(classes) or tuple(str(label) for label in range(high + 1))
        self._size = size
        self.shape = self._probe()

    @abstractmethod
    def _open(self, index: int) -> Image.Image:
        """The picture, which may still be undecoded."""

    @abstractmethod
    def _place(self, index: int) -> str:
        """Where the picture stands (file or row), for messages."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]  # negative indices, IndexError
        pixels = self._pixels(index)
        channels, height, width = self.shape
        if pixels.shape[1:] != (height, width):
            raise self._unequal(index, tuple(pixels.shape[1:]))
        if pixels.shape[0] > channels:
            raise UserError(
                f"{self._place(index)} has colours, the other images of {self.name} are grayscale;"
                " convert it, or all of them"
            )
        return pixels.expand(self.shape).contiguous(), int(self.labels[index])

    def _probed(self) -> list[int]:
        """Indices of a few images, spread evenly, the first among them."""
        count = min(_PROBED, len(self))
        return [i * len(self) // count for i in range(count)]

    def _probe(self) -> tuple[int, int, int]:
        shapes = {index: tuple(self._pixels(index).shape) for index in self._probed()}
        _, height, width = shapes[0]
        # Set before a complaint, which names it.
        self.shape = (max(shape[0] for shape in shapes.values()), height, width)
        for index, shape in shapes.items():
            if shape[1:] != (height, width):
                raise self._unequal(index, shape[1:])
        return self.shape

    def _unequal(self, index: int, other: tuple[int, ...]) -> UserError:
        _, height, width = self.shape
        return UserError(
            f"images of {self.name} differ in size: {height}x{width} ({self._place(0)}),"
            f" {other[0]}x{other[1]} ({self._place(index)}); add '?size=224' to the data's name"
            " to resize and crop all of them"
        )

    def _pixels(self, index: int) -> Tensor:
        # Decoders signal broken files by OSError, SyntaxError, ValueError, struct.error, ...
        try:
            with self._open(index) as picture:
                image = _plain(picture)
        except UserError:
            raise
        except Exception as error:
            # Pillow's own words for this name a memory address.
            unknown = isinstance(error, UnidentifiedImageError)
            raise UserError(
                f"{self._place(index)} is not an image that can be read"
                f" ({'unknown format' if unknown else one_line(error)}); repair or remove it"
            ) from error
        return _to_tensor(image if self._size is None else _resize_and_crop(image, self._size))


def _plain(image: Image.Image) -> Image.Image:
    """The picture decoded, in mode L, RGB, or F (16-bit grayscale scaled to [0, 1])."""
    if image.mode in ("L", "RGB"):
        image.load()
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grayscale of more than 16 bits")
        return Image.fromarray(values / 65535)
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range")
    # Through RGBA, because a palette may itself hold transparency.
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    # torchvision's rounding of sizes and offsets is the one published accuracies rest on. Its
    # import costs a second, which other data sets need not pay.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    short = round(size * _RESIZE_PER_CROP)
    resized = transforms.resize(image, [short], InterpolationMode.BICUBIC)
    cropped: Image.Image = transforms.center_crop(resized, [size, size])
    return cropped


def _to_tensor(image: Image.Image) -> Tensor:
    """Mode L, RGB or F -> fp32 ``[C, H, W]`` in [0, 1]."""
    array = np.array(image)  # a copy: torch warns of read-only memory
    pixels = torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1).float()
    # Bicubic resizing of floats overshoots; 8-bit pictures are clipped by PIL itself.
    return pixels.clamp(0, 1) if image.mode == "F" else pixels / 255


def image_bytes(cell: Any) -> bytes:
    """Bytes of an image cell: plain, or the ``{"bytes", "path"}`` of Hugging Face."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise ValueError("it holds no image bytes")
    return data


def image_and_label_columns(names: Sequence[str], where: str) -> tuple[str, str]:
    """Names of the image and the label column; UserError where one is missing."""
    chosen = []
    for what, known in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS)):
        found = [name for name in known if name in names]
        if not found:
            raise UserError(
                f"{where} has no {what} column (its columns: {', '.join(names) or 'none'});"
                f" name it {' or '.join(known)}"
            )
        chosen.append(found[0])
    return chosen[0], chosen[1]


def require(module: str) -> Any:
    """An optional module of the ``data`` extra; UserError with the command where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this data needs {module.partition('.')[0]} ({one_line(error)});"
            " pip install 'nimfast[data]'"
        ) from error


def one_line(error: BaseException) -> str:
    """First line of an error's message, for use inside another message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
