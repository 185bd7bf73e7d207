# SPDX-License-Identifier: Apache-2.0
"""From the bytes of one stored picture to pixels: Pillow on the CPU, nvJPEG on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from nimfast.errors import UserError

Decoder = Literal["cpu", "cuda"]

# ImageNet's evaluation recipe: short side to 256, then the central 224 x 224.
_RESIZE_PER_CROP = 256 / 224


def open_picture(stored: bytes | np.ndarray) -> Image.Image:
    """The picture decoded, in mode L, RGB, or F (16-bit grayscale scaled to [0, 1]).

    Args:
        stored: an image file, or its pixels, uint8 ``[H, W, 3]``.

    Raises:
        ValueError: it cannot be decoded; the message says why in one line.
    """
    # Decoders signal broken files by OSError, SyntaxError, ValueError, struct.error, ...
    try:
        if isinstance(stored, np.ndarray):
            return Image.fromarray(stored)
        with Image.open(BytesIO(stored)) as image:
            return _plain(image)
    except UnidentifiedImageError:  # Pillow's own words for this name a memory address
        raise ValueError("unknown format") from None
    except Exception as error:
        raise ValueError(one_line(error)) from error


def _plain(image: Image.Image) -> Image.Image:
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


def resize_and_crop(image: Any, size: int) -> Any:
    """Picture or tensor ``[C, h, w]``: short side to 8/7 of `size` (bicubic), central square."""
    # torchvision's rounding of sizes and offsets is the one published accuracies rest on. Its
    # import costs a second, which other data sets need not pay.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    short = round(size * _RESIZE_PER_CROP)
    resized = transforms.resize(image, [short], InterpolationMode.BICUBIC, antialias=True)
    return transforms.center_crop(resized, [size, size])


def to_tensor(image: Image.Image) -> Tensor:
    """Mode L or RGB -> uint8 ``[C, H, W]``; mode F -> fp32."""
    array = np.array(image)  # a copy: torch warns of read-only memory
    return torch.from_numpy(array).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def to_pixels(image: Tensor) -> Tensor:
    """Stored values, see `ImageDataset.pictures`, -> fp32 pixels in [0, 1]."""
    # Bicubic resizing of floats overshoots; bytes are clipped by it.
    return image.clamp(0, 1) if image.is_floating_point() else image.float() / 255


def check_cuda_decoder() -> None:
    """Whether ``?decode=cuda`` can be served at all.

    Raises:
        UserError: no CUDA device, or called in a process of a DataLoader.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "?decode=cuda needs a CUDA device, and there is none; leave it out to decode on the CPU"
        )
    if torch.utils.data.get_worker_info() is not None:
        raise UserError("?decode=cuda decodes in the main process; use it with --workers 0")


def decode_on_gpu(stored: Sequence[bytes]) -> list[Tensor | None]:
    """Decode JPEG files in one call of nvJPEG: uint8 ``[C, h, w]`` on the GPU each.

    None stands for what nvJPEG does not take (other formats, CMYK, broken files): Pillow's turn.

    Raises:
        UserError: no CUDA device, a process of a DataLoader, or a torchvision without nvJPEG.
    """
    check_cuda_decoder()
    try:
        from torchvision.io import decode_jpeg
    except ImportError as error:  # deprecated by torchvision 0.29
        raise UserError(
            f"?decode=cuda is not served by this torchvision ({one_line(error)}); leave it out"
        ) from error

    result: list[Tensor | None] = [None] * len(stored)
    places = [i for i, data in enumerate(stored) if data.startswith(b"\xff\xd8")]
    if not places:
        return result
    files = [torch.frombuffer(bytearray(stored[i]), dtype=torch.uint8) for i in places]
    try:
        decoded = decode_jpeg(files, device="cuda")
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "not compiled" in str(error):
            raise UserError(
                f"?decode=cuda is not served by this torchvision ({one_line(error)}); leave it out"
            ) from error
        if len(places) == 1:
            return result
        # One file that it cannot read fails the whole call.
        return [image for data in stored for image in decode_on_gpu([data])]
    for place, image in zip(places, decoded, strict=True):
        result[place] = image
    return result


def one_line(error: BaseException) -> str:
    """First line of an error's message, for use inside another message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
