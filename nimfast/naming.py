# SPDX-License-Identifier: Apache-2.0
"""Names of result files where the user gives none, and whether a file is of the same run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
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


def difference(old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str]) -> str | None:
    """The first setting in which two runs differ, with both values; None where they agree.

    Args:
        old, new: settings of the run that left a file, and of the one that is to continue it.
        but: settings that may differ.
    """
    for name in [*new, *(name for name in old if name not in new)]:
        there, now = old.get(name), new.get(name)
        if name not in but and there != now:
            return f"{name} is {_short(there, now)} there, {_short(now, there)} now"
    return None


def _short(value: Any, other: Any) -> str:
    """`value` in a few words that tell it from `other`."""
    text = json.dumps(value)
    if max(len(text), len(json.dumps(other))) <= 60:
        return text
    if isinstance(value, list) and isinstance(other, list):
        if len(value) != len(other):
            return f"{len(value)} values"
        first = next(i for i, (a, b) in enumerate(zip(value, other, strict=True)) if a != b)
        if first > 3:
            return f"{json.dumps(value[first])} as number {first + 1}"
    return text if len(text) <= 60 else text[:57] + "..."
