# SPDX-License-Identifier: Apache-2.0
"""Labelled images under one name each, as `load` and the command lines' ``--data`` take it.

- ``digits``: the embedded handwritten digits.
- ``cifar10[:DIR]``: CIFAR-10 of torchvision or of the Hugging Face hub.
- ``imagefolder:DIR``: DIR/CLASS/IMAGE, or DIR/SPLIT/CLASS/IMAGE.
- ``parquet:GLOB``: parquet files with columns image or img, and label or fine_label.
- ``hf:NAME[:SPLIT]``: a data set of the Hugging Face hub.

All but the digits take ``?size=S`` at the end, which makes every image S x S as ImageNet is
evaluated: short side to 8/7 S (bicubic), central S x S. Shells want quotes around it:
``--data 'imagefolder:imagenet/val?size=224'``.
"""

from __future__ import annotations

import importlib
import re

from nimfast.data.base import ImageDataset
from nimfast.errors import UserError

__all__ = ["ImageDataset", "load"]

# Imported on demand: nobody who certifies digits needs torchvision or pyarrow.
_READERS = {
    "cifar10": "nimfast.data.cifar10",
    "imagefolder": "nimfast.data.folder",
    "parquet": "nimfast.data.parquet",
    "hf": "nimfast.data.hub",
}
_FORMS = "digits, cifar10[:DIR], imagefolder:DIR, parquet:GLOB or hf:NAME"


def load(spec: str, split: str = "test") -> ImageDataset:
    """Open the data set that ``spec`` names.

    Args:
        spec: see the module's text.
        split: part of the data, e.g. ``train`` or ``test``. A folder or files that hold no splits
            are taken as they are.

    Raises:
        UserError: unknown kind or split, missing or empty folder or file, no label column, not an
            image, images of unequal size.
    """
    place, size = _cut_size(spec)
    kind, _, argument = place.partition(":")
    if kind == "digits":
        if argument or size is not None:
            raise UserError(f"{spec!r}: the embedded digits take no options; write digits")
        from nimfast.data import digits

        try:
            return digits.load(split)
        except ValueError as error:
            raise UserError(f"digits: {error}") from error
    if kind not in _READERS:
        raise UserError(f"unknown data {spec!r}; choose {_FORMS}")
    dataset: ImageDataset = importlib.import_module(_READERS[kind]).load(argument, split, size)
    return dataset


def _cut_size(spec: str) -> tuple[str, int | None]:
    """Split ``?size=S`` off; a lone ``?`` stays, as it means any character in a GLOB."""
    match = re.search(r"\?(\w+)=([^?/]*)$", spec)
    if not match:
        return spec, None
    option, value = match.groups()
    if option != "size":
        raise UserError(f"unknown option {option!r} in {spec!r}; the only one is ?size=S")
    if not re.fullmatch(r"[1-9]\d{0,4}", value):
        raise UserError(f"size must be a number of pixels, not {value!r}; write e.g. ?size=224")
    return spec[: match.start()], int(value)
