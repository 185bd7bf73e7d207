# SPDX-License-Identifier: Apache-2.0
"""Labelled images under one name each, as `load` and the command lines' ``--data`` take it.

- ``digits``: the embedded handwritten digits.
- ``cifar10[:DIR]``: CIFAR-10 of torchvision or of the Hugging Face hub.
- ``imagefolder:DIR``: DIR/CLASS/IMAGE, or DIR/SPLIT/CLASS/IMAGE.
- ``parquet:GLOB``: parquet files with columns image or img, and label or fine_label.
- ``hf:NAME[:SPLIT]``: a data set of the Hugging Face hub.

All but the digits take options at the end, as in ``?size=224&decode=cuda``; shells want quotes
around them: ``--data 'imagefolder:imagenet/val?size=224'``.

- ``size=S`` makes every image S x S as ImageNet is evaluated: short side to 8/7 S (bicubic),
  central S x S. Training that crops at random crops from the picture as it was before.
- ``decode=cuda`` decodes JPEG files by nvJPEG, in the main process; images stay on the GPU.

Where the data has no validation split, 5% of its training images are it (module `splits`).
"""

from __future__ import annotations

import importlib
import re
from typing import get_args

from nimfast.data.base import ImageDataset
from nimfast.data.decode import Decoder, check_cuda_decoder
from nimfast.data.pictures import Options
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
            are taken as they are, but for ``train`` and ``validation``, which are their parts.

    Raises:
        UserError: unknown kind or split, missing or empty folder or file, no label column, no image
            that can be read, images of unequal size, ``decode=cuda`` without CUDA.
    """
    place, options = _cut_options(spec)
    kind, _, argument = place.partition(":")
    if kind == "digits":
        if argument or options != Options():
            raise UserError(f"{spec!r}: the embedded digits take no options; write digits")
        from nimfast.data import digits

        try:
            return digits.load(split)
        except ValueError as error:
            raise UserError(f"digits: {error}") from error
    if kind not in _READERS:
        raise UserError(f"unknown data {spec!r}; choose {_FORMS}")
    if options.decode == "cuda":
        check_cuda_decoder()
    dataset: ImageDataset = importlib.import_module(_READERS[kind]).load(argument, split, options)
    return dataset


def _cut_options(spec: str) -> tuple[str, Options]:
    """Split ``?size=S&decode=D`` off; a lone ``?`` stays, as it means any character in a GLOB."""
    match = re.search(r"\?(\w+=[^?/]*)$", spec)
    if not match:
        return spec, Options()
    options = Options()
    for pair in match[1].split("&"):
        option, _, value = pair.partition("=")
        if option == "size":
            if not re.fullmatch(r"[1-9]\d{0,4}", value):
                raise UserError(
                    f"size must be a number of pixels, not {value!r}; write e.g. ?size=224"
                )
            options = options._replace(size=int(value))
        elif option == "decode":
            if value not in get_args(Decoder):
                raise UserError(f"decode must be cpu or cuda, not {value!r}")
            options = options._replace(decode=value)  # type: ignore[arg-type]
        else:
            raise UserError(
                f"unknown option {option!r} in {spec!r}; known are ?size=S and ?decode=cuda"
            )
    return spec[: match.start()], options
