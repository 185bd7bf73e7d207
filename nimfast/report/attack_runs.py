# SPDX-License-Identifier: Apache-2.0
"""Finished attack runs in a report: the papers' tables, from the rows that the run left."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from nimfast.errors import UserError

WORST_OF = 10  # draws of the third reading, as nimfast.attack has it by default

_ROWS = "images.tsv"


def is_attack(path: Path) -> bool:
    """Whether `path` is the folder of an attack run, or the table of rows in it."""
    if path.is_dir():
        return (path / _ROWS).is_file() or (path / "units").is_dir()
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return "attack" in file.readline().rstrip("\n").split("\t")
    except OSError:
        return False  # the reader of certification runs says what is wrong


def attack_tables(path: Path) -> list[Table]:
    """Accuracy by attack and strength of the defence, and the readings of the strongest attack.

    Raises:
        UserError: the run is not finished, or its table is damaged.
    """
    # Here and not above: certification runs are reported without torch, which attacks need.
    from nimfast.attacks.records import ball, read_settings, read_tsv
    from nimfast.report.attack import NO_DE3, attack_table, plain_name, readings, readings_table

    table = path / _ROWS if path.is_dir() else path
    if not table.exists():
        raise UserError(f"{path} holds no {_ROWS} yet: finish the run by repeating its command")
    rows = read_tsv(table)
    if not rows:
        raise UserError(f"{table} holds no image; repeat the run")
    found = readings(rows, min([WORST_OF, *(row.draws for row in rows if row.draws > 1)]))
    images = len({row.idx for row in rows})
    folder = path if path.is_dir() else path.parent
    # The settings lie beside the rows of a run, though not where a table was copied alone.
    settings = read_settings(folder)
    radius = [ball(settings["norm"], settings["eps"])] if settings else []
    title = ", ".join([folder.resolve().name, *radius, f"{images} images"])
    plain = plain_name(settings) if settings else NO_DE3
    shown = [attack_table(found, title, plain), readings_table(found, plain)]
    return [table for table in shown if table is not None]
