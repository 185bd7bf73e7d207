# SPDX-License-Identifier: Apache-2.0
"""Whole runs in bfloat16 over the kernels' blocks: compiled, in two processes, sharing weights.

All of them round in bfloat16 at slightly different places. The measure is how far the plain run in
bfloat16 ends from the one in fp32: the others must end much closer to it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train_processes import TORCHRUN, run
from training_runs import without_key_bias

import train.blocks
from nimfast.models.checkpoint import read_checkpoint
from train.pretrain import RECIPES, Pretrain, pretrain

pytestmark = pytest.mark.slow
WORDS = shlex.split(
    "--epochs 3 --batch-size 256 --warmup 0 --clip 0.5 --precision bf16 --device cpu"
)
# On machines, too, on which torch's products are the faster ones; says how often they were called.
SCRIPT = """
import train.blocks
from train.pretrain import RECIPES, Pretrain, pretrain
from train.settings import recipes
from nimfast import cli

calls, branch = [], train.blocks._branch
train.blocks.multiplies_bf16 = lambda: True
train.blocks._branch = lambda *given: (calls.append(1), branch(*given))[1]

def counted(settings):
    pretrain(settings)
    print("branches:", len(calls), flush=True)

cli.run(counted, recipes(Pretrain, RECIPES), "pretrain", "")
"""
BRANCHES = 3 * 4 * 3 * 2  # epochs, steps, blocks, branches of a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def one_process(folder: Path, precision: str = "bf16", compiled: bool = False) -> Path:
    """The checkpoint of a run in this process, and how often it called the kernels' branches."""
    pytest.importorskip("_nimfast")
    settings = Pretrain(**RECIPES["digits-demo"])
    settings = replace(settings, epochs=3, batch_size=256, warmup=0.0, clip=0.5, device="cpu")
    out = folder / f"{precision}{'-compiled' * compiled}.safetensors"
    calls, branch = [], train.blocks._branch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.blocks, "multiplies_bf16", lambda: True)
        patch.setattr(train.blocks, "_branch", lambda *given: (calls.append(1), branch(*given))[1])
        pretrain(replace(settings, out=out, precision=precision, compile=compiled))  # type: ignore[arg-type]
    assert len(calls) == (BRANCHES if precision == "bf16" and not compiled else 0)
    return out


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return one_process(folder)


@pytest.fixture(scope="module")
def rounding(folder: Path, plain: Path) -> float:
    """How far a run in bfloat16 ends from one in fp32."""
    return apart(plain, one_process(folder, "fp32"))


def apart(one: Path, other: Path) -> float:
    """Distance of the weights."""
    first, second = (read_checkpoint(path)[0] for path in (one, other))
    assert first.keys() == second.keys()
    parts = (without_key_bias(n, first[n]) - without_key_bias(n, second[n]) for n in first)
    return float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())


def same_loss(one: Path, other: Path) -> bool:
    logs = [path.with_suffix(".jsonl").read_text().splitlines() for path in (one, other)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    return losses[0] == pytest.approx(losses[1], rel=5e-4) and len(losses[0]) == 3


def test_compiled(folder: Path, plain: Path, rounding: float) -> None:
    compiled = one_process(folder, compiled=True)
    assert same_loss(compiled, plain)
    assert 0 < apart(compiled, plain) < 0.5 * rounding


@pytest.mark.parametrize("words", [[], ["--shard"], ["--shard", "--compile"]])
def test_two_processes(words: list[str], folder: Path, plain: Path, rounding: float) -> None:
    script, out = folder / "run.py", folder / f"two{''.join(words)}.safetensors"
    script.write_text(SCRIPT)
    told = run(*TORCHRUN, script, "digits-demo", *WORDS, *words, "--out", out)
    assert told.count(f"branches: {0 if '--compile' in words else BRANCHES}") == 2
    assert same_loss(out, plain)
    assert apart(out, plain) < (0.5 if "--compile" in words else 0.1) * rounding
