# SPDX-License-Identifier: Apache-2.0
"""Tables as text: markdown, LaTeX, CSV, HTML; and cut to the width of a terminal."""

from __future__ import annotations

import csv
import html
import io

from rich.table import Table

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def _lines(table: Table) -> list[list[str]]:
    """Headings, then the rows."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(line) for line in zip(*columns, strict=True)]


def _right(table: Table) -> list[bool]:
    return [column.justify == "right" for column in table.columns]


def to_markdown(table: Table) -> str:
    """The table under its title; a ``|`` in a cell is escaped."""
    head, *body = [[cell.replace("|", r"\|") for cell in line] for line in _lines(table)]
    rule = ["---:" if right else "---" for right in _right(table)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])
    return f"{_title(table)}\n\n{text}\n"


def to_latex(table: Table) -> str:
    """A ``table`` environment with the rules of the package booktabs."""
    head, *body = [" & ".join(cell.translate(_LATEX) for cell in line) for line in _lines(table)]
    shape = "".join("r" if right else "l" for right in _right(table))
    rows = "\n".join(rf"{line} \\" for line in body)
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{_title(table).translate(_LATEX)}}}\n"
        f"\\begin{{tabular}}{{{shape}}}\n\\toprule\n{head} \\\\\n\\midrule\n{rows}\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def to_csv(table: Table) -> str:
    """Headings and rows, comma-separated."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_lines(table))
    return text.getvalue()


def to_html(table: Table) -> str:
    """A ``table`` element with its caption."""
    right = _right(table)

    def line(cells: list[str], tag: str) -> str:
        found = (
            f"<{tag}{' class=r' if right[i] else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(found)}</tr>"

    head, *body = _lines(table)
    rows = "\n".join([line(head, "th"), *(line(cells, "td") for cells in body)])
    return f"<table>\n<caption>{html.escape(_title(table))}</caption>\n{rows}\n</table>"


def in_parts(table: Table, width: int) -> list[Table]:
    """The table as several below each other where its columns do not fit, each with the first one.

    Args:
        table: for the terminal.
        width: of the terminal, in characters.
    """
    lines = _lines(table)
    # A cell has a space on both sides and a line on one.
    widths = [3 + max(map(len, column)) for column in zip(*lines, strict=True)]
    parts: list[list[int]] = [[0]]
    for i in range(1, len(widths)):
        if len(parts[-1]) > 1 and 1 + sum(widths[j] for j in parts[-1]) + widths[i] > width:
            parts.append([0])
        parts[-1].append(i)
    if len(parts) == 1:
        return [table]
    found = []
    for part in parts:
        few = Table(title=table.title, caption=table.caption, min_width=table.min_width)
        for i in part:
            few.add_column(lines[0][i], justify=table.columns[i].justify)
        for row, line in zip(table.rows, lines[1:], strict=True):
            few.add_row(*(line[i] for i in part), style=row.style)
        found.append(few)
    return found


def _title(table: Table) -> str:
    return f"{table.title} ({table.caption})" if table.caption else str(table.title)
