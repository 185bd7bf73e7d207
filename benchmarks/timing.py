# SPDX-License-Identifier: Apache-2.0
"""How every operation is timed."""

from collections.abc import Callable


def run(benchmark, finish: Callable[[], None], function: Callable[[], object]) -> None:  # type: ignore[no-untyped-def]
    """Time `function` until the device has finished its work."""

    def timed() -> None:
        function()
        finish()

    benchmark.pedantic(timed, rounds=15, warmup_rounds=3)
