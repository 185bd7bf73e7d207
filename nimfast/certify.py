# SPDX-License-Identifier: Apache-2.0
"""Certified radii of images, from the command line: ``python -m nimfast.certify``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from nimfast import cli
from nimfast.smoothing.settings import Config, check

PROG = "python -m nimfast.certify"
DESCRIPTION = (
    "Certify images by randomised smoothing, report certified accuracy. An interrupted run "
    "continues when the same command is repeated; torchrun -m -- nimfast.certify shares it."
)


def main(config: Config) -> None:
    """Certify what `config` asks for, continuing a run that was interrupted."""
    check(config)
    # Here and not above: --help and a mistyped option need not wait for torch.
    from nimfast.commands.certify import certify

    certify(config)


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    continues = "the same command continues where it stopped"
    cli.run(main, Config, PROG, DESCRIPTION, args, on_interrupt=continues)


if __name__ == "__main__":
    command()
