# SPDX-License-Identifier: Apache-2.0
"""Rows of a certification's result file, as they are written and read.

The first six columns are the field's format, ``idx label predict radius correct time``, so that
scripts written for it read our files; files with these six columns only are read here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

from nimfast.errors import UserError
from nimfast.smoothing import parquet
from nimfast.smoothing.settings import GRID_PROTOCOLS

FORMAT = "nimfast certify 1"
ORIGINAL_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")

# Decimals kept in a file, always rounded down. A bound near 1 needs many: dr = dp / 3e-4 at r = 3.8
# sigma.
_DECIMALS = {"radius": 6, "p_lower": 12, "time": 6}


@dataclass(frozen=True)
class Row:
    """What was found for one image. Fields after `time` are None where a file has six columns only.

    Attributes:
        idx: index of the image in its data set.
        label: true class.
        predict: certified class, -1 for abstain.
        radius: certified l2 radius in pixel units of [0, 1], rounded down; 0 where abstained.
        correct: whether `predict` is `label`.
        time: seconds spent on the image: its share in the batches it took part in.
        count: votes of the tested class among the estimation samples.
        samples: noisy samples that the decision rests on, selection and estimation.
        p_lower: lower bound of the tested class's probability, rounded down.
        protocol: with what it decided by, for example ``exact`` or ``cohen-top2``.
        invalid: samples whose logits held NaN or infinity; they are votes for no class.
    """

    idx: int
    label: int
    predict: int
    radius: float
    correct: bool
    time: float
    count: int | None = None
    samples: int | None = None
    sigma: float | None = None
    n: int | None = None
    alpha: float | None = None
    p_lower: float | None = None
    protocol: str | None = None
    noise: str | None = None
    precision: str | None = None
    seed: int | None = None
    n0: int | None = None
    invalid: int | None = None


COLUMNS = tuple(field.name for field in fields(Row))
_TYPES = {field.name: str(field.type).removesuffix(" | None") for field in fields(Row)}


def _round_down(value: float | Decimal, decimals: int) -> str:
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-decimals), ROUND_FLOOR)
    return f"{rounded:f}"  # str would write 0E-12


def _format(name: str, value: Any) -> str:
    if name in _DECIMALS:
        return _round_down(value, _DECIMALS[name])
    return str(int(value)) if isinstance(value, bool) else str(value)


def _format_radius(row: Row) -> str:
    # Through str: a target of 0.7 is a float below 0.7 and must not become 0.699999. Radii are
    # below what is certified by more than the digits that str adds.
    value, decimals = Decimal(str(row.radius)), _DECIMALS["radius"]
    if row.protocol is not None and row.protocol.startswith(GRID_PROTOCOLS):
        # One of the targets, which read again must reach it: 36/255 has sixteen decimals.
        decimals = max(decimals, -int(value.as_tuple().exponent))
    return _round_down(value, decimals)


def format_row(row: Row) -> str:
    """`row` as a line, without its end; numbers are rounded down."""
    return "\t".join(
        _format_radius(row) if name == "radius" else _format(name, getattr(row, name))
        for name in COLUMNS
    )


def _seconds(text: str) -> float:
    """Seconds, or the `H:MM:SS.ffffff` that other tools write."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


def _parse_field(name: str, text: str) -> Any:
    if name == "time":
        return _seconds(text)
    if name == "correct":
        return {"0": False, "1": True}[text]
    return {"int": int, "float": float, "str": str}[_TYPES[name]](text)


def _parse_row(columns: Sequence[str], line: str) -> Row:
    cells = line.split("\t")
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} columns instead of {len(columns)}")
    known = _only_known(dict(zip(columns, cells, strict=True)))
    return Row(**{name: _parse_field(name, text) for name, text in known.items()})


def parse(path: Path, data: bytes) -> list[Row]:
    """Rows of a file's complete lines; UserError names the first line that is none."""
    lines = data.decode("utf-8", errors="replace").splitlines()
    columns = lines[0].split("\t") if lines else []
    _check_columns(path, columns)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(_parse_row(columns, line))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path} line {number} is not a result row ({error}); the file is damaged: "
                "repair it or move it away"
            ) from None
    return _one_protocol(path, rows)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if tuple(columns[:6]) != ORIGINAL_COLUMNS:
        raise UserError(
            f"{path} is not a certification result: its first line must begin with the columns "
            f"{' '.join(ORIGINAL_COLUMNS)}, separated by tabs; give another file"
        )


def _only_known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name in _TYPES}


def _one_protocol(path: Path, rows: list[Row]) -> list[Row]:
    protocols = sorted({row.protocol for row in rows if row.protocol is not None})
    if len(protocols) > 1:
        raise UserError(
            f"{path} mixes the protocols {' and '.join(protocols)}, which promise different things;"
            " keep one file for each"
        )
    return rows


def read(path: Path) -> list[Row]:
    """All rows of a result file, ours or one with the original six columns; TSV or Parquet.

    Raises:
        UserError: the file cannot be read or is no result file.
    """
    if path.suffix == parquet.SUFFIX:
        columns, found = parquet.read(path)
        _check_columns(path, columns)
        return _one_protocol(path, [Row(**_only_known(row)) for row in found])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return parse(path, data)
    except UserError:
        # A row being written, or torn by a kill, is no damage: only the last line may be
        # incomplete.
        if not whole or whole == data:
            raise
        return parse(path, whole)


def write_parquet(path: Path, rows: Sequence[Row], header: Mapping[str, Any]) -> None:
    """All rows of a finished run as a Parquet file, with its header in the file's metadata.

    Raises:
        UserError: no pyarrow, or the place cannot be written.
    """
    columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    parquet.write(path, _TYPES, columns, header)


def header_path(path: Path) -> Path:
    """Where the header of the result file `path` lies."""
    return path.with_suffix(".json")


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of the result file `path`, or None where there is none.

    Raises:
        UserError: the file beside it is not a header of ours.
    """
    beside = header_path(path)
    try:
        header = json.loads(beside.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the header {beside} ({error}); move it away or use another --out"
        ) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(
            f"{beside} is not a header of this version's result files; use another --out"
        )
    return header
