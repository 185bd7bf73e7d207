# SPDX-License-Identifier: Apache-2.0
"""Robust accuracy under attack, from the command line: ``python -m nimfast.attack``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from nimfast import cli
from nimfast.errors import UserError
from nimfast.options import Norm, Precision, Protocol

PROG = "python -m nimfast.attack"
DESCRIPTION = (
    "Attack a classifier, undefended and behind De3 at several strengths, and judge it fairly: "
    "accuracy on fresh draws, with intervals, and findings where a number is not to be trusted. "
    "An interrupted run continues when the same command is repeated."
)


@dataclass
class Config:
    """Options of the command; without any, embedded digits, model and denoiser."""

    data: str = "digits"
    """Images: digits | cifar10[:DIR] | imagefolder:DIR | parquet:GLOB | hf:NAME."""
    model: str = "digits"
    """Classifier or defence: digits | FILE.safetensors | timm:NAME | hf-hub:NAME |
    package.module:function | de3:... | demask:..., as nimfast.load takes it."""
    checkpoint: Path | None = None
    """Weights for the classifier, instead of its own."""
    defense: str | None = None
    """De3's denoiser: digits | FILE.safetensors of train.pretrain | none. Default: digits where the
    model is that, else none."""
    de3_sigma: tuple[str, ...] = ("0", "70", "140")
    """Strengths of De3, one column each, in units of 1/255; 0 is undefended. 0:160:10 is a range
    and gives the trade-off."""
    stats: Literal["default", "input", "noisy", "none"] = "default"
    """Where De3 takes a patch's mean and variance from. Default: noisy, or none for a denoiser that
    predicts pixels."""
    attacks: tuple[str, ...] = ("none", "fgsm", "pgd-10", "aa-rand")
    """none | fgsm | pgd-N | apgd-ce-N | apgd-dlr-N | apgd-t-N | fab-t-N | square-N | aa-standard |
    aa-plus | aa-rand; bare:NAME attacks the classifier without its defence, bpda:NAME goes around
    the denoiser, NAME@E uses E draws for a gradient."""
    eps: str | None = None
    """Radius of the ball, as 4/255 or 0.5. Default: 4/255, for the digits 24/255 (of their 64 real
    pixels each is a square of 16)."""
    norm: Norm = "linf"
    """linf | l2 | l1."""
    protocol: Protocol = "fair"
    """AutoAttack as published (official), as in the NIM paper's code (nim), or fair to randomised
    models."""
    eot: int = 20
    """Draws of a randomised model for every gradient."""
    steps: int | None = None
    """Steps of attacks whose name does not say how many. Default: 10 for pgd, 100 for apgd and fab,
    5000 for square."""
    draws: int = 20
    """Fresh draws that judge each final point."""
    worst_of: int = 10
    """An image withstands the worst of this many draws if all are right."""
    votes: int = 1000
    """Most draws for the majority vote, by a sequential test at error 0.001."""
    n_images: int | None = None
    """At most this many images. Default: 100."""
    every: int | None = None
    """Attack every K-th image. Default: a spread of --n-images."""
    curve: tuple[str, ...] = ()
    """Has the attack saturated? eot 1 5 20 50 and steps 10 50 100 draw PGD against both."""
    cross_checks: bool = True
    """On defended columns: PGD on the bare classifier and by BPDA, and known noise."""
    checks: bool = True
    """Look for reasons not to trust the numbers."""
    batch_size: int = 50
    """Images attacked at once."""
    save_images: bool = False
    """Keep all final points: 8-bit PNG, rounded inside the ball, and safetensors."""
    save_every: float = 30.0
    """Seconds between saved states of an attack."""
    seed: int = 0
    """Of everything random."""
    precision: Precision = "fp32"
    """Of the attack: fp32 | bf16. Verdicts are fp32 always."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    out: Path | None = None
    """Folder of tables, pictures, states. Default: results/ and a name that says the settings."""


def main(config: Config) -> None:
    """Attack what `config` names, continuing a run that was interrupted."""
    check(config)
    # Here and not above: --help and a mistyped option need not wait for torch.
    from nimfast.commands.attack import attack

    attack(config)


def check(config: Config) -> None:
    """Raise `UserError` for what no run can use."""
    least = {"eot": 1, "draws": 1, "worst_of": 1, "votes": 2, "batch_size": 1}
    for name, low in (least | {"steps": 1, "n_images": 1, "every": 1}).items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}")
    if config.worst_of > config.draws:
        raise UserError(
            f"--worst-of {config.worst_of} needs as many draws; give --draws {config.worst_of}, or "
            f"--worst-of {config.draws}"
        )
    if not 0 <= config.seed < 2**64:
        raise UserError(f"--seed is {config.seed}; it must be in [0, 2^64)")
    if not 0 <= config.save_every < math.inf:
        raise UserError(f"--save-every is {config.save_every}; it must be 0 or more seconds")
    if config.precision not in ("fp32", "bf16"):
        raise UserError(f"--precision {config.precision}: attacks run in fp32 or bf16")


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    continues = "the same command continues where it stopped"
    cli.run(main, Config, PROG, DESCRIPTION, args, on_interrupt=continues)


if __name__ == "__main__":
    command()
