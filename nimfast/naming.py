# SPDX-License-Identifier: Apache-2.0
"""Names of result files where the user gives none."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any


def run_name(parts: Sequence[str], config: Any, named: Collection[str]) -> str:
    """A file name that tells other settings apart, so that each run finds its own again.

    Args:
        parts: what the name begins with.
        config: dataclass of settings; those that differ from their default are added,
        named: but for these, which `parts` say or which change no result.
    """
    words = list(parts)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in named and value != field.default:
            words.append(f"{field.name}-{value}")
    # File systems allow 255 bytes; the end of a long path says more than its beginning.
    return "_".join(re.sub(r"[^\w.]+", "-", word)[-60:].strip("-") for word in words)
