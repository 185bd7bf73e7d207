# SPDX-License-Identifier: Apache-2.0
"""Pictures, folders and parquet files that the tests of data sets write."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nimfast.data import load
from nimfast.errors import UserError

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10 += ["dog", "frog", "horse", "ship", "truck"]


def picture(value: int = 0, mode: str = "RGB", height: int = 4, width: int = 6) -> Image.Image:
    """A gradient, so that flips and transpositions show."""
    ramp = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3) + value
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, images: dict[str, Image.Image]) -> Path:
    for name, image in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return root


def write_parquet(
    file: Path,
    images: Sequence[Any],
    labels: Sequence[Any],
    *,
    columns: tuple[str, str] = ("image", "label"),
    names: Sequence[str] | None = None,
    group: int = 2,
) -> Path:
    """Row groups of two rows, so that a handful of images spans several."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({columns[0]: list(images), columns[1]: list(labels)})
    if names:
        features = {columns[1]: {"names": list(names), "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, row_group_size=group)
    return file


def cells(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": png(picture(first + i)), "path": None} for i in range(count)]


def complaint(spec: str, split: str = "test") -> str:
    with pytest.raises(UserError) as caught:
        load(spec, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)
