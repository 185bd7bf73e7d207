# SPDX-License-Identifier: Apache-2.0
"""Training in real processes: two of them, killed ones, ones that torchrun starts again."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PRETRAIN = shlex.split(
    "digits-demo --epochs 3 --batch-size 256 --warmup 0 --save-every 0.5 --validate-every 3 "
    "--ema 0.9 --clip 0.5 --device cpu --keep 99 --resume --out"
)
STEPS = 12
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# A worker that dies in its first life, as from a failing machine.
DYING = """
import os, signal
from train.optim import Optimizer
from train.pretrain import RECIPES, Pretrain, pretrain
from train.settings import recipes
from nimfast import cli

step = Optimizer.step
made = 0

def dying(self, rate):
    global made
    made += 1
    if made == 8 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, rate)

Optimizer.step = dying
cli.run(pretrain, recipes(Pretrain, RECIPES), "pretrain", "")
"""


def start(*command: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [str(word) for word in command]
    return subprocess.Popen(
        words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(*command: object) -> str:
    process = start(*command)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "x.safetensors"
    run(sys.executable, "-m", "train.pretrain", *PRETRAIN, out)
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of two."""
    out = tmp_path_factory.mktemp("pair") / "x.safetensors"
    told = run(*TORCHRUN, "-m", "train.pretrain", *PRETRAIN, out)
    assert told.count("wrote") == 1
    return out


def weights(out: Path) -> dict[str, Tensor]:
    return {**load_file(out), **{f"ema.{k}": v for k, v in load_file(averaged(out)).items()}}


def averaged(out: Path) -> Path:
    return out.with_suffix(".ema.safetensors")


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_processes_equal_one(whole: Path, pair: Path) -> None:
    logs = [
        [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
        for out in (whole, pair)
    ]
    assert len(logs[0]) == len(logs[1]) == 3
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert logs[0][2]["validation"] == pytest.approx(logs[1][2]["validation"], rel=1e-4)
    first, second = weights(whole), weights(pair)
    for name, value in first.items():
        if not name.endswith("attn.qkv.bias"):  # a key's bias moves nothing: rounding alone
            torch.testing.assert_close(value, second[name], rtol=1e-2, atol=5e-4)


def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    chance = random.Random(time.time_ns())
    for _ in range(3):
        before = len(list(tmp_path.glob("x-step*.state")))
        process = start(sys.executable, "-m", "train.pretrain", *PRETRAIN, out)
        deadline = time.monotonic() + 120
        # Somewhere after the next state: in a step, while writing, between two files.
        while len(list(tmp_path.glob("x-step*.state"))) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
    told = run(sys.executable, "-m", "train.pretrain", *PRETRAIN, out)
    assert "going on after" in told or "finished already" in told
    assert_same(whole, out)
    assert not list(tmp_path.glob(".*"))


def test_worker_that_dies_is_replaced(pair: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "dying.py", tmp_path / "x.safetensors"
    script.write_text(DYING)
    told = run(*TORCHRUN, "--max-restarts", 1, script, *PRETRAIN, out)
    assert f"going on after 6 of {STEPS} steps" in told
    assert_same(pair, out)


def test_processes_may_share_the_weights(pair: Path, tmp_path: Path) -> None:
    """The same run, its files whole; it goes on shared (bit for bit) or not."""
    (tmp_path / "shared").mkdir()
    out = tmp_path / "shared" / "x.safetensors"
    run(*TORCHRUN, "-m", "train.pretrain", *PRETRAIN, out, "--shard")
    assert_close(pair, out)
    for name, words in (("again", TORCHRUN), ("alone", [sys.executable])):
        (tmp_path / name).mkdir()
        for path in out.parent.glob("x-step6.*"):
            shutil.copy(path, tmp_path / name)
        other = tmp_path / name / "x.safetensors"
        told = run(
            *words, "-m", "train.pretrain", *PRETRAIN, other, *["--shard"] * (name == "again")
        )
        assert f"going on after 6 of {STEPS} steps" in told
        if name == "again":
            assert_same(out, other)
        assert_close(pair, other)


def assert_close(one: Path, other: Path) -> None:
    """Weights, averages and moments, to rounding."""
    files = [
        {**weights(out), **torch.load(out.with_suffix(".state"))["optimizer"]["inner"]["state"]}
        for out in (one, other)
    ]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        if not str(name).endswith("attn.qkv.bias"):
            torch.testing.assert_close(value, files[1][name], rtol=1e-3, atol=1e-5)


def test_shared_steps_without_finite_gradients_are_skipped(tmp_path: Path) -> None:
    words = [*PRETRAIN, tmp_path / "x.safetensors", "--lr", 1e30, "--shard"]
    process = start(*TORCHRUN, "-m", "train.pretrain", *words)
    told, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "the gradients were not finite in 10 steps in a row" in " ".join(told.split())


def test_batch_that_processes_cannot_share(tmp_path: Path) -> None:
    words = [*PRETRAIN, tmp_path / "x.safetensors", "--batch-size", 255]
    process = start(*TORCHRUN, "-m", "train.pretrain", *words)
    told, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "--batch-size 255 cannot be reached by 2 processes" in " ".join(told.split())


def test_compiled_run_equals_the_eager_one(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    run(sys.executable, "-m", "train.pretrain", *PRETRAIN, out, "--compile")
    last = [json.loads(o.with_suffix(".jsonl").read_text().splitlines()[-1]) for o in (whole, out)]
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=1e-3)
    assert load_file(out).keys() == load_file(whole).keys()
