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
    first, *others = runs
    table = Table(
        title=f"Against #{first.number}, on the same {len(first.rows)} images",
        caption="points gained (p of the exact McNemar test, two-sided, for one comparison)",
    )
    table.add_column("#", justify="right")
    for radius in radii:
        table.add_column(f"r = {radius:g}", justify="right")
    base = _certified(first, radii)
    for run in others:
        cells = []
        for radius, ours, theirs in zip(radii, base, _certified(run, radii), strict=True):
            if not (first.tests(radius) and run.tests(radius)):
                cells.append("-")  # a bound and a value say nothing about the difference
                continue
            gained, lost, p = mcnemar(ours, theirs)
            points = 100 * (gained - lost) / len(ours)
            cells.append(f"{points:+.1f} ({'<0.001' if p < 0.001 else f'{p:.3f}'})")
        table.add_row(str(run.number), *cells)
    return table


def _certified(run: Run, radii: Sequence[float]) -> np.ndarray:
    """Whether each image, in the order of its index, is certified right: bool ``[R, images]``."""
    rows = sorted(run.rows, key=lambda row: row.idx)
    reached = np.array([row.radius if row.correct else -np.inf for row in rows])
    return reached >= np.asarray(radii)[:, None]
