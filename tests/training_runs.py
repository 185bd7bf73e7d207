# SPDX-License-Identifier: Apache-2.0
"""Small training runs, and how they are compared: for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from train.optim import Optimizer
from train.settings import Settings

COMMON: dict[str, Any] = {
    "data": "digits",
    "model": "digits",
    "sigma": "0.5",
    "mean": (0.3,),
    "std": (0.4,),
    "warmup": 0.0,
    "precision": "fp32",
    "device": "cpu",
    "threads": 1,  # small networks on a shared machine: two would wait for each other
}
QUICK: dict[str, Any] = {
    **COMMON,
    "epochs": 3,
    "batch_size": 299,  # 4 steps of an epoch
    "lr": 4e-3,
    "keep": 9,
}


class Stop(Exception):
    """The run ends here, as if it had been killed."""


def stop(main: Callable[[Any], None], settings: Settings, steps: int) -> None:
    """Run `main` until `steps` steps are made."""
    made, step = [0], Optimizer.step

    def counted(self: Optimizer, rate: float) -> Tensor:
        if made[0] == steps:
            raise Stop
        made[0] += 1
        return step(self, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", counted)
        with pytest.raises(Stop):
            main(settings)


def rows(out: Path) -> list[dict[str, Any]]:
    """The log, without what depends on the clock."""
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def without_key_bias(name: str, value: Tensor) -> Tensor:
    """`value`, but for the bias of attention keys.

    It moves no output, so its gradient is rounding alone, which Adam makes as large as any other.
    """
    if not name.endswith("attn.qkv.bias"):
        return value
    query, _, values = value.chunk(3)
    return torch.cat([query, values])


def assert_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
