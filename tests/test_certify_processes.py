# SPDX-License-Identifier: Apache-2.0
"""Certification shared among processes: one file, whoever did what, and whoever died."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from certified_models import linear, run, without_time
from test_recertify import again

from nimfast.data import load
from nimfast.processes import Place
from nimfast.smoothing import records
from nimfast.smoothing.engine import Sampler
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import Judge, Request
from nimfast.smoothing.result_file import Part, ResultFile, part_path
from nimfast.smoothing.run import certify_images, make_judge, most_requests

HERE = Path(__file__).parent
# cohen: with a bound for each image, which exact has only where the label is right.
SETTINGS = ["--protocol", "cohen", "--n0", "32", "--sigma", "0.5", "--n", "320", "--seed", "5"]
COMMAND = ["--model", "certified_models:Slow", *SETTINGS, "--batch-size", "64"]
COMMAND += ["--every", "3", "--device", "cpu"]


def _torchrun(
    processes: int, out: Path, *options: str, command: Sequence[str] = ("nimfast.certify", *COMMAND)
) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(processes), *options, "-m", "--", *command]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [*words, "--out", str(out)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=HERE.parent,
        start_new_session=True,  # so that a test can kill all of it
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run.tsv"
    assert run(*COMMAND, "--out", out) == 0
    return out


def _rows(out: Path) -> int:
    """Rows of the file and its parts, so far."""
    paths = [path for path in out.parent.glob("run*.tsv") if path.exists()]
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in paths)


def _wait_for(rows: int, out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while _rows(out) < rows:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of what torchrun started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    ranks[int(entry[5:])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.parametrize("size", [2, 3])
def test_threads_in_the_place_of_processes(tmp_path: Path, size: int) -> None:
    # The same code over a store within this process: fast enough for every test run.
    data, out = load("digits"), tmp_path / "run.tsv"
    header = {
        "protocol": "cohen", "label_free": False, "top2": False, "sigma": 0.5, "n": 320, "n0": 32,
        "alpha": 0.001, "radii": None, "noise": "gaussian", "slack": None,
        "precision": "fp32",
        "seed": 5, "batch_size": 64, "images": list(range(0, 400, 5)), "environments": [],
    }  # fmt: skip

    def ask(index: int, label: int) -> tuple[Judge, list[Request]]:
        return make_judge(header, label, 10), most_requests(header)

    def certify(part: Part, here: Place) -> None:
        sampler = Sampler(Network(linear(), 10, 0.5), seed=5)
        certify_images(part, header, header["images"], data, sampler, here, ask, lambda *_: None)

    with ResultFile(tmp_path / "alone.tsv") as file:
        file.begin(header)
        certify(file, Place(torch.device("cpu")))
        alone = file.finish()
    store = dist.HashStore()

    def work(rank: int) -> None:
        with Part(part_path(out, rank)) as part:
            certify(part, Place(torch.device("cpu"), rank, size, store))

    with ResultFile(out) as file:
        file.begin(header)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, size)]
        for thread in threads:
            thread.start()
        certify(file, Place(torch.device("cpu"), 0, size, store))
        for thread in threads:
            thread.join()
        mine = len(file.done)
        file.absorb()
        rows = file.finish()
    assert 0 < mine < len(rows)
    assert [vars(row) | {"time": 0} for row in rows] == [vars(row) | {"time": 0} for row in alone]
    assert not list(tmp_path.glob("*.part*"))


def test_parts_of_the_dead_are_taken_in(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.tsv"
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:10]))
    part_path(out, 1).write_text("".join([lines[0], *lines[30:40], lines[41][:20]]))  # torn
    part_path(out, 7).write_text("".join([lines[0], *lines[8:20]]))  # some twice
    out.with_suffix(".json").write_text(whole.with_suffix(".json").read_text())
    assert run(*COMMAND, "--out", out) == 0
    assert without_time(out) == without_time(whole)
    assert not list(tmp_path.glob("*.part*"))


def test_a_part_still_being_written_is_not_taken(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.tsv"
    for suffix in (".tsv", ".json"):
        out.with_suffix(suffix).write_bytes(whole.with_suffix(suffix).read_bytes())
    with Part(part_path(out, 1)):
        assert run(*COMMAND, "--out", out) == 2
    assert "another process is writing" in capsys.readouterr().err


@pytest.mark.slow
def test_three_processes_write_what_one_does(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.tsv"
    told, _ = (process := _torchrun(3, out)).communicate(timeout=300)
    assert process.returncode == 0, told
    assert told.count("wrote") == 3  # once, not by every process
    assert without_time(out) == without_time(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.png", "run.tsv"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_killed_workers_are_replaced_and_a_killed_run_goes_on(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.tsv"
    process = _torchrun(2, out, "--max-restarts", "1")
    _wait_for(15, out, process)
    os.kill(_workers(process)[1], signal.SIGKILL)  # torchrun starts both again
    _wait_for(50, out, process)
    os.killpg(process.pid, signal.SIGKILL)  # a machine that fails
    for pid in _workers(process):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    before = _rows(out)
    assert before >= 50
    told, _ = (process := _torchrun(3, out)).communicate(timeout=300)
    assert process.returncode == 0, told
    assert "done before" in told
    assert without_time(out) == without_time(whole)


@pytest.mark.slow
def test_processes_refuse_together(tmp_path: Path) -> None:
    out = tmp_path / "run.tsv"
    assert run(*COMMAND, "--limit", 3, "--out", out) == 0
    told, _ = (process := _torchrun(2, out)).communicate(timeout=300)
    assert process.returncode != 0
    assert told.count("holds another run") == 1
    assert len(records.read(out)) == 3


@pytest.mark.slow
def test_certificates_are_carried_over_by_two_processes(tmp_path: Path) -> None:
    before, alone, out = (tmp_path / name / "run.tsv" for name in ("before", "alone", "shared"))
    given = ["--protocol", "cohen", "--n", 400, "--sigma", 1.2, "--seed", 5, "--every", 2]
    assert run("--model", "digits", *given, "--device", "cpu", "--out", before) == 0
    abstained = [row.predict < 0 for row in records.read(before)]
    assert 5 < sum(abstained) < 100  # whose rows the first process writes, and nobody samples
    changed = ["--model", "digits", "--precision", "bf16", "--n", "2000"]
    words = [str(before), *changed, "--seed", "7", "--device", "cpu"]
    assert again(*words, "--out", alone) == 0
    process = _torchrun(2, out, command=("nimfast.recertify", *words))
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert ", 2 processes, seed 7" in " ".join(told.split())
    assert told.count("wrote") == 3
    assert without_time(out) == without_time(alone)
    assert sorted(path.name for path in out.parent.iterdir()) == ["run.json", "run.png", "run.tsv"]
