# SPDX-License-Identifier: Apache-2.0
"""Commands import what they need and no more: torch and timm take seconds each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = [
    "attack", "certify", "convert", "doctor", "plan", "recertify", "reconstruct", "report",
]  # fmt: skip
HEAVY = {"datasets", "matplotlib", "scipy.stats", "timm", "torch", "torch._dynamo", "torchvision"}

# Runs a command as `python -m` does, then says how it ended and which modules it had imported.
RUN = """
import runpy, sys
name, sys.argv[1:] = sys.argv[1], sys.argv[2:]
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
except SystemExit as ended:
    print("\\nMODULES", ended.code, *sys.modules)
"""


def imported(name: str, *args: object) -> tuple[int, set[str]]:
    """Exit code of a command, and the heavy modules that it imported."""
    words = [sys.executable, "-c", RUN, f"nimfast.{name}", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run(words, env=environment, text=True, capture_output=True)
    assert "MODULES" in ended.stdout, ended.stderr
    code, *modules = ended.stdout.split("MODULES")[1].split()
    return int(code), HEAVY & set(modules)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name: str) -> None:
    assert imported(name, "--help") == (0, set())


def test_bad_options_are_refused_before_anything_heavy(tmp_path: Path) -> None:
    assert imported("attack", "--draws", 0) == (2, set())
    assert imported("certify", "--n", 3) == (2, set())
    assert imported("recertify", tmp_path / "x.tsv", "--model", "digits", "--n", 0) == (2, set())
    assert imported("reconstruct", "--limit", 0) == (2, set())
    assert imported("report", tmp_path / "none.tsv") == (2, set())


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    rows = [f"{i}\t{i % 10}\t{i % 10}\t0.{i}\t1\t0:00:01" for i in range(9)]
    lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows, ""]
    for name in ("one", "two"):  # two: compared by a test of scipy
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
    files = [tmp_path / "one.tsv", tmp_path / "two.tsv"]
    assert imported("report", *files, "--out", tmp_path / "out") == (0, {"matplotlib"})
    assert (tmp_path / "out" / "index.html").exists()


def test_a_plan_needs_no_torch() -> None:
    assert imported("plan") == (0, set())


def test_the_doctor_needs_no_models() -> None:
    assert imported("doctor") == (0, {"torch"})
