# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported when somebody asks for them (PEP 562).

What reads result files must not wait for torch because the same package also holds a sampler.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def on_demand(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of `package`; `places` says in which module each name is defined."""

    def get(name: str) -> Any:
        if name in places:
            return getattr(importlib.import_module(places[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
