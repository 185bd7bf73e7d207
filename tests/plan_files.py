# SPDX-License-Identifier: Apache-2.0
"""Writes what is made from plans: nimfast/smoothing/plans.json and the table of the docs page.

    python tests/plan_files.py

test_plans.py checks that both are what this would write.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from nimfast.smoothing import bounds, construction, plan_store, plans

DOCS = Path(__file__).parents[1] / "docs" / "sequential_test.md"
BEGIN, END = "<!-- shipped plans: written by tests/plan_files.py -->\n", "<!-- end -->\n"
ALPHA = 0.001
SETTINGS = [
    (sigma, n, labelled)
    for n in (10_000, 100_000)
    for sigma in (0.25, 0.5, 1.0)
    for labelled in (True, False)
]


def radii(sigma: float, n: int) -> tuple[float, ...]:
    """0, 0.25, 0.5, ... as far as n samples can certify."""
    return tuple(
        0.25 * step for step in range(math.floor(bounds.max_radius(n, ALPHA, sigma) / 0.25) + 1)
    )


def shipped(sigma: float, n: int, labelled: bool) -> plans.Plan:
    return plans.plan(sigma, radii(sigma, n), n=n, alpha=ALPHA, labelled=labelled)


def key(plan: plans.Plan) -> plan_store.Key:
    return plan_store.Key(plan.probabilities, plan.looks, plan.alpha, plan.labelled)


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
    for (sigma, n, labelled), plan in plans_of.items():
        if labelled:
            other = plans_of[sigma, n, False]
            errors = " | ".join(_share(found, max(found.error)) for found in (plan, other))
            lines.append(f"| {sigma:g} | {n:,} | 0 to {plan.radii[-1]:g} | {errors} |")
    return "\n".join(lines) + "\n"


def _share(plan: plans.Plan, error: float) -> str:
    """In units of alpha, rounded up."""
    return f"{math.ceil(error / plan.alpha * 1e8) / 1e8:.8f}"


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
