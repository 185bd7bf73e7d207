# SPDX-License-Identifier: Apache-2.0
"""`python -m nimfast.doctor`: what is installed, and which back end serves which device."""

from __future__ import annotations

from dataclasses import dataclass

from nimfast import cli


@dataclass
class Doctor:
    """The report takes no options."""


def main(_: Doctor) -> None:
    """Print the report."""
    # Here and not above: --help and a mistyped option need not wait for torch.
    from nimfast.commands.doctor import doctor

    doctor()


if __name__ == "__main__":
    cli.run(main, Doctor, "python -m nimfast.doctor", "Versions, devices and back ends.")
