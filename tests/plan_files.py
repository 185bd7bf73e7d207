# SPDX-License-Identifier: Apache-2.0
"""Plans that the tests share, and what is made from plans: plans.json, the docs page's tables.

    python tests/plan_files.py

writes nimfast/smoothing/plans.json and the tables; test_plans.py checks that they are current.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from nimfast.smoothing import bounds, construction, plan, plan_store
from nimfast.smoothing.plans import Plan, anytime_plan

DOCS = Path(__file__).parents[1] / "docs" / "sequential_test.md"
BEGIN, END = "<!-- shipped plans: written by tests/plan_files.py -->\n", "<!-- end -->\n"
ALPHA = 0.001
SETTINGS = [
    (sigma, n, labelled)
    for n in (10_000, 100_000)
    for sigma in (0.25, 0.5, 1.0)
    for labelled in (True, False)
]

# For tests whose sums are exact. Made on demand, in the tests' own cache.
SMALL: dict[str, Callable[[], Plan]] = {
    "four radii": lambda: plan(1.0, (0, 0.5, 1.0, 2.0), n=640, alpha=0.001),
    "few looks": lambda: plan(0.5, (0, 0.3, 0.6), n=300, alpha=0.04, growth=1.5),
    "no radius 0": lambda: plan(1.0, (0.4, 1.2), n=1000, alpha=0.2),
    "leading": lambda: plan(1.0, (0, 0.1, 0.5), n=500, alpha=0.01, labelled=False),
    "anytime": lambda: anytime_plan(1.0, (0, 1.0), n=640, alpha=0.01),
}


def radii(sigma: float, n: int) -> tuple[float, ...]:
    """0, 0.25, 0.5, ... as far as n samples can certify."""
    return tuple(
        0.25 * step for step in range(math.floor(bounds.max_radius(n, ALPHA, sigma) / 0.25) + 1)
    )


def shipped(sigma: float, n: int, labelled: bool) -> Plan:
    return plan(sigma, radii(sigma, n), n=n, alpha=ALPHA, labelled=labelled)


def key(found: Plan) -> plan_store.Key:
    return plan_store.Key(found.probabilities, found.looks, found.alpha, found.labelled)


def table() -> str:
    """The docs page's tables of exact errors."""
    plans_of = {setting: shipped(*setting) for setting in SETTINGS}
    lines = [
        "| r / sigma | p_j | 10,000: votes | known | leading | 100,000: votes | known | leading |",
        "|---|---|---|---|---|---|---|---|",
    ]
    finest = [plans_of[1.0, n, known] for n in (10_000, 100_000) for known in (True, False)]
    for j, ratio in enumerate(finest[2].radii):
        cells = [f"{ratio:g}", f"{finest[2].probabilities[j]:.8f}"]
        for known, leading in (finest[:2], finest[2:]):
            if j < len(known.radii):
                votes = [known.accept[j, -1], leading.accept[j, -1]]
                cells.append(" / ".join(f"{count:,}" for count in dict.fromkeys(votes)))
                cells += [_share(known, known.error[j]), _share(leading, leading.error[j])]
            else:
                cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| sigma | n | radii | known | leading |", "|---|---|---|---|---|"]
    for (sigma, n, labelled), found in plans_of.items():
        if labelled:
            other = plans_of[sigma, n, False]
            errors = " | ".join(_share(one, max(one.error)) for one in (found, other))
            lines.append(f"| {sigma:g} | {n:,} | 0 to {found.radii[-1]:g} | {errors} |")
    return "\n".join(lines) + "\n"


def _share(found: Plan, error: float) -> str:
    """In units of alpha, rounded up."""
    return f"{math.ceil(error / found.alpha * 1e8) / 1e8:.8f}"


def fresh() -> dict[str, object]:
    """What plans.json should hold, built anew."""
    content = {}
    for setting in SETTINGS:
        where = key(shipped(*setting))
        tables = construction.build(where.p, where.looks, where.alpha, where.labelled)
        content[where.name] = plan_store.entry(*tables)
    return content


if __name__ == "__main__":
    entries = [f'"{name}": {json.dumps(entry)}' for name, entry in fresh().items()]
    plan_store.SHIPPED.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.split(END)[1])
