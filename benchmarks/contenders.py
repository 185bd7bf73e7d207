# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of operations share: how one is timed, which back end a contender means."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nimfast.ops.backend import why_not


def run(benchmark: Any, finish: Callable[[], None], function: Callable[[], object]) -> None:
    """Time `function` to the end of its work on the device."""

    def timed() -> None:
        function()
        finish()

    benchmark.pedantic(timed, rounds=15, warmup_rounds=3)


def backend_of(who: str, operation: str, device: torch.device) -> str:
    """The back end of a contender named triton... or nimfast...; skips where it cannot serve."""
    backend = "triton" if who.startswith("triton") else "native"
    if why_not(backend, operation, device):
        pytest.skip(why_not(backend, operation, device))
    return backend
