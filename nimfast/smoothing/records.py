# SPDX-License-Identifier: Apache-2.0
"""Result files of a certification: one TSV row per image, and a JSON header beside the TSV.

The first six columns are the field's format, ``idx label predict radius correct time``, so that
scripts written for it read our files; files with these six columns only are read here too.

A result file survives being killed at any moment: rows are appended whole and synced, a torn last
row is cut off on resume, the header is replaced atomically, and a lock keeps a second process out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from types import TracebackType
from typing import Any

from nimfast.errors import UserError

FORMAT = "nimfast certify 1"
ORIGINAL_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")

# Header fields that may differ between the sessions of one run: each session appends its own.
_PER_SESSION = ("environments",)

# Decimals kept in a file, always rounded down. A bound near 1 needs many: dr = dp / 3e-4 at r = 3.8
# sigma.
_DECIMALS = {"radius": 6, "p_lower": 12, "time": 3}


@dataclass(frozen=True)
class Row:
    """What was found for one image. Fields after `time` are None where a file has six columns only.

    Attributes:
        idx: index of the image in its data set.
        label: true class.
        predict: certified class, -1 for abstain.
        radius: certified l2 radius in pixel units of [0, 1], rounded down; 0 where abstained.
        correct: whether `predict` is `label`.
        time: seconds spent on the image.
        count: votes of the tested class among the `n` estimation samples.
        samples: noisy samples drawn in total.
        p_lower: lower bound of the tested class's probability, rounded down.
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
    return str(Decimal(value).quantize(Decimal(1).scaleb(-decimals), ROUND_FLOOR))


def _format(name: str, value: Any) -> str:
    if name == "radius":
        # Through str: a target of 0.7 is a float below 0.7 and must not become 0.699999. Radii are
        # below what is certified by more than the digits that str adds.
        value = Decimal(str(value))
    if name in _DECIMALS:
        return _round_down(value, _DECIMALS[name])
    return str(int(value)) if isinstance(value, bool) else str(value)


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
    known = {name: text for name, text in zip(columns, cells, strict=True) if name in _TYPES}
    return Row(**{name: _parse_field(name, text) for name, text in known.items()})


def _parse(path: Path, data: bytes) -> list[Row]:
    """Rows of a file's complete lines; UserError names the first line that is none."""
    lines = data.decode("utf-8", errors="replace").splitlines()
    columns = lines[0].split("\t") if lines else []
    if tuple(columns[:6]) != ORIGINAL_COLUMNS:
        raise UserError(
            f"{path} is not a certification result: its first line must begin with the columns "
            f"{' '.join(ORIGINAL_COLUMNS)}, separated by tabs; give another file"
        )
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(_parse_row(columns, line))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path} line {number} is not a result row ({error}); the file is damaged: "
                "repair it or move it away"
            ) from None
    return rows


def read(path: Path) -> list[Row]:
    """All rows of a result file, ours or one with the original six columns.

    Raises:
        UserError: the file cannot be read or is no result file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return _parse(path, data)
    except UserError:
        # A row being written, or torn by a kill, is no damage: only the last line may be
        # incomplete.
        if not whole or whole == data:
            raise
        return _parse(path, whole)


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


def _write_header(path: Path, header: Mapping[str, Any]) -> None:
    # One field per line: easy to read, and a list of thousands of image indices stays one line.
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()
    )
    beside = header_path(path)
    temporary = beside.with_name(beside.name + ".tmp")
    with temporary.open("w") as file:
        file.write("{\n" + lines + "\n}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(beside)


def _refuse_difference(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name in [*new, *(name for name in old if name not in new)]:
        if name in _PER_SESSION or old.get(name) == new.get(name):
            continue
        values = f"{_shorten(old.get(name))} there, {_shorten(new.get(name))} now"
        raise UserError(
            f"{path} holds another run: {name} is {values}; repeat the old settings to continue "
            "it, or write to another --out"
        )


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class ResultFile:
    """A result file opened for writing: locked, and cut back to its last whole row.

    Use as a context manager. After `open`, `header` and `rows` are what an earlier session left
    (None and empty for a new file); `begin` checks that it was the same run; `append` writes one
    row.

    Raises:
        UserError: the place cannot be written, another process is writing there, or the file is
            damaged.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix in (".json", ".png"):
            raise UserError(
                f"--out {path} must name the TSV: {path.suffix} files are written beside it"
            )
        self.path = path
        self._fd = self._open_locked()
        try:
            self.header = read_header(path)
            self.rows = self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def _open_locked(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; choose another --out"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UserError(
                f"another process is writing {self.path}; wait for it or use another --out"
            ) from None
        return fd

    def _recover(self) -> list[Row]:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if self.header is None and data:
            raise UserError(
                f"{self.path} has no header {header_path(self.path).name} beside it, so it cannot "
                "be continued; move it away or use another --out"
            )
        rows = _parse(self.path, whole) if whole else []
        if whole != data:
            os.ftruncate(self._fd, len(whole))
        return rows

    def begin(self, header: Mapping[str, Any]) -> None:
        """Start the run that `header` describes, or continue it where the file holds rows of it.

        Args:
            header: all settings, with the indices of all images in order under ``images`` and this
                session's machine and versions as the only entry of ``environments``.

        Raises:
            UserError: the file holds rows of another run; names the first setting that differs.
        """
        header = {"format": FORMAT, **header}
        if self.header is not None and self.rows:
            _refuse_difference(self.path, self.header, header)
            done = [row.idx for row in self.rows]
            if done != header["images"][: len(done)]:
                raise UserError(
                    f"{self.path} does not hold its images in order; move it away and start again"
                )
            earlier = self.header.get("environments", [])
            new = [session for session in header["environments"] if session not in earlier]
            header["environments"] = [*earlier, *new]
        try:
            if header != self.header:
                _write_header(self.path, header)
            if os.fstat(self._fd).st_size == 0:
                self._write("\t".join(COLUMNS))
        except OSError as error:
            raise UserError(
                f"cannot write beside {self.path}: {error.strerror}; choose another --out"
            ) from None
        self.header = header

    def append(self, row: Row) -> None:
        """Write `row` whole, and return when it is on the disk. Numbers are rounded down.

        Raises:
            UserError: the disk is full or failed; the file still ends with the row before.
        """
        line = "\t".join(_format(name, getattr(row, name)) for name in COLUMNS)
        try:
            self._write(line)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; the same command continues"
            ) from None
        # What a reader of the file will see, rounded, not what was in memory.
        self.rows.append(_parse_row(COLUMNS, line))

    def _write(self, line: str) -> None:
        data = (line + "\n").encode()
        size = os.fstat(self._fd).st_size
        # One write for the whole line: a kill leaves all of it or, at worst, a torn tail without
        # newline.
        if os.write(self._fd, data) != len(data):
            os.ftruncate(self._fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._fd)

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
