# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of result files, side by side: ``python -m nimfast.report FILES...``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from nimfast import cli
from nimfast.errors import UserError
from nimfast.models.checkpoint import replacing
from nimfast.report import formats
from nimfast.report.page import page
from nimfast.report.plot import plot_lower_bounds, plot_runs
from nimfast.report.runs import (
    accuracy_table,
    groups,
    load_runs,
    narrow_table,
    notes,
    radii_reached,
    runs_table,
)

PROG = "python -m nimfast.report"
DESCRIPTION = (
    "Certified accuracy, average radius and cost of certification runs, as tables (markdown, "
    "LaTeX, CSV), pictures and one HTML page. Reads files of nimfast.certify and files with the "
    "original six columns."
)


@dataclass
class Config:
    """Options of the command."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files (TSV)."""
    radii: tuple[float, ...] | None = None
    """Radii of the table. Default: those of the papers' tables that some image reached."""
    out: Path = Path("results/report")
    """Folder to write to; what an earlier report left there is replaced."""
    title: str = "Certified accuracy"
    """Heading of the page."""


def main(config: Config) -> None:
    """Write the report that `config` asks for, and print its tables."""
    for radius in config.radii or ():
        if not 0 <= radius < math.inf:
            raise UserError(f"--radii {radius:g} is out of range; give radii of at least 0")
    runs = load_runs(config.files)
    radii = config.radii or radii_reached(runs)
    tables = [*(accuracy_table(group, radii) for group in groups(runs)), runs_table(runs)]
    lines = notes(runs)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        pictures = {"certified accuracy over the radius": config.out / "curves.png"}
        rows = {run.name: run.rows for run in runs}
        plot_runs(rows, config.out / "curves.png", title=config.title)
        bounds = {run.name: run.lower_bounds() for run in runs}
        known = {name: values for name, values in bounds.items() if len(values)}
        if known:
            pictures["lower bounds of p_A"] = config.out / "p_lower.png"
            title = "Lower bounds of p_A; six-column files: of certified images only"
            plot_lower_bounds(known, config.out / "p_lower.png", title=title)
        shown = {shows: path.read_bytes() for shows, path in pictures.items()}
        texts = {
            "tables.md": "\n".join(
                [*map(formats.to_markdown, tables), *(f"- {line}" for line in lines), ""]
            ),
            "tables.tex": "\n".join(map(formats.to_latex, tables)),
            "tables.csv": "\n".join(map(formats.to_csv, tables)),
            "index.html": page(config.title, tables, lines, shown),
        }
        for name, text in texts.items():
            with replacing(config.out / name) as file:
                file.write(text.encode())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {config.out}: {reason}; choose another --out") from None
    for table in (tables[-1], *(narrow_table(group, radii) for group in groups(runs))):
        cli.console.print(table)
    for line in lines:
        cli.console.print(line, highlight=False, markup=False, soft_wrap=True)
    written = ", ".join([path.name for path in pictures.values()] + list(texts))
    cli.console.print(
        f"wrote {config.out}: {written}", highlight=False, markup=False, soft_wrap=True
    )


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    cli.run(main, Config, PROG, DESCRIPTION, args, on_interrupt="run the command again")


if __name__ == "__main__":
    command()
