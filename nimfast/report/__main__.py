# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of result files: ``python -m nimfast.report FILES...``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from nimfast import cli
from nimfast.errors import UserError
from nimfast.files import replacing
from nimfast.parsing import Number
from nimfast.report import formats
from nimfast.report.attack_runs import attack_tables, is_attack
from nimfast.report.page import page
from nimfast.report.paired import narrow_paired_table, paired_table
from nimfast.report.runs import (
    Run,
    accuracy_csv,
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
    "LaTeX, CSV), pictures and one HTML page; the papers' tables of attack runs. Reads files of "
    "nimfast.certify, files with the original six columns and folders of nimfast.attack."
)


@dataclass
class Config:
    """Options of the command."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Result files (TSV); folders of attack runs."""
    radii: tuple[Number, ...] | None = None
    """Radii of the table, as 0.25 or 1/4. Default: those of the papers' tables that some image
    reached."""
    out: Path = Path("results/report")
    """Folder to write to; what an earlier report left there is replaced."""
    title: str = "Results"
    """Heading of the page."""


def main(config: Config) -> None:
    """Write the report that `config` asks for, and print its tables."""
    for radius in config.radii or ():
        if not 0 <= radius < math.inf:
            raise UserError(f"--radii {radius:g} is out of range; give radii of at least 0")
    if not config.files:
        raise UserError("no result file is named; give one or more")
    if len({path.resolve() for path in config.files}) < len(config.files):
        raise UserError("a file is named twice; name each once")
    attacks = [path for path in config.files if is_attack(path)]
    runs = load_runs([path for path in config.files if path not in attacks])
    radii = config.radii or radii_reached(runs)
    sets = groups(runs)
    several = [group for group in sets if len(group) > 1]
    tables = [accuracy_table(group, radii) for group in sets]
    tables += [paired_table(group, radii) for group in several]
    tables += [runs_table(runs)] if runs else []
    attacked = [table for path in attacks for table in attack_tables(path)]
    tables += attacked
    lines = notes(runs)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        pictures = _pictures(runs, config)
        shown = {shows: path.read_bytes() for shows, path in pictures.items()}
        texts = {
            "tables.md": "\n".join(
                [*map(formats.to_markdown, tables), *(f"- {line}" for line in lines), ""]
            ),
            "tables.tex": "\n".join(map(formats.to_latex, tables)),
            "tables.csv": "\n".join(map(formats.to_csv, tables)),
            "index.html": page(config.title, tables, lines, shown),
        }
        if runs:
            texts["accuracy.csv"] = accuracy_csv(runs, radii)
        for name, text in texts.items():
            with replacing(config.out / name) as file:
                file.write(text.encode())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {config.out}: {reason}; choose another --out") from None
    if runs:
        cli.console.print(runs_table(runs, narrow=True))
    narrow = [narrow_table(group, radii) for group in sets]
    narrow += [narrow_paired_table(group, radii) for group in several]
    for table in (*narrow, *attacked):
        for part in formats.in_parts(table, cli.console.width):
            cli.console.print(part)
    for line in lines:
        cli.console.print(line, highlight=False, markup=False, soft_wrap=True)
    written = ", ".join([path.name for path in pictures.values()] + list(texts))
    cli.console.print(
        f"wrote {config.out}: {written}", highlight=False, markup=False, soft_wrap=True
    )


def _pictures(runs: Sequence[Run], config: Config) -> dict[str, Path]:
    """Draw them; what each shows -> its file."""
    # Here: matplotlib takes half a second, which --help and an error need not wait for.
    from nimfast.report.plot import plot_lower_bounds, plot_runs

    found = {}
    if runs:
        found["certified accuracy over the radius"] = config.out / "curves.png"
        plot_runs(
            {run.name: run.rows for run in runs},
            config.out / "curves.png",
            title=config.title,
            last={run.name: run.targets[-1] for run in runs if run.targets},
        )
    bounds = {run.name: run.lower_bounds() for run in runs}
    if known := {name: values for name, values in bounds.items() if len(values)}:
        found["lower bounds of p_A"] = config.out / "p_lower.png"
        title = "Lower bounds of p_A; six-column files: of certified images only"
        plot_lower_bounds(known, config.out / "p_lower.png", title=title)
    return found


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    cli.run(main, Config, PROG, DESCRIPTION, args, on_interrupt="run the command again")


if __name__ == "__main__":
    command()
