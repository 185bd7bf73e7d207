# SPDX-License-Identifier: Apache-2.0
"""Classifiers that the tests certify, and the command run in this process."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nimfast import certify

# The models below are named on the command line as certified_models:NAME.
LINEAR = ["--model", "certified_models:linear", "--sigma", "0.5", "--n", "320"]
COHEN = [*LINEAR, "--protocol", "cohen", "--n0", "32"]


def linear() -> nn.Module:
    """Logits on a coarse grid, so that counts are equal on every machine."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    weight = torch.zeros(10, 1024)
    for label in range(10):
        weight[label, 100 * label : 100 * label + 100] = 0.125
    layers[1].load_state_dict({"weight": weight, "bias": torch.zeros(10)})
    return layers


class Slow(nn.Module):
    """`linear`, slow enough to be killed in the middle of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linear()

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.003)
        logits: Tensor = self.layers(images)
        return logits


class Nan(nn.Module):
    """NaN for about half of all noisy images."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :10].clone()
        logits[images.flatten(1)[:, 500] > 0] = math.nan
        return logits


class Dropped(Slow):
    """Dropout as a function, which eval mode does not reach."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.1)


class BatchNormal(Slow):
    """Statistics of the batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, track_running_stats=False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.norm(images))


class Stubborn(Slow):
    """Stays in training mode."""

    def train(self, mode: bool = True) -> Stubborn:
        return self


class Random(Slow):
    """Randomness that nobody declared."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.randn(10)


class Five(nn.Module):
    """A classifier of five classes."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :5]


def run(*args: object) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as stop:
        certify.command([str(arg) for arg in args])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def without_time(path: Path) -> list[list[str]]:
    """The cells of a result file, but for the column that differs from run to run."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    column = rows[0].index("time")
    return [row[:column] + row[column + 1 :] for row in rows]
