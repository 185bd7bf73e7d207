# SPDX-License-Identifier: Apache-2.0
"""How every operation is timed, and what its time is compared with beside the published lines.

The limit of an operation is the longer of two times: that of copying as many bytes as it has to
move, and that of drawing as many normals as it returns.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nimfast.ops import Stream, corrupt, image_keys
from nimfast.ops.backend import why_not

_SECONDS = 1.5  # how long each contender runs, about
_INSTRUCTIONS_PER_NORMAL = 99 / 4  # generator and Box-Muller on CUDA; docs/kernels.md


def run(benchmark: Any, finish: Callable[[], None], function: Callable[[], object]) -> None:
    """Time `function` until the device has finished its work."""

    def timed() -> None:
        function()
        finish()

    timed()  # compiles what compiles, and brings in pages and caches
    begin = time.perf_counter()
    timed()
    rounds = int(_SECONDS / (time.perf_counter() - begin))
    benchmark.pedantic(timed, rounds=min(50, max(3, rounds)), warmup_rounds=1)


def peak_memory(device: torch.device, step: Callable[[], object]) -> float:
    """MiB that `step` needs at most, beside what was there before it (weights, moments).

    On a CPU from the system: its record of the process's largest size is set back, after the C
    library has given back what is free. NaN where the system keeps none.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return (_status("VmHWM") - before) / 1024
    except (AttributeError, OSError):
        return float("nan")


def _status(name: str) -> int:
    """An entry of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def backend_of(who: str, operation: str, device: torch.device) -> str:
    """The back end of a contender named triton... or nimfast...; skips where it cannot serve."""
    backend = "triton" if who.startswith("triton") else "native"
    problem = why_not(backend, operation, device)
    if problem:
        pytest.skip(problem)
    return backend


def report(benchmark: Any, device: torch.device, moved: int, normals: int = 0) -> None:
    """Add rates and the fraction of the limit to a benchmark's row.

    Args:
        benchmark: after `run`.
        device: where it ran.
        moved: bytes that any implementation must read and write.
        normals: normals that it returns.
    """
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = moved / seconds / 1e9
    limit = _copy_seconds(moved, device)
    if normals:
        benchmark.extra_info["Gnormals/s"] = normals / seconds / 1e9
        limit = max(limit, normals / _normals_per_second(device))
    benchmark.extra_info["of limit"] = limit / seconds


@functools.cache
def _copy_seconds(moved: int, device: torch.device) -> float:
    """Time to read and write `moved` bytes in total, buffers as warm as a benchmark's are."""
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source), device)


@functools.cache
def _normals_per_second(device: torch.device) -> float:
    if device.type == "cuda":  # one instruction a clock in each of 128 lanes
        properties = torch.cuda.get_device_properties(device)
        lanes = properties.multi_processor_count * 128
        return lanes * properties.clock_rate * 1e3 / _INSTRUCTIONS_PER_NORMAL
    # On a CPU there is no such number to trust: the rate at which results stay in the cache.
    image = torch.zeros(1, 1, 32, 32)
    keys = image_keys(0, Stream.ESTIMATION, torch.zeros(1, dtype=torch.int64))
    samples = 64 * torch.get_num_threads()
    return samples * 1024 / _best(lambda: corrupt(image, keys, 0.5, samples=samples), device)


def _best(function: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)  # a limit is what can be reached
