# SPDX-License-Identifier: Apache-2.0
"""Pictures of attack runs: what they did to images, the trade-off, saturation curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nimfast.attacks.judge import Share
from nimfast.report.reconstruction import plot_grid

_BLUE, _RED, _GREY = "#2a6fbb", "#c4572d", "#5f6b7a"
_LINES = ("#2a6fbb", "#c4572d", "#3a8a5f", "#8a5fb0", "#b08a2a", "#5f6b7a")


def plot_examples(
    clean: Tensor,
    points: Tensor,
    defended: Tensor | None,
    captions: Mapping[str, Sequence[str]],
    path: Path,
    title: str,
) -> None:
    """Clean image, adversarial image, their difference magnified, what the defence makes of it.

    Args:
        clean, points: ``[N, C, H, W]`` in [0, 1].
        defended: reconstruction of `points`; None: there is no defence.
        captions: ``clean``, ``adversarial``, ``defended`` -> a line below each image.
        path: where to write.
        title: above all.
    """
    away = points - clean
    factor = 0.5 / max(float(away.abs().max()), 1e-6)
    difference = f"difference x {factor:.3g}"
    columns = {"clean": clean, "adversarial": points, difference: 0.5 + factor * away}
    if defended is not None:
        columns["defended"] = defended
    plot_grid(columns, captions, path, title)


def plot_tradeoff(points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Accuracies against the strength, and robust against clean accuracy with the frontier.

    NIM's Figures 4 and 5 (You et al., 2023).

    Args:
        points: of `report.attack.tradeoff`.
        path: where to write.
        title: above the axes.
    """
    # A Figure of its own, not pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    sigmas = [point["sigma"] for point in points]
    for name, colour in (("clean", _BLUE), ("robust", _RED)):
        _band(left, sigmas, [point[name] for point in points], colour, name)
    left.set(xlabel="sigma of the defence (1/255)", ylabel="accuracy (%)", ylim=(0, 102))
    left.legend(frameon=False, fontsize=9)
    clean = [100 * point["clean"].value for point in points]
    robust = [100 * point["robust"].value for point in points]
    right.plot(clean, robust, "o", color=_GREY, markersize=4)
    best = sorted((c, r) for c, r, p in zip(clean, robust, points, strict=True) if p["frontier"])
    right.plot(*zip(*best, strict=True), color=_RED, linewidth=1.5, label="Pareto frontier")
    for c, r, sigma in zip(clean, robust, sigmas, strict=True):
        right.annotate(f"{sigma:g}", (c, r), xytext=(3, 3), textcoords="offset points", fontsize=7)
    right.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)")
    right.legend(frameon=False, fontsize=9)
    _finish(figure, (left, right), title, path)


def plot_curves(
    lines: Mapping[str, Sequence[tuple[float, Share]]], axis: str, path: Path, title: str
) -> None:
    """Mean accuracy against EOT or steps: where a line is flat the attack has saturated.

    Args:
        lines: of `report.attack.curves`.
        axis: what the places on the axis are.
        path: where to write.
        title: above the axes.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        colour = _LINES[number % len(_LINES)]
        _band(axes, [p for p, _ in points], [value for _, value in points], colour, name)
    axes.set(xlabel=axis, ylabel="accuracy (%)", ylim=(0, 102), xscale="log")
    measured = sorted({place for points in lines.values() for place, _ in points})
    axes.set_xticks(measured, [f"{place:g}" for place in measured])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    _finish(figure, (axes,), title, path)


def _band(
    axes: Axes, places: Sequence[float], values: Sequence[Share], colour: str, name: str
) -> None:
    middle, low, high = (100 * np.array(column) for column in zip(*values, strict=True))
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(places, middle, "o-", color=colour, linewidth=1.5, markersize=3, label=name)


def _finish(figure: Figure, every: Sequence[Axes], title: str, path: Path) -> None:
    for axes in every:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    # A title may hold a path: its $ is no formula.
    figure.suptitle(textwrap.fill(title, 100), fontsize=9, x=0.01, ha="left", parse_math=False)
    figure.savefig(path, dpi=160)
