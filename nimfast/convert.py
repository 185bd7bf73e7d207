# SPDX-License-Identifier: Apache-2.0
"""``python -m nimfast.convert IN OUT``: published checkpoints to ours, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from nimfast import cli
from nimfast.options import Hints


@dataclass(frozen=True)
class Config:
    """Which file becomes which; the options say what a published file does not."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """checkpoint to read: published (a torch or safetensors file), or ours (safetensors)"""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """checkpoint to write: .safetensors becomes ours; .pt or .pth published, from one of ours"""
    hints: Annotated[Hints, tyro.conf.arg(name="")] = field(default_factory=Hints)
    """what a published file does not say"""
    sigma: float | None = None
    """noise a published classifier was trained with, standard deviation in pixel units of [0, 1]"""


def main(config: Config) -> None:
    """Read one checkpoint, write the other."""
    # Here and not above: --help and a mistyped option need not wait for torch.
    from nimfast.commands.convert import convert

    convert(config)


if __name__ == "__main__":
    cli.run(
        main,
        Config,
        prog="python -m nimfast.convert",
        description="Convert published MAE, DMAE, NIM and SimMIM checkpoints to ours, and back",
    )
