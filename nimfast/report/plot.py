# SPDX-License-Identifier: Apache-2.0
"""The certified-accuracy curve as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nimfast.report.table import certified_accuracy, summarise
from nimfast.smoothing.records import Row

_BLUE, _GREY = "#2a6fbb", "#5f6b7a"


def plot_certified_accuracy(
    rows: Sequence[Row], path: Path, *, title: str, largest: float | None = None
) -> None:
    """Draw certified accuracy over the radius, with its 95% interval over images, as a PNG.

    Args:
        rows: one per image.
        path: where to write.
        title: above the axes.
        largest: the largest radius that the samples could certify; marked where given.
    """
    reached = max(row.radius for row in rows)
    end = 1.04 * max(reached, largest or 0.0, 1e-3)
    # The share steps down just beyond each radius found: drawing exactly there keeps the steps
    # sharp.
    steps = np.unique([row.radius for row in rows if row.correct])
    radii = np.unique(np.concatenate([[0.0], steps, np.nextafter(steps, np.inf), [end]]))
    share, low, high = (100 * values for values in certified_accuracy(rows, radii))

    # A Figure of its own, not pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(radii, low, high, color=_BLUE, alpha=0.15, linewidth=0, label="95% interval")
    axes.plot(radii, share, color=_BLUE, linewidth=2, label="certified accuracy")
    if largest is not None:
        axes.axvline(largest, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"largest possible {largest:.2f}",
            (largest, 100),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            horizontalalignment="right",
            verticalalignment="top",
            color=_GREY,
            fontsize=8,
        )
    axes.set(xlim=(0, end), ylim=(0, 102), xlabel=r"$\ell_2$ radius (pixels in [0, 1])", ylabel="%")
    summary = summarise(rows)
    found = f"{summary.images} images, average certified radius {summary.average_radius:.3f}"
    # A title may hold a path: wrapped to the figure, and its $ no formula.
    text = textwrap.fill(title, 76) + "\n" + found
    axes.set_title(text, loc="left", fontsize=9, parse_math=False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=160)
