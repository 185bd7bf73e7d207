# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from result files."""

from nimfast.report.plot import plot_certified_accuracy
from nimfast.report.table import Summary, certified_accuracy, certified_table, summarise

__all__ = [
    "Summary",
    "certified_accuracy",
    "certified_table",
    "plot_certified_accuracy",
    "summarise",
]
