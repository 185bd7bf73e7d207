# SPDX-License-Identifier: Apache-2.0
"""Pictures of what an autoencoder makes of noisy images."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nimfast.corruption import SigmaLaw

Row = Mapping[str, Any]

# What is compared with the clean image, in the order of the legend.
LABELS = {
    "noisy": "noisy image",
    "noisy_clamped": "noisy image, clamped to [0, 1]",
    "stats_input": "reconstruction, statistics of the clean patch",
    "stats_noisy": "reconstruction, statistics of the noisy patch",
    "stats_none": "reconstruction",
}
_COLOURS = {
    "noisy": "#9aa5b1",
    "noisy_clamped": "#5f6b7a",
    "stats_input": "#c4572d",
    "stats_noisy": "#2a6fbb",
    "stats_none": "#2a6fbb",
}
_LOSS = "#2a6fbb"


def plot_grid(
    columns: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]], path: Path, title: str
) -> None:
    """Images side by side, one row each, as a PNG.

    Args:
        columns: heading -> images ``[N, C, H, W]`` in pixel units; what leaves [0, 1] is clipped.
        captions: heading -> a line below each of its images.
        path: where to write.
        title: above all.
    """
    count = len(next(iter(columns.values())))
    size = (1.6 * len(columns) + 0.4, 1.85 * count + 0.9)
    # A Figure of its own, not pyplot: no global state, and no window system is asked for.
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(count, len(columns), squeeze=False)
    for column, (heading, images) in enumerate(columns.items()):
        grid[0, column].set_title(textwrap.fill(heading, 18), fontsize=8)
        for row, image in enumerate(images.clamp(0, 1).cpu()):
            axes = grid[row, column]
            shown = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            axes.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if heading in captions:
                axes.set_xlabel(captions[heading][row], fontsize=7)
    width = max(24, int(13 * size[0]))
    figure.suptitle(textwrap.fill(title, width), fontsize=8, x=0.01, ha="left", parse_math=False)
    figure.savefig(path, dpi=160)


def finite_psnr(rows: Sequence[Row]) -> dict[str, list[float]]:
    """PSNR of every image by name, without the names that are infinite (None) for some image."""
    columns = {name: [row["psnr"].get(name) for row in rows] for name in LABELS}
    return {name: values for name, values in columns.items() if None not in values}


def plot_psnr(rows: Sequence[Row], path: Path, title: str) -> None:
    """Distribution over images of the PSNR in dB, one histogram for each name, as a PNG.

    Args:
        rows: one for each image, with entry ``psnr``.
        path: where to write.
        title: above the axes.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    values = finite_psnr(rows)
    every = np.concatenate([np.asarray(entries) for entries in values.values()])
    edges = np.linspace(every.min() - 0.5, every.max() + 0.5, 50).tolist()
    for name, entries in values.items():
        label = f"{LABELS[name]}: {np.mean(entries):.2f} dB"
        axes.hist(entries, edges, color=_COLOURS[name], alpha=0.6, label=label)
    axes.set(xlabel="PSNR (dB)", ylabel="images")
    _finish(axes, title)
    figure.savefig(path, dpi=160)


def plot_levels(rows: Sequence[Row], law: SigmaLaw | None, path: Path, title: str) -> None:
    """Reconstruction loss and PSNR against the noise level (NIM, Figure 2b), as a PNG.

    Args:
        rows: one for each level, with entries ``sigma`` (1/255), ``loss`` and ``psnr``: mean and
            standard deviation over images, None where infinite.
        law: noise the model was trained with, which is marked; None marks nothing.
        path: where to write.
        title: above the axes.
    """
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    over = "mean and standard deviation over images"
    _band(left, [row["sigma"] for row in rows], [row["loss"] for row in rows], _LOSS, over)
    for name, label in LABELS.items():
        known = [row for row in rows if row["psnr"].get(name) is not None]
        if known:
            levels = [row["sigma"] for row in known]
            _band(right, levels, [row["psnr"][name] for row in known], _COLOURS[name], label)
    for axes, what in ((left, "reconstruction loss"), (right, "PSNR (dB)")):
        axes.set(xlabel=r"noise level $\sigma$ (1/255)", ylabel=what)
        if law is not None:
            low, high = (255 * end for end in _range(law))
            axes.axvspan(low, high, color="#e3b341", alpha=0.25, linewidth=2, label="trained with")
        _finish(axes, title if axes is left else "")
    figure.savefig(path, dpi=160)


def _range(law: SigmaLaw) -> tuple[float, float]:
    """Noise levels that training drew: all, or of a gamma law mean +- 2 standard deviations."""
    if law.kind == "uniform":
        return law.first, law.second
    spread = 2 * law.second * law.first**0.5 if law.kind == "gamma" else 0.0
    return max(0.0, law.mean - spread), law.mean + spread


def _band(
    axes: Axes,
    x: Sequence[float],
    points: Sequence[tuple[float, float]],
    colour: str,
    label: str,
) -> None:
    mean, deviation = np.transpose(points)
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=2, marker="o", markersize=3, label=label)


def _finish(axes: Axes, title: str) -> None:
    # A title may hold a path: wrapped to the figure, and its $ no formula.
    axes.set_title(textwrap.fill(title, 70), loc="left", fontsize=8, parse_math=False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
