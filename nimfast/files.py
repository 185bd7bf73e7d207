# SPDX-License-Identifier: Apache-2.0
"""Writing files that a kill or a full disk cannot leave half done."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`; a reader never sees half a file.

    Raises:
        OSError: it could not be written; what stood at `path` before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
