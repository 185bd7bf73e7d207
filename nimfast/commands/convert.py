# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints to ours, and back: the work of ``python -m nimfast.convert``."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import torch

from nimfast import cli
from nimfast.errors import UserError
from nimfast.files import replacing
from nimfast.models.checkpoint import (
    Header,
    State,
    build,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from nimfast.models.published import from_published, normalisation, to_published
from nimfast.options import Hints

if TYPE_CHECKING:
    from nimfast.convert import Config


def convert(config: Config) -> None:
    """Read one checkpoint, write the other.

    Raises:
        UserError: a file that cannot be read or written, or a network not known here.
    """
    if config.target.exists():
        raise UserError(f"{config.target} exists; remove it or choose another name")
    state, header = read_checkpoint(config.source)
    wanted = (".pt", ".pth") if header else (".safetensors",)
    if config.target.suffix not in wanted:
        kind = "one of ours; a published one" if header else "not one of ours; ours"
        raise UserError(
            f"{config.source} is {kind} is written to a name that ends in {' or '.join(wanted)}, "
            f"not {config.target.name!r}"
        )
    try:
        if header:
            _publish(config, state, header)
        else:
            _adopt(config, state)
    except OSError as error:
        raise UserError(f"cannot write {config.target} ({error.strerror})") from None
    cli.console.print(f"wrote {config.target}")


def _adopt(config: Config, state: State) -> None:
    model = from_published(state, config.source, config.hints)
    mean, std = normalisation(config.hints, model.arch.channels, config.source)
    header: Header = {
        "mean": mean,
        "std": std,
        "converted_from": str(config.source),
        "command": shlex.join(["python", "-m", "nimfast.convert", *sys.argv[1:]]),
    }
    if config.sigma is not None:
        header["sigma"] = config.sigma
    save_checkpoint(config.target, model, header)
    if config.hints.mean is None:
        cli.console.print(
            f"note: {config.source} does not store its normalisation; ImageNet's is assumed "
            "(--mean, --std)"
        )


def _publish(config: Config, state: State, header: Header) -> None:
    if config.hints != Hints() or config.sigma is not None:
        raise UserError(f"{config.source} is one of ours and says everything; give no options")
    model = build(header)
    load_weights(model, state, config.source)
    with replacing(config.target) as file:
        torch.save({"model": to_published(model)}, file)
    cli.console.print(
        f"note: {config.target.name} holds weights only; its input is normalised with "
        f"mean {header['mean']}, std {header['std']}"
    )
