# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from result files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nimfast.ondemand import on_demand

if TYPE_CHECKING:
    from nimfast.report.plot import plot_certified_accuracy
    from nimfast.report.table import Summary, certified_accuracy, certified_table, summarise

__all__ = [
    "Summary",
    "certified_accuracy",
    "certified_table",
    "plot_certified_accuracy",
    "summarise",
]

__getattr__ = on_demand(
    __name__,
    {
        "Summary": "nimfast.report.table",
        "certified_accuracy": "nimfast.report.table",
        "certified_table": "nimfast.report.table",
        "plot_certified_accuracy": "nimfast.report.plot",
        "summarise": "nimfast.report.table",
    },
)
