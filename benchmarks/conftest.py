# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' table: medians of one run side by side, as ratios against the published lines."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from nimfast import runtime

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks import published.py beside them

BASELINE = "published"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", default=None, help="write the rows to this JSON file, the table to .txt"
    )
    parser.addoption(
        "--add", action="store_true", help="keep the rows that --results has of other groups"
    )
    parser.addoption("--device", default="auto", help="cpu, cuda or auto")
    parser.addoption(
        "--default-memory",
        action="store_true",
        help="the published lines with the C library's memory policy, as they run by themselves",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Our commands set this policy for their whole process, so one contender cannot have it without
    # those after it. All have it, in favour of the published lines: alone they would pay for the
    # pages of every large tensor anew.
    if not config.getoption("--default-memory"):
        runtime.keep_freed_memory()


def pytest_runtest_call(item: pytest.Item) -> None:
    """Refuse to call the memory policy the C library's where a contender before has changed it."""
    who = item.callspec.params["who"]  # type: ignore[attr-defined]
    kept = runtime.keep_freed_memory.cache_info().currsize
    if who == BASELINE and kept and item.config.getoption("--default-memory"):
        pytest.fail("--default-memory times one group a process; choose it with -k, use --add")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return runtime.pick_device(request.config.getoption("--device"))


@pytest.fixture
def finish(device: torch.device):  # type: ignore[no-untyped-def]
    """Wait for the device, so that a timed function ends when its work does."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def rows_of(config: pytest.Config) -> list[dict[str, Any]]:
    """One row per timed contender; ratios within a benchmark group, over its published row."""
    rows: list[dict[str, Any]] = []
    session = getattr(config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        row = {"what": bench.group, "who": bench.params["who"], "median_s": bench.stats.median}
        row |= {"rounds": bench.stats.rounds, **bench.extra_info}
        rows.append(row)
    for row in rows:
        base = [r for r in rows if r["what"] == row["what"] and r["who"] == BASELINE]
        row["ratio"] = base[0]["median_s"] / row["median_s"] if base else None
    return rows


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:  # type: ignore[no-untyped-def]
    rows = rows_of(config)
    if not rows:
        return
    path = Path(config.getoption("--results")) if config.getoption("--results") else None
    if path and path.exists() and config.getoption("--add"):
        new = {row["what"] for row in rows}
        rows = [r for r in json.loads(path.read_text())["rows"] if r["what"] not in new] + rows
    where = runtime.pick_device(config.getoption("--device"))
    title = f"{runtime.describe(where)}; torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    for column in ("what", "who", "median", "times published", "also"):
        table.add_column(column, overflow="fold")
    known = ("what", "who", "median_s", "ratio", "rounds")
    for row in rows:
        extra = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if name not in known)
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        table.add_row(row["what"], row["who"], f"{row['median_s'] * 1e3:.3f} ms", ratio, extra)
    Console(width=120).print(table)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"hardware": runtime.describe(where), "versions": runtime.versions()}
        path.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")
        with open(path.with_suffix(".txt"), "w") as file:
            Console(file=file, width=120).print(table)
