# SPDX-License-Identifier: Apache-2.0
"""From stored pictures to tensors of one size: what the file, parquet and hub readers share."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from nimfast.data.base import ImageDataset, UnreadableImage
from nimfast.data.decode import (
    Decoder,
    decode_on_gpu,
    one_line,
    open_picture,
    resize_and_crop,
    to_pixels,
    to_tensor,
)
from nimfast.errors import UserError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")

# Opening a parquet row group or a file on a network disk is slow, so sizes and colours are
# learnt from this many images; the others are checked when they are read.
_PROBED = 16


class Options(NamedTuple):
    """What may follow a data set's name.

    Attributes:
        size: side S of the images: the short side is resized to 8/7 S (bicubic), then the central
            S x S is cut out, as ImageNet is evaluated. None keeps the pictures as they are.
        decode: ``cpu`` (Pillow) or ``cuda`` (nvJPEG, in the main process; images stay on the GPU).
    """

    size: int | None = None
    decode: Decoder = "cpu"


class PictureDataset(ImageDataset):
    """Data set of encoded pictures, decoded when asked for.

    Grayscale stays one channel unless the data also has colour pictures; alpha is dropped;
    palette and CMYK become RGB; 16-bit grayscale is scaled by 1/65535 and 8-bit by 1/255.

    Args:
        name, split, classes: see `ImageDataset`.
        labels: one integer label per image.
        options: see `Options`.

    Raises:
        UserError: no images, a label without a class, none of the images looked at can be read,
            unequal sizes.
    """

    def __init__(
        self,
        name: str,
        split: str,
        classes: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        options: Options,
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
        self._options = options
        self.on_gpu = options.decode == "cuda"
        self.shape = self._probe()

    @abstractmethod
    def _stored(self, index: int) -> bytes | np.ndarray:
        """The picture as it is stored: a file's bytes, or pixels (uint8 ``[H, W, 3]``).

        Raises:
            OSError, ValueError: it is not there.
        """

    @abstractmethod
    def _place(self, index: int) -> str:
        """Where the picture stands (file or row), for messages."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]  # negative indices, IndexError
        return self._fit(self._pixels(index), index).contiguous(), int(self.labels[index])

    def pictures(self, indices: Sequence[int]) -> list[tuple[Tensor, int] | UnreadableImage]:
        """See `ImageDataset`; with a size, the pictures as they are before it."""
        found: list[tuple[Tensor, int] | UnreadableImage] = []
        for index, image in zip(indices, self._decode(indices), strict=True):
            if isinstance(image, UnreadableImage):
                found.append(image)
            else:
                any_size = self._options.size is not None
                found.append((self._fit(_tensor(image), index, any_size), int(self.labels[index])))
        return found

    def _fit(self, pixels: Tensor, index: int, any_size: bool = False) -> Tensor:
        """The image with the channels of this data; UserError where its shape is another."""
        channels, height, width = self.shape
        if pixels.shape[1:] != (height, width) and not any_size:
            raise self._unequal(index, tuple(pixels.shape[1:]))
        if pixels.shape[0] > channels:
            raise UserError(
                f"{self._place(index)} has colours, the other images of {self.name} are grayscale;"
                " convert it, or all of them"
            )
        return pixels.expand(channels, -1, -1)

    def _probed(self) -> list[int]:
        """Indices of a few images, spread evenly, the first among them."""
        count = min(_PROBED, len(self))
        return [i * len(self) // count for i in range(count)]

    def _probe(self) -> tuple[int, int, int]:
        shapes: dict[int, tuple[int, ...]] = {}
        broken: list[UnreadableImage] = []
        for index in self._probed():
            try:
                shapes[index] = tuple(self._pixels(index).shape)
            except UnreadableImage as error:
                broken.append(error)
        if not shapes:
            raise broken[0]
        self._model = next(iter(shapes))
        _, height, width = shapes[self._model]
        # Set before a complaint, which names it.
        self.shape = (max(shape[0] for shape in shapes.values()), height, width)
        for index, shape in shapes.items():
            if shape[1:] != (height, width):
                raise self._unequal(index, shape[1:])
        return self.shape

    def _unequal(self, index: int, other: tuple[int, ...]) -> UserError:
        _, height, width = self.shape
        return UserError(
            f"images of {self.name} differ in size: {height}x{width} ({self._place(self._model)}),"
            f" {other[0]}x{other[1]} ({self._place(index)}); add '?size=224' to the data's name"
            " to resize and crop all of them"
        )

    def _pixels(self, index: int) -> Tensor:
        """The image as it is evaluated, fp32 in [0, 1]."""
        image = self._decode([index])[0]
        if isinstance(image, UnreadableImage):
            raise image
        size = self._options.size
        return to_pixels(_tensor(image if size is None else resize_and_crop(image, size)))

    def _decode(self, indices: Sequence[int]) -> list[Image.Image | Tensor | UnreadableImage]:
        """Each a picture, or on a GPU a tensor, or what is wrong with it."""
        stored: list[bytes | np.ndarray | ValueError | OSError] = []
        for index in indices:
            try:
                stored.append(self._stored(index))
            except (OSError, ValueError) as error:
                stored.append(error)
        on_gpu: list[Tensor | None] = [None] * len(stored)
        if self._options.decode == "cuda":
            on_gpu = decode_on_gpu([data if isinstance(data, bytes) else b"" for data in stored])
        decoded: list[Image.Image | Tensor | UnreadableImage] = []
        for index, data, tensor in zip(indices, stored, on_gpu, strict=True):
            try:
                if isinstance(data, Exception):
                    raise data
                if tensor is None:
                    picture = open_picture(data)
                    on_cpu = self._options.decode == "cpu"
                    decoded.append(picture if on_cpu else to_tensor(picture).cuda())
                else:
                    decoded.append(tensor)
            except (OSError, ValueError) as error:
                decoded.append(
                    UnreadableImage(
                        f"{self._place(index)} is not an image that can be read"
                        f" ({one_line(error)}); repair or remove it"
                    )
                )
        return decoded

    def _digest(self, *content: bytes) -> str:
        # nvJPEG rounds otherwise than the CPU's decoder: other pixels.
        other = [] if self._options.decode == "cpu" else [self._options.decode.encode()]
        return super()._digest(*content, *other)


def _tensor(image: Image.Image | Tensor) -> Tensor:
    return image if isinstance(image, Tensor) else to_tensor(image)


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
