# SPDX-License-Identifier: Apache-2.0
"""``hf:NAME[:SPLIT]``: a data set of the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

from typing import Any

from nimfast.data.base import ImageDataset
from nimfast.data.decode import one_line
from nimfast.data.pictures import (
    Options,
    PictureDataset,
    image_and_label_columns,
    image_bytes,
    require,
)
from nimfast.data.splits import choose, part_of
from nimfast.errors import UserError


class HubDataset(PictureDataset):
    """A ``datasets.Dataset`` with an image and a label column; images stay encoded until asked."""

    def __init__(self, name: str, data: Any, split: str, options: Options) -> None:
        image, label = image_and_label_columns(data.column_names, f"hf:{name}")
        labels = data.select_columns(label)[:][label]
        if not all(isinstance(value, int) for value in labels):
            raise UserError(
                f"hf:{name}: column {label!r} holds {data.features[label]};"
                " labels must be integers from 0"
            )
        classes = getattr(data.features[label], "names", None) or ()
        if type(data.features[image]).__name__ == "Image":
            data = data.cast_column(image, require("datasets").Image(decode=False))
        self._data = data.select_columns(image)
        self._image = image
        super().__init__(f"hf:{name}", split, classes, labels, options)

    def _stored(self, index: int) -> bytes:
        return image_bytes(self._data[index][self._image])

    def _place(self, index: int) -> str:
        return f"row {index} of {self.name}, split {self.split!r}"

    def identity(self) -> str:
        """Covers all labels and the bytes of 16 images."""
        probed = (image_bytes(self._data[index][self._image]) for index in self._probed())
        return self._digest(self.labels.tobytes(), *probed)


def load(argument: str, split: str, options: Options) -> ImageDataset:
    """Read from the library's cache, else download; ``:SPLIT`` in the name is taken as it is."""
    name, _, own_split = argument.partition(":")
    if not name:
        raise UserError("hf needs a name; write hf:NAME or hf:NAME:SPLIT, e.g. hf:uoft-cs/cifar10")
    datasets = require("datasets")
    # The library raises its own, the network's and the file system's errors alike.
    try:
        present = [] if own_split else datasets.get_dataset_split_names(name)
        chosen = choose(split, present)
        if chosen is None:
            raise ValueError(f"it has {', '.join(present)}")
        data = datasets.load_dataset(name, split=own_split or chosen.stored)
    except Exception as error:
        raise UserError(
            f"hf:{name}, split {own_split or split!r}, cannot be loaded ({one_line(error)});"
            " check name, split and network"
        ) from error
    whole = HubDataset(name, data, own_split or chosen.stored, options)
    return part_of(whole, chosen)
