# SPDX-License-Identifier: Apache-2.0
"""Robust accuracy from the rows of attack runs: the papers' table, four readings, the frontier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from nimfast.attacks.judge import Share, share, worst_of
from nimfast.attacks.records import Row

STRONGEST = "strongest"
CLEAN = "none"
_KNOWN = "known:"


def mean_accuracy(rows: Sequence[Row]) -> Share:
    """Share of draws that are right, averaged over images."""
    return share([row.hits / row.draws for row in rows])


def majority_accuracy(rows: Sequence[Row]) -> Share:
    """Share of images whose most likely class is the label.

    Images that the test left undecided count as wrong, but as right in the interval's upper end.
    """
    right = [row.majority == "right" for row in rows]
    maybe = [row.majority != "wrong" for row in rows]
    least = share(right)
    return Share(least.value, least.low, share(maybe).high)


def worst_accuracy(rows: Sequence[Row], k: int) -> Share:
    """Share of images that are right in all of k draws; k is at most the draws there are."""
    draws = rows[0].draws
    return share(worst_of([row.hits for row in rows], draws, min(k, draws)))


def of_attacker(rows: Iterable[Row]) -> list[Row]:
    """Rows of attacks on the classifier as it is deployed: without clean images, known noise and
    the points of curves (``@``).
    """
    return [
        row
        for row in rows
        if row.attack != CLEAN and not row.attack.startswith(_KNOWN) and "@" not in row.attack
    ]


def strongest(rows: Iterable[Row]) -> list[Row]:
    """For each image the row of the attack that did most to it.

    Of a randomised model, that with the highest mean loss over draws made for this choice: choosing
    by the draws that judge would count luck as strength. Else one that broke it, if any.
    """
    best: dict[int, Row] = {}

    def strength(row: Row) -> tuple[bool, float]:
        return row.draws == 1 and row.hits == 0, row.loss

    for row in rows:
        if row.idx not in best or strength(row) > strength(best[row.idx]):
            best[row.idx] = row
    return [best[idx] for idx in sorted(best)]


def by_strength(rows: Iterable[Row]) -> dict[float, list[Row]]:
    """Rows of each strength of the defence, in increasing order."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        found.setdefault(row.sigma, []).append(row)
    return dict(sorted(found.items()))


