# SPDX-License-Identifier: Apache-2.0
"""Where plans are kept: a file of the package for the papers' settings, the user's cache else.

Neither is trusted: `nimfast.smoothing.plans` computes the error of what it finds here again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nimfast.files import replacing
from nimfast.smoothing.recursion import Counts

FORMAT = "nimfast plan 1"  # to be raised when other rows are made from the same key
SHIPPED = Path(__file__).with_name("plans.json")

Tables = tuple[Counts, Counts]


class Key(NamedTuple):
    """All that the rows of a plan depend on."""

    p: tuple[float, ...]
    looks: tuple[int, ...]
    alpha: float
    labelled: bool

    @property
    def name(self) -> str:
        """A file name; floats enter with all their digits."""
        text = json.dumps([FORMAT, self.p, self.looks, self.alpha, self.labelled])
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """XDG_CACHE_HOME, the system's own place for caches, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # the XDG specification: relative paths are to be ignored
        home = os.environ.get("LOCALAPPDATA", "") if sys.platform == "win32" else ""
    return Path(home or Path.home() / ".cache") / "nimfast" / "plans"


@functools.cache
def _shipped() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(SHIPPED.read_text())
    return content


def load(key: Key) -> Tables | None:
    """Acceptance and futility counts kept for `key`; None where there are none, or damaged ones."""
    entry = _shipped().get(key.name)
    if entry is None:
        try:
            entry = json.loads((cache_folder() / f"{key.name}.json").read_text())
        except (OSError, RuntimeError, ValueError):
            return None
    return _tables(entry, key)


def _tables(entry: Any, key: Key) -> Tables | None:
    try:
        accept, futile = (
            np.array(entry[name], dtype=np.int64).cumsum(axis=1) for name in ("accept", "futile")
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    shape, looks = (len(key.p), len(key.looks)), np.asarray(key.looks)
    if accept.shape != shape or futile.shape != shape:
        return None
    sound = (
        (accept >= 0) & (accept <= looks + 1) & (futile >= -1) & (futile < accept)
    ).all() and all((np.diff(table, axis=0) >= 0).all() for table in (accept, futile))
    return (accept, futile) if sound else None


def entry(accept: Counts, futile: Counts) -> Mapping[str, Any]:
    """A plan's rows as JSON has them: from look to look, the differences."""
    return {
        name: np.diff(table, axis=1, prepend=0).tolist()
        for name, table in (("accept", accept), ("futile", futile))
    }


def save(key: Key, accept: Counts, futile: Counts) -> None:
    """Keep a plan in the cache; where it cannot be written the plan is made anew the next time."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{key.name}.json") as file:
            file.write(json.dumps(entry(accept, futile)).encode())
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return
