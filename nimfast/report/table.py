# SPDX-License-Identifier: Apache-2.0
"""Certified accuracy of a result file, with its uncertainty over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from nimfast.intervals import wilson
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.records import Row


@dataclass(frozen=True)
class Summary:
    """Numbers of a whole result file.

    Attributes:
        images: how many rows.
        accuracy: share of images whose smoothed class is certified (at any radius) and right.
        abstained: share of images without an answer.
        average_radius: ACR, the mean over images of the radius where right, else 0.
        seconds: mean time per image.
        invalid: samples with NaN or infinity in their logits, over all images.
        invalid_images: images that had any.
    """

    images: int
    accuracy: float
    abstained: float
    average_radius: float
    seconds: float
    invalid: int
    invalid_images: int


def summarise(rows: Sequence[Row]) -> Summary:
    """Summary of `rows`.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError("rows must hold at least one image")
    invalid = [row.invalid or 0 for row in rows]
    return Summary(
        images=len(rows),
        accuracy=float(np.mean([row.correct for row in rows])),
        abstained=float(np.mean([row.predict == ABSTAIN for row in rows])),
        average_radius=float(np.mean([row.radius * row.correct for row in rows])),
        seconds=float(np.mean([row.time for row in rows])),
        invalid=sum(invalid),
        invalid_images=sum(count > 0 for count in invalid),
    )


def certified_accuracy(
    rows: Sequence[Row], radii: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of images certified right at each radius or farther.

    Args:
        rows: one per image.
        radii: R radii in pixel units.

    Returns:
        The share and the lower and upper ends of its 95% Wilson interval, each ``[R]``: how far the
        share of all images of this kind may lie from that of these. (That a single certificate
        fails has probability alpha and is not in this interval.)
    """
    certified = np.array([row.radius if row.correct else -np.inf for row in rows])
    share = (certified >= np.asarray(radii)[:, None]).mean(axis=1)
    return (share, *wilson(share, len(rows)))


def certified_table(rows: Sequence[Row], radii: Sequence[float]) -> Table:
    """Certified accuracy at each of `radii`, as a table for the terminal."""
    table = Table(title=f"Certified accuracy over {len(rows)} images")
    table.add_column("radius", justify="right")
    table.add_column("certified", justify="right", style="bold")
    table.add_column("95% interval", justify="right", style="dim")
    for radius, share, low, high in zip(radii, *certified_accuracy(rows, radii), strict=True):
        table.add_row(f"{radius:g}", f"{share:.1%}", f"{low:.1%} - {high:.1%}")
    return table
