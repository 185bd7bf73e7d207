# SPDX-License-Identifier: Apache-2.0
"""Result tables as Parquet files, for data frames: columns with types, the header as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nimfast.errors import UserError
from nimfast.files import replacing

SUFFIX = ".parquet"
_METADATA = b"nimfast"


def pyarrow(path: Path) -> Any:
    """The package, with its module `parquet`, to write or read `path`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow: pip install pyarrow, or give a name that ends in .tsv"
        ) from None
    return pyarrow


def write(
    path: Path,
    types: Mapping[str, str],
    columns: Mapping[str, Sequence[Any]],
    header: Mapping[str, Any],
) -> None:
    """Write a table in place of what is there, at once or not at all.

    Args:
        path: of the file.
        types: name of each column -> int, float, bool or str.
        columns: name -> values.
        header: what the rows have in common; anything JSON can hold.

    Raises:
        UserError: no pyarrow, or the place cannot be written.
    """
    arrow = pyarrow(path)
    known = {
        "int": arrow.int64(),
        "float": arrow.float64(),
        "bool": arrow.bool_(),
        "str": arrow.string(),
    }
    schema = arrow.schema(
        [
            # A seed may have all 64 bits.
            (name, arrow.uint64() if kind == "int" and _large(columns[name]) else known[kind])
            for name, kind in types.items()
        ],
        metadata={_METADATA: json.dumps(header)},
    )
    try:
        with replacing(path) as file:
            arrow.parquet.write_table(arrow.table(dict(columns), schema=schema), file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None


def _large(values: Sequence[int | None]) -> bool:
    return any(value is not None and value >= 2**63 for value in values)


def read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns of a table, and its rows.

    Raises:
        UserError: no pyarrow, no such file, or another kind of file.
    """
    arrow = pyarrow(path)
    try:
        with path.open("rb") as file:
            table = arrow.parquet.read_table(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from None
    except arrow.ArrowException:
        raise UserError(f"{path} is not a Parquet file; give another") from None
    return table.column_names, table.to_pylist()
