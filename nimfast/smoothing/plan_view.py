# SPDX-License-Identifier: Apache-2.0
"""A plan as tables for the terminal: boundaries, error, power, expected samples."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from scipy.special import betaincinv

from nimfast.smoothing.plans import Plan

_POWER = 0.9
_PROBABILITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
_LOOKS = 5


def view(plan: Plan) -> Group:
    """All there is to see of a plan, in 80 columns."""
    tested = "label known" if plan.labelled else "leading class"
    title = (
        f"sequential test at sigma {plan.sigma:g}, n {plan.n:,}, alpha {plan.alpha:g}, "
        f"{len(plan.looks)} looks, {tested}"
    )
    return Group(
        Text(title, style="bold"),
        "\nEach radius; power and samples where n samples would pass 9 times in 10",
        _rows(plan),
        "Expected samples and answer, by probability of the class",
        _samples(plan),
        "Votes that give a radius up:votes that certify it, after so many samples",
        _boundaries(plan),
    )


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    return table


def _rows(plan: Plan) -> Table:
    table = _table(
        "radius", "p_A above", "votes of n", "error / alpha", "given up", "at p_A", "power",
        "samples",
    )  # fmt: skip
    rows = zip(
        plan.radii, plan.probabilities, plan.accept[:, -1].tolist(), plan.error, plan.loss,
        strict=True,
    )  # fmt: skip
    for j, (radius, p, count, error, loss) in enumerate(rows):
        likely = float(betaincinv(count, plan.n - count + 1, _POWER))
        found = plan.outcome(likely)
        table.add_row(
            f"{radius:g}", f"{p:.6f}", f"{count:,}", f"{error / plan.alpha:.6f}", f"{loss:.2%}",
            f"{likely:.6f}", f"{found.reached[j + 1 :].sum():.3f}", f"{found.samples:,.0f}",
        )  # fmt: skip
    return table


def _samples(plan: Plan) -> Table:
    table = _table("p_A", "samples", "most likely answer")
    for p in _PROBABILITIES:
        found = plan.outcome(p)
        level = int(np.argmax(found.reached))
        answer = f"radius {plan.radii[level - 1]:g}" if level else "none"
        table.add_row(f"{p:g}", f"{found.samples:,.0f}", f"{answer} ({found.reached[level]:.0%})")
    return table


def _boundaries(plan: Plan) -> Table:
    shown = np.unique(np.linspace(0, len(plan.looks) - 1, _LOOKS).astype(int)).tolist()
    table = _table(
        "radius",
        *(f"{plan.looks[k]:,}" for k in shown),
    )
    for radius, futile, accept in zip(plan.radii, plan.futile, plan.accept, strict=True):
        cells = []
        for k in shown:
            low = f"{futile[k]}" if futile[k] >= 0 else "-"
            high = f"{accept[k]}" if accept[k] <= plan.looks[k] else "-"
            cells.append(f"{low}:{high}")
        table.add_row(f"{radius:g}", *cells)
    return table
