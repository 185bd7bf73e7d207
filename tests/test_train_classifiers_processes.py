# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning, probing and adversarial training in two processes that torchrun starts."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_processes import TORCHRUN, run, weights
from training_runs import without_key_bias

from nimfast.models import MAE, Architecture, SimMIM, SimMIMArchitecture
from nimfast.models.checkpoint import save_checkpoint

pytestmark = pytest.mark.slow
COMMON = shlex.split(
    "--data digits --epochs 2 --batch-size 240 --warmup 0 --precision fp32 --device cpu --resume "
    "--validate-every 1 --choose last --rand-augment none --crop none --no-flip "
)
SMALL = Architecture((32, 32), 1, 8, 32, 1, 1, True, 32, 1, 1)
SWIN = SimMIMArchitecture((32, 32), 1, 4, 16, (1, 1), (2, 2), 4)

# Inside `gathered` one process attacks more often than the other; outside they train together.
GATHERED = """
import copy
import torch
import torch.distributed as dist
from nimfast.models import Architecture, ViT
from train.sharding import Shards

dist.init_process_group("gloo")
torch.manual_seed(0)
model = ViT(Architecture((32, 32), 1, 8, 32, 2, 1), 10)
alone, shards, images = copy.deepcopy(model), Shards(model), torch.rand(4, 1, 32, 32)

def attacked(network):
    x = images.clone().requires_grad_()
    return torch.autograd.grad(network(x).logsumexp(1).sum(), x)[0]

with shards.gathered():
    for _ in range(1 + 2 * dist.get_rank()):
        torch.testing.assert_close(attacked(model), attacked(alone))
for network in (model, alone):
    network(images).logsumexp(1).sum().backward()
for shared, weight in zip(model.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(shared.grad.full_tensor(), weight.grad)
print("the same")
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("finetune", "cr --lr 8e-3 --drop-path 0 --validation-votes 5"),
        ("linprobe", "noisy --lr 50 --validation-votes 5 --sigma 0.1"),
        ("adversarial", "pgd --lr 0.2 --mix-probability 1 --attack-steps 2"),
    ],
)
def test_two_processes_equal_one(script: str, words: str, tmp_path: Path) -> None:
    """Noise, mixing, starts of attacks: the same draws whoever makes them."""
    torch.manual_seed(0)
    init = tmp_path / "mae.safetensors"
    save_checkpoint(init, MAE(SMALL), {"mean": [0.3], "std": [0.4]})
    given = [*shlex.split(words), "--init", init, *COMMON]
    if script == "linprobe":
        given = [word for word in given if word not in ("--rand-augment", "none", "--no-flip")]
        given.remove("--crop")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    run(sys.executable, "-m", f"train.{script}", *given, "--out", one)
    told = run(*TORCHRUN, "-m", f"train.{script}", *given, "--out", two)
    assert told.count("wrote") == 1
    logs = [
        json.loads(out.with_suffix(".jsonl").read_text().splitlines()[-1]) for out in (one, two)
    ]
    # A probe's batch norm sees each process's images by themselves.
    close = 0.05 if script == "linprobe" else 1e-3
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=close)
    assert logs[0]["clean"] == pytest.approx(logs[1]["clean"], abs=0.03)
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    if script != "linprobe":
        for name in first:
            ours, theirs = (without_key_bias(name, part[name]) for part in (first, second))
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


TUNE = "cr --lr 8e-3 --drop-path 0 --validation-votes 5 --ema 0.9 --clip 0.5"


@pytest.mark.parametrize(
    ("network", "script", "words"),
    [
        ("vit", "finetune", TUNE),
        ("swin", "finetune", TUNE),
        ("vit", "finetune", f"{TUNE} --optimizer lars --lr 8"),
        ("vit", "adversarial", "pgd --lr 2 --mix-probability 1 --attack-steps 2 --ema 0.9"),  # SGD
    ],
)
def test_processes_may_share_the_weights(
    network: str, script: str, words: str, tmp_path: Path
) -> None:
    """Two with a part of each weight equal one; a run goes on from either in the other."""
    torch.manual_seed(0)
    init = tmp_path / "init.safetensors"
    autoencoder = MAE(SMALL) if network == "vit" else SimMIM(SWIN)
    save_checkpoint(init, autoencoder, {"mean": [0.3], "std": [0.4]})
    given = [f"train.{script}", *shlex.split(words), "--init", init, *COMMON]
    given += ["--save-every", 1, "--keep", 9]
    outs = {name: tmp_path / name / "x.safetensors" for name in ("one", "two", "alone", "again")}
    for out in outs.values():
        out.parent.mkdir()
    run(sys.executable, "-m", *given, "--out", outs["one"])
    told = run(*TORCHRUN, "-m", *given, "--shard", "--out", outs["two"])
    assert told.count("wrote") == 1
    runs = [("alone", "two", [sys.executable, "-m", *given])]
    if script == "adversarial":  # one process's SGD is a fused one, of which two have none
        runs.append(("again", "one", [*TORCHRUN, "-m", *given, "--shard"]))
    for name, start, command in runs:
        for path in outs[start].parent.glob("x-step4.*"):
            shutil.copy(path, outs[name].parent)
        told = run(*command, "--out", outs[name])
        assert "going on after 4 of 8 steps" in told
    logs = {
        name: json.loads(out.with_suffix(".jsonl").read_text().splitlines()[-1])
        for name, out in outs.items()
        if out.exists()
    }
    first, start = weights(outs["one"]), load_file(init)
    measured = "robust" if script == "adversarial" else "right_votes"
    for name in ("two", *(name for name, _, _ in runs)):
        assert logs[name]["loss"] == pytest.approx(logs["one"]["loss"], rel=1e-5)
        assert logs[name][measured] == pytest.approx(logs["one"][measured], abs=0.01)
        other = weights(outs[name])
        assert first.keys() == other.keys()
        for part, value in first.items():
            ours, theirs = (without_key_bias(part, v) for v in (value, other[part]))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
            if part in start and part.endswith("weight") and value.ndim > 1:
                assert (value - start[part]).abs().max() > 1e-3  # far more than they may differ


def test_gathered_weights_serve_each_process_alone(tmp_path: Path) -> None:
    script = tmp_path / "gathered.py"
    script.write_text(GATHERED)
    assert run(*TORCHRUN, script).count("the same") == 2


def test_a_probe_may_share_the_frozen_encoder(tmp_path: Path) -> None:
    """As two processes that hold it whole: each one's batch norm sees its own images."""
    torch.manual_seed(0)
    init = tmp_path / "init.safetensors"
    save_checkpoint(init, MAE(SMALL), {"mean": [0.3], "std": [0.4]})
    words = "noisy --lr 50 --validation-votes 5 --sigma 0.1 --crop none --data digits --epochs 2 "
    words += "--batch-size 240 --warmup 0 --precision fp32 --device cpu --validate-every 1"
    given = ["train.linprobe", *shlex.split(words), "--choose", "last", "--init", init]
    outs = [tmp_path / name / "x.safetensors" for name in ("whole", "shared")]
    for out, more in zip(outs, ([], ["--shard"]), strict=True):
        out.parent.mkdir()
        run(*TORCHRUN, "-m", *given, *more, "--out", out)
    whole, shared = (load_file(out) for out in outs)
    assert whole.keys() == shared.keys() and "batch_norm.running_var" in whole
    for name, value in whole.items():
        torch.testing.assert_close(value, shared[name], rtol=1e-5, atol=1e-6)
    assert whole["batch_norm.num_batches_tracked"] == 8
