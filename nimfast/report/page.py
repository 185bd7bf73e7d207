# SPDX-License-Identifier: Apache-2.0
"""One HTML page that holds everything of a report: no script, no file beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from rich.table import Table

from nimfast.report.formats import to_html

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1.5rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dee5; text-align: left; }
.r { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
"""


def page(
    title: str, tables: Sequence[Table], notes: Sequence[str], pictures: Mapping[str, bytes]
) -> str:
    """The page.

    Args:
        title: its heading.
        tables: in order.
        notes: a line each, below the tables.
        pictures: what a picture shows -> PNG, in order.
    """
    parts = [to_html(table) for table in tables]
    if notes:
        lines = "".join(f"<li>{html.escape(note)}</li>\n" for note in notes)
        parts.append(f"<ul>\n{lines}</ul>")
    for shows, data in pictures.items():
        source = base64.b64encode(data).decode()
        parts.append(
            f'<p><img alt="{html.escape(shows)}" src="data:image/png;base64,{source}"></p>'
        )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
