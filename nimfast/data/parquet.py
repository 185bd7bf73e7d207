# SPDX-License-Identifier: Apache-2.0
"""``parquet:GLOB``: images inside parquet files, as the Hugging Face hub stores them."""

from __future__ import annotations

import glob
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nimfast.data.base import ImageDataset
from nimfast.data.decode import one_line
from nimfast.data.pictures import (
    Options,
    PictureDataset,
    image_and_label_columns,
    image_bytes,
    require,
)
from nimfast.data.splits import NAMES, choose, part_of
from nimfast.errors import UserError

# Row groups are read whole. All of CIFAR-10 stays in memory after one pass; of larger data the
# groups used last do.
_CACHE_BYTES = 1 << 30

_SPLIT_OF_FILE = re.compile(rf"({'|'.join(NAMES)})[-_.]")


class ParquetDataset(PictureDataset):
    """Images (bytes, or a struct with ``bytes``) and integer labels of parquet files, in order.

    Class names come from the Hugging Face metadata of the schema; without it they are the numbers.
    """

    def __init__(self, name: str, files: Sequence[Path], split: str, options: Options) -> None:
        self.files = list(files)
        self._groups: list[tuple[Path, str, int]] = []  # file, image column, row group in the file
        starts, labels, classes, rows = [], [], None, 0
        for file in self.files:
            source = _open_file(file)
            image, label = image_and_label_columns(source.schema_arrow.names, str(file))
            labels.append(_labels(file, source, label))
            names = _class_names(source.schema_arrow.metadata, label)
            if classes is not None and names != classes:
                raise UserError(
                    f"{file} and {self.files[0]} have different classes; name the files of one"
                    " data set"
                )
            classes = names
            for group in range(source.num_row_groups):
                self._groups.append((file, image, group))
                starts.append(rows)
                rows += source.metadata.row_group(group).num_rows
        self._starts = np.asarray(starts, dtype=np.int64)
        self._cache: OrderedDict[int, Any] = OrderedDict()
        super().__init__(name, split, classes or (), np.concatenate(labels), options)

    def _stored(self, index: int) -> bytes:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        cell = self._column(group)[index - int(self._starts[group])]
        return image_bytes(cell.as_py())

    def _place(self, index: int) -> str:
        file = self._groups[int(np.searchsorted(self._starts, index, side="right")) - 1][0]
        first = min(s for s, (f, _, _) in zip(self._starts, self._groups, strict=True) if f == file)
        return f"row {index - int(first)} of {file}"

    def _column(self, group: int) -> Any:
        """Image column of a row group, from the cache or the file."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, column, number = self._groups[group]
        # Opened anew each time: open files can be neither pickled nor shared with the worker
        # processes of a DataLoader.
        self._cache[group] = _open_file(file).read_row_group(number, columns=[column])[column]
        while len(self._cache) > 1 and sum(c.nbytes for c in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return self._cache[group]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def identity(self) -> str:
        """Covers the files' names, sizes and footers (place, size and extremes of every column
        chunk) and all labels; not the image bytes themselves."""
        about = "\n".join(f"{file.name} {file.stat().st_size}" for file in self.files)
        footers = (_footer(file) for file in self.files)
        return self._digest(about.encode(), self.labels.tobytes(), *footers)


def load(argument: str, split: str, options: Options) -> ImageDataset:
    """Read all matching files; where their names tell splits apart, those of ``split`` only."""
    if not argument:
        raise UserError("parquet needs files; write parquet:GLOB, e.g. 'parquet:data/*.parquet'")
    pattern = os.path.expanduser(argument)
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = [file for file in found if file.is_file()]
    if not files:
        hint = f"{pattern}/*.parquet" if found else "DIR/*.parquet"
        raise UserError(f"no file matches {pattern}; write e.g. 'parquet:{hint}'")
    splits = {file: m[1] for file in files if (m := _SPLIT_OF_FILE.match(file.name))}
    # Files of one split are what the user asked for by naming them.
    present = sorted(set(splits.values())) if len(set(splits.values())) > 1 else []
    chosen = choose(split, present)
    if chosen is None:
        raise UserError(
            f"{pattern} has no split {split!r} but {', '.join(present)}; name the files to use"
        )
    if present:
        files = [file for file in files if splits.get(file) == chosen.stored]
    name = f"parquet:{files[0].resolve().parent.name}"
    return part_of(ParquetDataset(name, files, chosen.stored, options), chosen)


def _open_file(file: Path) -> Any:
    parquet = require("pyarrow.parquet")
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise UserError(
            f"{file} is not a parquet file that can be read ({one_line(error)}); check it"
        ) from error


def _labels(file: Path, source: Any, column: str) -> np.ndarray:
    values = source.read(columns=[column])[column]
    array: np.ndarray = values.to_numpy()
    # A missing value turns the whole column into floats; an empty file need not have a type.
    if len(array) and array.dtype.kind not in "iu":
        raise UserError(
            f"{file}: column {column!r} holds {values.type}"
            f"{' with missing values' if values.null_count else ''};"
            " labels must be integers from 0"
        )
    return array.astype(np.int64)


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()  # plain parquet, or a label that is a bare number


def _footer(file: Path) -> bytes:
    """The metadata block at the end of a parquet file: block, its length (4 bytes), ``PAR1``."""
    with file.open("rb") as stream:
        stream.seek(-8, os.SEEK_END)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, os.SEEK_END)
        return stream.read(length)
