# SPDX-License-Identifier: Apache-2.0
"""Certificates of a changed model from those of the model before: ``python -m nimfast.recertify``.

For a model that was quantised, pruned or fine-tuned a little: images are not certified anew, only
how often the two models differ on noisy copies is bounded, from far fewer samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from nimfast import cli
from nimfast.errors import UserError
from nimfast.options import Precision
from nimfast.smoothing import settings

PROG = "python -m nimfast.recertify"
DESCRIPTION = (
    "Carry the certificates of a finished run of nimfast.certify over to a changed model: each "
    "image's bound less an upper bound of how often the change loses its class. Both errors add. "
    "An interrupted run continues when the same command is repeated; torchrun -m -- "
    "nimfast.recertify shares it."
)


@dataclass
class Config:
    """Options of the command."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Result file of the model before the change, finished. Data, images, sigma and noise are
    those of this run."""
    model: str
    """The changed classifier, as nimfast.certify takes it."""
    checkpoint: Path | None = None
    """Weights for it, instead of its own."""
    before: str | None = None
    """Where the model before the change lies. Default: where the file says."""
    n: int = 1000
    """Noisy copies on which both models are compared. Where none is lost the bound falls by
    6.9 / n."""
    alpha: float = 0.001
    """Probability that what is lost is underestimated, on top of the file's alpha."""
    precision: Precision = "fp32"
    """Precision of the changed model: fp32 | tf32 | bf16 | fp16. The other runs at the file's."""
    seed: int | None = None
    """Seed of the noise. Default: from the operating system. It is recorded."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    out: Path | None = None
    """TSV to write, or .parquet; .json (header) and .png (curve) go beside it. Default: a TSV in
    results/ whose name says the settings."""


def main(config: Config) -> None:
    """Carry over what `config` names, continuing a run that was interrupted."""
    _check(config)
    # Here and not above: --help and a mistyped option need not wait for torch.
    from nimfast.commands.recertify import recertify

    recertify(config)


def _check(config: Config) -> None:
    settings.check_common(config.alpha, config.seed)
    settings.require(config.n >= 1, "n", config.n, "at least 1")
    if config.out is not None and config.out.resolve() == config.file.resolve():
        raise UserError(f"--out {config.out} is the file to carry over; choose another")


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    continues = "the same command continues where it stopped"
    cli.run(main, Config, PROG, DESCRIPTION, args, on_interrupt=continues)


if __name__ == "__main__":
    command()
