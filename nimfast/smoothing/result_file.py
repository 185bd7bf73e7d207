# SPDX-License-Identifier: Apache-2.0
"""Writing result files: one TSV row per image, and a JSON header beside the TSV.

A result file survives being killed at any moment: rows are appended whole as images are decided, a
torn last row is cut off on resume, the header is replaced atomically, and a lock keeps a second
run out. Several processes write a part each, ``NAME.part1.tsv`` and so on beside the file, which
the first one takes in at the end or when the run goes on. A finished file has its rows in the order
of the header's images, whoever decided them and when.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nimfast.errors import UserError
from nimfast.naming import difference
from nimfast.smoothing.records import (
    COLUMNS,
    FORMAT,
    Row,
    format_row,
    header_path,
    parse,
    read,
    read_header,
)

if TYPE_CHECKING:
    from typing_extensions import Self

# Header fields that may differ between the sessions of one run: each session appends its own.
_PER_SESSION = ("environments",)

_SYNC_SECONDS = 1.0


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
    if differs := difference(old, new, _PER_SESSION):
        raise UserError(
            f"{path} holds another run: {differs}; repeat the old settings to continue it, or "
            "write to another --out"
        )


def _open_locked(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UserError(
            f"another process is writing {path}; wait for it or use another --out"
        ) from None
    return fd


class Part:
    """A TSV of rows opened for writing: locked, and cut back to its last whole row.

    Use as a context manager.

    Args:
        path: of the TSV.

    Attributes:
        done: indices of the images that it holds.

    Raises:
        UserError: the place cannot be written, another process is writing there, or the file is
            damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open_locked(path)
        self._synced = time.monotonic()
        try:
            self.done = self._recover()
        except BaseException:
            if not os.fstat(self._fd).st_size:  # refused before it began: leave no empty file
                self.path.unlink(missing_ok=True)
            os.close(self._fd)
            raise

    def _recover(self) -> set[int]:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        done = {row.idx for row in parse(self.path, whole)} if whole else set()
        if whole != data:
            os.ftruncate(self._fd, len(whole))
        return done

    def append(self, row: Row) -> None:
        """Write `row` whole. Numbers are rounded down.

        When this returns, the row outlives this process; within a second it is on the disk.

        Raises:
            UserError: the disk is full or failed; the file still ends with the row before.
        """
        self._append(format_row(row), row.idx)

    def _append(self, line: str, idx: int) -> None:
        try:
            if os.fstat(self._fd).st_size == 0:
                self._write("\t".join(COLUMNS))
            self._write(line)
            # Not after every row: a small network decides about an image faster than a disk syncs.
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; the same command continues"
            ) from None
        self.done.add(idx)

    def _write(self, line: str) -> None:
        data = (line + "\n").encode()
        size = os.fstat(self._fd).st_size
        # One write for the whole line: a kill leaves all of it or, at worst, a torn tail without
        # newline.
        if os.write(self._fd, data) != len(data):
            os.ftruncate(self._fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._sync()
        os.close(self._fd)


def part_path(path: Path, rank: int) -> Path:
    """Where process `rank`, from 1, writes its rows of the result file `path`."""
    return path.with_suffix(f".part{rank}.tsv")


class ResultFile(Part):
    """The result file of a run, opened by the one process that keeps it.

    After opening, `header` and `done` are what an earlier session left, its parts included (None
    and empty for a new file); `begin` checks that it was the same run; `append` writes one row, in
    any order; `finish` makes the file what readers expect.

    Raises:
        UserError: as `Part`.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix in (".json", ".png"):
            raise UserError(
                f"--out {path} must name the TSV: {path.suffix} files are written beside it"
            )
        self.header: dict[str, Any] | None = None
        super().__init__(path)

    def _recover(self) -> set[int]:
        self.header = read_header(self.path)
        if self.header is None and (self.path.stat().st_size or self._parts()):
            raise UserError(
                f"{self.path} has no header {header_path(self.path).name} beside it, so it cannot "
                "be continued; move it away or use another --out"
            )
        self.done = super()._recover()
        self.absorb()
        return self.done

    def _parts(self) -> list[Path]:
        name = re.compile(re.escape(self.path.stem) + r"\.part\d+\.tsv")
        return sorted(path for path in self.path.parent.iterdir() if name.fullmatch(path.name))

    def absorb(self) -> None:
        """Take in the parts that other processes wrote and remove them.

        Raises:
            UserError: one of them is damaged, or still being written.
        """
        for path in self._parts():
            with Part(path):  # locked: nobody goes on writing what is about to go
                data = path.read_bytes()
                rows = parse(path, data) if data else []
                # The lines as they stand: a bound read and written again might be rounded down
                # once more, and the file depend on who decided which image.
                for row, line in zip(rows, data.decode().splitlines()[1:], strict=True):
                    if row.idx not in self.done:
                        self._append(line, row.idx)
                self._sync()
                path.unlink()

    def begin(self, header: Mapping[str, Any]) -> None:
        """Start the run that `header` describes, or continue it where the file holds rows of it.

        Args:
            header: all settings, with the indices of all images in order under ``images`` and this
                session's machine and versions as the only entry of ``environments``.

        Raises:
            UserError: the file holds rows of another run; names the first setting that differs.
        """
        header = {"format": FORMAT, **header}
        if self.header is not None and self.done:
            _refuse_difference(self.path, self.header, header)
            if not self.done <= set(header["images"]):
                raise UserError(
                    f"{self.path} holds images that its header does not name; move it away and "
                    "start again"
                )
            earlier = self.header.get("environments", [])
            new = [session for session in header["environments"] if session not in earlier]
            header["environments"] = [*earlier, *new]
        try:
            if header != self.header:
                _write_header(self.path, header)
        except OSError as error:
            raise UserError(
                f"cannot write beside {self.path}: {error.strerror}; choose another --out"
            ) from None
        self.header = header

    def finish(self) -> list[Row]:
        """All rows, in the order of the header's images, as the file has them from now on.

        Raises:
            UserError: an image has no row or two, or the file cannot be written.
        """
        assert self.header is not None, "begin comes first"
        lines = self.path.read_text().splitlines(keepends=True)
        place = {index: number for number, index in enumerate(self.header["images"])}
        ordered = sorted(lines[1:], key=lambda line: place[int(line.partition("\t")[0])])
        found = [int(line.partition("\t")[0]) for line in ordered]
        if found != list(self.header["images"]):
            raise UserError(f"{self.path} does not hold each of its images once; start it again")
        if ordered != lines[1:]:
            temporary = self.path.with_name(self.path.name + ".tmp")
            try:
                with temporary.open("w") as file:
                    file.writelines([lines[0], *ordered])
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.path)
            except OSError as error:
                raise UserError(f"cannot write {temporary}: {error.strerror}") from None
        return read(self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.header is None:  # refused before it began: leave no empty file behind
            self.path.unlink(missing_ok=True)
        super().__exit__(kind, error, trace)
