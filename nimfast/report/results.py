# SPDX-License-Identifier: Apache-2.0
"""Results as JSON that a repeated command continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nimfast.errors import UserError
from nimfast.files import replacing
from nimfast.runtime import versions


class Results:
    """A JSON file of rows under the settings that made them; rows there already are read.

    Args:
        path: the file.
        settings: everything that the rows depend on.

    Attributes:
        rows: results, each as JSON has it.

    Raises:
        UserError: the file holds results of other settings, which must not be lost.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if not path.exists():
            return
        try:
            earlier = json.loads(path.read_text())
            before, rows = earlier["settings"], earlier["rows"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} holds no results of this command; move it away") from None
        if before != self.settings:
            other = [name for name in self.settings if before.get(name) != self.settings[name]]
            raise UserError(
                f"{path} holds results of another run ({', '.join(other)}); choose another --out"
            )
        self.rows = rows

    def column(self, name: str) -> list[Any]:
        """The entry `name` of every row."""
        return [row[name] for row in self.rows]

    def write(self) -> None:
        """Replace the file by what there is now."""
        content = {"settings": self.settings, "versions": versions(), "rows": self.rows}
        with replacing(self.path) as file:
            file.write(json.dumps(content, indent=1).encode())