def by_attack(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each attack, in the order they come; the strongest of all at the end."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.attack, []).append(row)
    candidates = of_attacker(row for rows in found.values() for row in rows)
    if candidates:
        found[STRONGEST] = strongest(candidates)
    return found


def readings(rows: Sequence[Row], k: int) -> dict[str, dict[str, dict[str, Share]]]:
    """Strength -> attack -> reading (mean, majority, worst of k, known noise) -> accuracy.

    Args:
        rows: of all strengths and attacks.
        k: draws of the third reading.
    """
    found: dict[str, dict[str, dict[str, Share]]] = {}
    for sigma, at_strength in by_strength(rows).items():
        attacks = by_attack(at_strength)
        known = {n.removeprefix(_KNOWN): r for n, r in attacks.items() if n.startswith(_KNOWN)}
        if known:
            attacked = [row for name, rows in known.items() if name != CLEAN for row in rows]
            known[STRONGEST] = strongest(attacked)
        column = found[f"{sigma:g}"] = {}
        for name, of_attack in attacks.items():
            if name.startswith(_KNOWN):
                continue
            column[name] = {
                "mean": mean_accuracy(of_attack),
                "majority": majority_accuracy(of_attack),
                f"worst of {k}": worst_accuracy(of_attack, k),
            }
            if known.get(name):
                column[name]["known noise"] = mean_accuracy(known[name])
    return found


NO_DE3 = "no De3"


def plain_name(settings: Mapping[str, Any]) -> str:
    """Heading of the column without De3's noise, by the settings of a run.

    A model that is a defence by itself, or may be one, is not called undefended.
    """
    defense, (kind, colon, _) = settings.get("defense"), settings["model"].partition(":")
    if (defense or "").startswith("demask:"):
        return "DeMask"
    of_the_user = colon and kind not in ("timm", "hf-hub", "de3")
    return "as it is" if of_the_user and defense is None else NO_DE3


def column_name(sigma: float | str, plain: str = NO_DE3) -> str:
    """Heading of a strength; `plain` is that of 0, see `plain_name`."""
    return plain if float(sigma) == 0 else f"sigma {float(sigma):g}/255"


def attack_table(
    found: dict[str, dict[str, dict[str, Share]]], title: str, plain: str = NO_DE3
) -> Table:
    """The papers' table: rows attacks, columns strengths, mean accuracy with its 95% interval."""
    names = {name: None for column in found.values() for name in column}
    order = [name for name in names if name != STRONGEST and "@" not in name]
    cells = {
        name: [_cell(column.get(name, {}).get("mean")) for column in found.values()]
        for name in [*order, STRONGEST]
        if name in names
    }
    return _table(title, "attack", [column_name(sigma, plain) for sigma in found], cells)


def readings_table(
    found: dict[str, dict[str, dict[str, Share]]], plain: str = NO_DE3
) -> Table | None:
    """The strongest attack's accuracy, read in every way; None where nothing was attacked."""
    columns = {sigma: column.get(STRONGEST, {}) for sigma, column in found.items()}
    names = {name: None for column in columns.values() for name in column}
    if not names:
        return None
    cells = {name: [_cell(column.get(name)) for column in columns.values()] for name in names}
    headings = [column_name(sigma, plain) for sigma in found]
    return _table("The strongest attack, judged on fresh draws", "reading", headings, cells)


def _table(title: str, first: str, columns: Iterable[str], cells: dict[str, list[str]]) -> Table:
    caption = "accuracy in %, 95% interval over images and draws"
    table = Table(title=title, caption=caption, min_width=len(caption))  # so that they do not wrap
    table.add_column(first)
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, values in cells.items():
        table.add_row(name, *values, style="bold" if name in (STRONGEST, "mean") else "")
    return table


def _cell(value: Share | None) -> str:
    if value is None:
        return ""
    return f"{100 * value.value:.1f} ({100 * value.low:.0f}-{100 * value.high:.0f})"


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (clean, robust) that no other beats in both, by falling robustness."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][1], -points[i][0]))
    kept, best = [], -np.inf
    for i in order:
        if points[i][0] > best:
            kept.append(i)
            best = points[i][0]
    return kept


def tradeoff(found: dict[str, dict[str, dict[str, Share]]]) -> list[dict[str, Any]]:
    """For each strength its clean and robust mean accuracy, and whether it is on the frontier."""
    both = {
        sigma: (column[CLEAN]["mean"], column[STRONGEST]["mean"])
        for sigma, column in found.items()
        if CLEAN in column and STRONGEST in column
    }
    best = frontier([(clean.value, robust.value) for clean, robust in both.values()])
    return [
        {"sigma": float(sigma), "clean": clean, "robust": robust, "frontier": place in best}
        for place, (sigma, (clean, robust)) in enumerate(both.items())
    ]


def tradeoff_table(points: Sequence[dict[str, Any]]) -> Table:
    """Clean and robust accuracy against the strength; a star marks the Pareto frontier."""
    table = Table(title="Trade-off", caption="mean accuracy in %, 95% interval; * Pareto frontier")
    table.add_column("sigma (1/255)", justify="right")
    for heading in ("clean", "robust"):
        table.add_column(heading, justify="right")
    table.add_column("", justify="left")
    for point in points:
        star = "*" if point["frontier"] else ""
        table.add_row(f"{point['sigma']:g}", _cell(point["clean"]), _cell(point["robust"]), star)
    return table


def curves(
    rows: Sequence[Row],
    places: Callable[[Row], Sequence[tuple[str, float]]],
    plain: str = NO_DE3,
) -> dict[str, list[tuple[float, Share]]]:
    """Curves of mean accuracy: line -> (place on the axis, accuracy).

    Args:
        rows: of all strengths and attacks.
        places: a row of an attack -> the lines it is on, and its place there.
        plain: see `column_name`.
    """
    found: dict[str, list[tuple[float, Share]]] = {}
    for sigma, at_strength in by_strength(rows).items():
        for of_attack in by_attack(at_strength).values():
            for name, place in places(of_attack[0]):
                line = f"{column_name(sigma, plain)}, {name}"
                found.setdefault(line, []).append((place, mean_accuracy(of_attack)))
    return {line: sorted(points) for line, points in found.items()}
