# SPDX-License-Identifier: Apache-2.0
"""Certification runs as pictures: certified-accuracy curves, histograms of p_A."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nimfast.report.table import certified_accuracy, summarise
from nimfast.smoothing.records import Row

_BLUE, _GREY = "#2a6fbb", "#5f6b7a"
_LINES = (_BLUE, "#c4572d", "#3a8a5f", "#8a5fb0", "#b08a2a", _GREY)
_STYLES = ("-", "--", ":", "-.")  # more runs than colours differ by these


def plot_certified_accuracy(
    rows: Sequence[Row],
    path: Path,
    *,
    title: str,
    largest: float | None = None,
    of: str = "possible",
) -> None:
    """Draw certified accuracy over the radius, with its 95% interval over images, as a PNG.

    Args:
        rows: one per image.
        path: where to write.
        title: above the axes.
        largest: the largest radius that the run could certify; marked where given.
        of: of what it is the largest: radii that are ``possible``, or ``asked for``.
    """
    end = _end(rows, largest)
    # A Figure of its own, not pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    # Beyond the radii that were asked for nothing is known.
    last = end if largest is None or of == "possible" else largest
    _curve(axes, rows, last, _BLUE, "certified accuracy", interval="95% interval")
    if largest is not None:
        axes.axvline(largest, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"largest {of} {largest:.2f}",
            (largest, 100),
            xytext=(4, 0),  # to the right, where no curve is
            textcoords="offset points",
            rotation=90,
            horizontalalignment="left",
            verticalalignment="top",
            color=_GREY,
            fontsize=8,
        )
    summary = summarise(rows)
    found = f"{summary.images} images, average certified radius {summary.average_radius:.3f}"
    _finish(axes, end, title, found)
    figure.savefig(path, dpi=160)


def plot_runs(
    runs: Mapping[str, Sequence[Row]], path: Path, *, title: str, last: Mapping[str, float]
) -> None:
    """Draw the certified-accuracy curves of several runs in one picture, as a PNG.

    Args:
        runs: name -> rows, one per image.
        path: where to write.
        title: above the axes.
        last: name -> the largest radius that the run was asked for, where its curve ends.
    """
    end = _end([row for rows in runs.values() for row in rows], None)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, rows) in enumerate(runs.items()):
        style = _STYLES[number // len(_LINES) % len(_STYLES)]
        colour = _LINES[number % len(_LINES)]
        _curve(axes, rows, last.get(name, end), colour, _plain(name), style=style)
    _finish(axes, end, title, "shaded: 95% intervals over images")
    figure.savefig(path, dpi=160)


def plot_lower_bounds(runs: Mapping[str, np.ndarray], path: Path, *, title: str) -> None:
    """Draw a histogram of the lower bounds of p_A for each run, one below the other, as a PNG.

    Args:
        runs: name -> lower bounds, in [0, 1].
        path: where to write.
        title: above the axes.
    """
    figure = Figure(figsize=(7.2, 0.8 + 1.5 * len(runs)), layout="constrained")
    column = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    edges = np.linspace(0, 1, 51)
    for number, (axes, (name, bounds)) in enumerate(zip(column, runs.items(), strict=True)):
        axes.hist(bounds, edges, color=_LINES[number % len(_LINES)], alpha=0.8)
        axes.axvline(0.5, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(ylabel="images", xlim=(0, 1))
        text = f"{name}: {len(bounds)} images"
        axes.set_title(text, loc="left", fontsize=8, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    column[-1].set_xlabel(r"lower bound of $p_A$")
    text = textwrap.fill(title, 90)
    figure.suptitle(text, x=0.01, horizontalalignment="left", fontsize=9, parse_math=False)
    figure.savefig(path, dpi=160)


def _end(rows: Sequence[Row], largest: float | None) -> float:
    return 1.04 * max(*(row.radius for row in rows), largest or 0.0, 1e-3)


def _curve(
    axes: Axes,
    rows: Sequence[Row],
    end: float,
    colour: str,
    label: str,
    *,
    style: str = "-",
    interval: str | None = None,
) -> None:
    # The share steps down just beyond each radius found: drawing exactly there keeps the steps
    # sharp.
    steps = np.unique([row.radius for row in rows if row.correct])
    radii = np.unique(np.concatenate([[0.0], steps, np.nextafter(steps, np.inf), [end]]))
    radii = radii[radii <= end]
    share, low, high = (100 * values for values in certified_accuracy(rows, radii))
    axes.fill_between(radii, low, high, color=colour, alpha=0.15, linewidth=0, label=interval)
    axes.plot(radii, share, color=colour, linewidth=2, linestyle=style, label=label)


def _finish(axes: Axes, end: float, title: str, below: str) -> None:
    axes.set(xlim=(0, end), ylim=(0, 102), xlabel="ℓ₂ radius (pixels in [0, 1])", ylabel="%")
    # A title may hold a path: wrapped to the figure, and its $ no formula.
    text = textwrap.fill(title, 76) + "\n" + below
    axes.set_title(text, loc="left", fontsize=9, parse_math=False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _plain(name: str) -> str:
    """A label whose $ is no formula, and which is not hidden for an underscore at its front."""
    return name.replace("$", r"\$").lstrip("_") or "run"
