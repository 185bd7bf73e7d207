# SPDX-License-Identifier: Apache-2.0
"""Votes drawn for judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nimfast.ops import Stream
from nimfast.smoothing.protocols import Request


def drawn_votes(
    rng: np.random.Generator, shares: Sequence[float]
) -> Callable[[Request], list[int]]:
    """Prefix counts of streams of votes with these shares; the rest are votes for no class."""
    chances = [*shares, max(0.0, 1 - sum(shares))]
    drawn: dict[Stream, tuple[int, np.ndarray]] = {}

    def counts(request: Request) -> list[int]:
        n, before = drawn.get(request.stream, (0, np.zeros(len(chances), dtype=np.int64)))
        drawn[request.stream] = (
            request.n,
            before + rng.multinomial(request.n - n, chances),
        )
        found: list[int] = drawn[request.stream][1].tolist()
        return found

    return counts
