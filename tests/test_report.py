# SPDX-License-Identifier: Apache-2.0
"""Tables and plots: numbers against a direct count, and pictures that are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from nimfast.report import (
    certified_accuracy,
    certified_table,
    plot_certified_accuracy,
    summarise,
)
from nimfast.report.formats import in_parts
from nimfast.smoothing.records import Row, read

LOG = Path(__file__).parent / "reference" / "imagenet_sigma_0.50_first30.tsv"


def _row(predict: int, radius: float, invalid: int | None = None) -> Row:
    return Row(0, 1, predict, radius, predict == 1, 2.0, invalid=invalid)


ROWS = [_row(1, 0.5), _row(1, 0.25), _row(0, 0.9), _row(-1, 0.0, invalid=3)]


def test_certified_accuracy_counts_right_images_at_the_radius_or_farther() -> None:
    share, low, high = certified_accuracy(ROWS, [0, 0.25, 0.250001, 0.5, 0.6])
    np.testing.assert_array_equal(share, [0.5, 0.5, 0.25, 0.25, 0])
    assert low[-1] == 0
    assert high[-1] < 1


def test_interval_is_wilsons() -> None:
    rows = read(LOG)
    share, low, high = certified_accuracy(rows, [0.0, 0.5, 1.0, 9.0])
    for i in range(4):
        expected = binomtest(round(share[i] * len(rows)), len(rows)).proportion_ci(method="wilson")
        assert (low[i], high[i]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_summary() -> None:
    summary = summarise(ROWS)
    assert (summary.images, summary.accuracy, summary.abstained) == (4, 0.5, 0.25)
    assert summary.average_radius == pytest.approx((0.5 + 0.25) / 4)
    assert (summary.seconds, summary.invalid, summary.invalid_images) == (2.0, 3, 1)
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_table_shows_a_row_per_radius() -> None:
    console = Console(width=80, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(certified_table(ROWS, [0, 0.3]))
    lines = [line.split() for line in captured.get().splitlines() if "%" in line]
    assert ["0.3", "25.0%"] in [[line[1], line[3]] for line in lines if len(line) > 3]
    assert "4 images" in captured.get()


@pytest.mark.parametrize("rows", [read(LOG), ROWS, [_row(-1, 0.0)]])
def test_plot_is_a_picture(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    plot_certified_accuracy(rows, path, title="test", largest=1.96)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_tables_are_cut_to_the_terminal() -> None:
    table = Table(title="wide", caption="in %", min_width=20)
    for heading in ("attack", *(f"sigma {10 * i}/255" for i in range(9))):
        table.add_column(heading, justify="right")
    table.add_row("none", *(f"{i}.0 (0-9)" for i in range(9)))
    table.add_row("strongest", *(f"{i}.5 (0-9)" for i in range(9)), style="bold")
    parts = in_parts(table, 80)
    assert len(parts) > 1
    assert all(str(part.columns[0].header) == "attack" for part in parts)
    cells = [cell for part in parts for column in part.columns[1:] for cell in column.cells]
    assert cells == [f"{i}.{half} (0-9)" for i in range(9) for half in (0, 5)]
    console = Console(width=80)
    assert all(console.measure(part).maximum <= 80 for part in parts)
    # Nothing is cut where there is room, nor where even two columns have none.
    assert in_parts(table, 300) == [table]
    assert [len(part.columns) for part in in_parts(table, 5)] == [2] * 9
