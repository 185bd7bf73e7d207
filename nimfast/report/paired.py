# SPDX-License-Identifier: Apache-2.0
"""Two certification runs over the same images, compared image by image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table
from scipy.special import bdtr

from nimfast.report.runs import Run


def mcnemar(first: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """Exact McNemar test (McNemar 1947): does one of two runs certify more of the same images?

    Most of what separates two shares is which images happened to be chosen, and both runs share
    that. Only images where they differ tell the runs apart: if neither were better, each of those
    would fall to either run with probability 1/2.

    Args:
        first, other: bool ``[images]``, in the same order: whether the run certified the image.

    Returns:
        Images certified by `other` alone, by `first` alone, and the two-sided p-value.
    """
    gained, lost = int((other & ~first).sum()), int((first & ~other).sum())
    # Both tails of Bin(gained + lost, 1/2), which are equal.
    return gained, lost, min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def paired_table(runs: Sequence[Run], radii: Sequence[float]) -> Table:
    """Points that each run gains over the first at each radius, and McNemar's p.

    Args:
        runs: over the same images, at least two.
        radii: in pixel units of [0, 1]; compared where both runs tested them.
    """
    table = _empty(runs[0], "#", [f"r = {radius:g}" for radius in radii])
    for run, cells in zip(runs[1:], _compared(runs, radii), strict=True):
        table.add_row(str(run.number), *cells)
    return table


def narrow_paired_table(runs: Sequence[Run], radii: Sequence[float]) -> Table:
    """The same for a terminal: a line for each radius, a column for each run but the first."""
    table = _empty(runs[0], "radius", [f"#{run.number}" for run in runs[1:]])
    for radius, cells in zip(radii, zip(*_compared(runs, radii), strict=True), strict=True):
        table.add_row(f"{radius:g}", *cells)
    return table


def _empty(first: Run, corner: str, headings: Sequence[str]) -> Table:
    caption = "points gained (p of the exact McNemar test, two-sided, for one comparison)"
    title = f"Against #{first.number}, on the same {len(first.rows)} images"
    table = Table(title=title, caption=caption, min_width=len(caption))  # so that they do not wrap
    for heading in (corner, *headings):
        table.add_column(heading, justify="right")
    return table


def _compared(runs: Sequence[Run], radii: Sequence[float]) -> list[list[str]]:
    """A cell for each run but the first, and each radius."""
    first, *others = runs
    base, found = _certified(first, radii), []
    for run in others:
        cells = []
        for radius, ours, theirs in zip(radii, base, _certified(run, radii), strict=True):
            if not (first.tests(radius) and run.tests(radius)):
                cells.append("-")  # a bound and a value say nothing about the difference
                continue
            gained, lost, p = mcnemar(ours, theirs)
            points = 100 * (gained - lost) / len(ours)
            cells.append(f"{points:+.1f} ({'<0.001' if p < 0.001 else f'{p:.3f}'})")
        found.append(cells)
    return found


def _certified(run: Run, radii: Sequence[float]) -> np.ndarray:
    """Whether each image, in the order of its index, is certified right: bool ``[R, images]``."""
    rows = sorted(run.rows, key=lambda row: row.idx)
    reached = np.array([row.radius if row.correct else -np.inf for row in rows])
    return reached >= np.asarray(radii)[:, None]
