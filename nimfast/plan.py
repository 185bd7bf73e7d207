# SPDX-License-Identifier: Apache-2.0
"""A plan of the sequential test, from the command line: ``python -m nimfast.plan``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from nimfast import cli
from nimfast.errors import UserError
from nimfast.parsing import Number
from nimfast.smoothing import bounds, plans, settings

PROG = "python -m nimfast.plan"
DESCRIPTION = "Show a plan of the exact sequential test: boundaries, error, power, samples."


@dataclass
class Config:
    """Options of the command; without any, the plan for sigma 0.5 and n = 10,000."""

    sigma: float = 0.5
    """Standard deviation of the noise, pixels in [0, 1]."""
    radii: tuple[Number, ...] | None = None
    """Target radii, increasing, as 0.25 or 1/4. Default: 0, 0.25, 0.5, ... up to the largest
    possible."""
    n: int = 10_000
    """The most samples."""
    alpha: float = 0.001
    """Probability, over the samples, that an image's certificate is wrong."""
    growth: float | None = None
    """Ratio of a look to the one before. Default: 1.15, above n = 10,000 it is 1.3."""
    labelled: bool = True
    """Test a known class; --no-labelled: whichever class leads."""


def main(config: Config) -> None:
    """Print the plan that `config` asks for."""
    try:
        radii = config.radii
        if radii is None:
            largest = bounds.max_radius(config.n, config.alpha, config.sigma)
            radii = settings.radius_grid(config.sigma, largest)
        found = plans.plan(
            config.sigma,
            radii,
            n=config.n,
            alpha=config.alpha,
            growth=config.growth,
            labelled=config.labelled,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    cli.console.print(found)


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    cli.run(main, Config, PROG, DESCRIPTION, args)


if __name__ == "__main__":
    command()
