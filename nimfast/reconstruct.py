# SPDX-License-Identifier: Apache-2.0
"""What a pretrained autoencoder makes of noisy images: ``python -m nimfast.reconstruct``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from nimfast import cli
from nimfast.errors import UserError
from nimfast.options import Precision

PROG = "python -m nimfast.reconstruct"
DESCRIPTION = (
    "Show and measure what a pretrained autoencoder makes of noisy images: a picture of some, PSNR "
    "over a data set, loss and PSNR against the noise level. Repeating a command continues it."
)


@dataclass
class Config:
    """Options of the command; what is not given is as in the model's training."""

    model: Path | None = None
    """Pretrained autoencoder, a safetensors file of train.pretrain or nimfast.convert."""
    data: str = "digits"
    """Images: digits | cifar10[:DIR] | imagefolder:DIR | parquet:GLOB | hf:NAME."""
    split: str = "test"
    """Part of the data."""
    sigma: str | None = None
    """Noise level of picture and PSNR, as 70/255 or 0.25. Default: the mean of the training's."""
    sigmas: tuple[float, ...] = tuple(range(0, 251, 25))
    """Noise levels of the curve, in units of 1/255."""
    stats: Literal["all", "input", "noisy", "none"] = "all"
    """Where a patch's mean and variance come from: input | noisy (with norm_pix) | none (without).
    Default: every one that the model allows."""
    mask_ratio: float | None = None
    """Share of the patches that the model does not see. Default: as in training."""
    norm_pix: bool | None = None
    """Whether the model predicts standardised patches. Default: as in training."""
    images: int = 8
    """Images in the picture."""
    limit: int = 256
    """Images that are measured, spread evenly over the data."""
    batch_size: int = 64
    """Images at once."""
    precision: Precision = "fp32"
    """fp32 | tf32 | bf16 | fp16."""
    seed: int = 0
    """Of noise and masks."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    out: Path | None = None
    """Folder for images, psnr and levels, each as .png and .json. Default: results/ and a name."""


def main(config: Config) -> None:
    """Write picture, PSNR and curve of what `config` names."""
    _check(config)
    # Here and not above: --help and a mistyped option need not wait for torch.
    from nimfast.commands.reconstruct import reconstruct

    reconstruct(config)


def _check(config: Config) -> None:
    for name in ("images", "limit", "batch_size"):
        if getattr(config, name) < 1:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} must be at least 1, not {getattr(config, name)}")
    if not config.sigmas or not all(0 <= level < math.inf for level in config.sigmas):
        raise UserError(f"--sigmas must not be negative, and in units of 1/255: {config.sigmas}")
    if config.mask_ratio is not None and not 0 <= config.mask_ratio < 1:
        raise UserError(f"--mask-ratio must lie in [0, 1), not {config.mask_ratio}")
    if not 0 <= config.seed < 2**64:
        raise UserError(f"--seed must lie in [0, 2^64), not {config.seed}")


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    continues = "the same command continues where it stopped"
    cli.run(main, Config, PROG, DESCRIPTION, args, on_interrupt=continues)


if __name__ == "__main__":
    command()
