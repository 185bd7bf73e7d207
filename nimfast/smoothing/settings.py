# SPDX-License-Identifier: Apache-2.0
"""The options of ``python -m nimfast.certify`` and what follows from them alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nimfast.errors import UserError
from nimfast.naming import run_name
from nimfast.options import Noise, Precision, ProtocolName
from nimfast.parsing import Number
from nimfast.smoothing import bounds
from nimfast.smoothing.anytime import largest_hypothesis

if TYPE_CHECKING:
    from nimfast.data import ImageDataset  # brings torch

DEFAULT_IMAGES = 400
SELECTING = ("cohen", "dmae")
"""Protocols that select a class by samples of their own."""
GRID_PROTOCOLS = ("exact", "anytime")
"""Protocols that certify the radii they are asked for, and no others."""


@dataclass
class Config:
    """Options of the command; without any, a spread of embedded digits and the embedded model."""

    data: str = "digits"
    """Images: digits | cifar10[:DIR] | imagefolder:DIR | parquet:GLOB | hf:NAME."""
    model: str = "digits"
    """Classifier: digits | FILE.safetensors | timm:NAME | hf-hub:NAME | package.module:function, or
    de3:AUTOENCODER+CLASSIFIER?sigma=70, whose own noise is the smoothing noise."""
    checkpoint: Path | None = None
    """Weights for the model, instead of its own."""
    sigma: float | None = None
    """Standard deviation of the noise, pixels in [0, 1]. Default: that of the model's training."""
    protocol: ProtocolName = "exact"
    """exact: group-sequential test over --radii | cohen: CERTIFY as published | dmae: the same,
    stopped where the selected class is not the label | anytime: e-processes over --radii."""
    label_free: bool = False
    """exact and anytime test the leading class, as if the label were not known."""
    top2: bool = False
    """cohen and dmae bound the probability of the second class as well."""
    noise: Noise = "gaussian"
    """gaussian | grid: whole 8-bit steps, out of reach of floating-point attacks."""
    n0: int = 100
    """Samples that select the class (cohen and dmae)."""
    n: int = 10_000
    """Samples that bound its probability; with exact and anytime, at most."""
    alpha: float = 0.001
    """Probability, over the samples, that an image's certificate is wrong."""
    every: int | None = None
    """Certify every K-th image. Default: a spread of --limit images, or of 400."""
    limit: int | None = None
    """At most this many images."""
    radii: tuple[Number, ...] | None = None
    """Radii to certify (exact, anytime) and of the table, as 0.25 or 1/4. Default: 0, 0.25, 0.5,
    ... (closer for a sigma below 0.1) up to 2.5 sigma, beyond which n = 10,000 samples are soon
    needed whole; cohen and dmae: the largest possible."""
    batch_size: int | None = None
    """Most noisy images per forward pass. Default: a rule by device and model, less where memory
    ends."""
    precision: Precision = "fp32"
    """Precision of the classifier that is certified: fp32 | tf32 | bf16 | fp16."""
    compile: bool = False
    """Translate the classifier by torch.compile; one that it does not take runs as it is."""
    cuda_graphs: bool = False
    """Record a batch once and replay it (CUDA)."""
    heads: int | None = None
    """Attention heads of a published file, where its width does not say."""
    mean: tuple[float, ...] | None = None
    """Normalisation of a published file, one value per channel. Default: ImageNet's."""
    std: tuple[float, ...] | None = None
    """The same."""
    seed: int | None = None
    """Seed of the noise. Default: from the operating system. It is recorded."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    out: Path | None = None
    """TSV to write, or .parquet; .json (header) and .png (curve) go beside it. Default: a TSV in
    results/ whose name says the settings."""


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """UserError where option `name` may not have its value."""
    if not holds:
        raise UserError(f"--{name} is {value}; it must be {allowed}")


def check_common(alpha: float, seed: int | None) -> None:
    """Refuse values that no command's options may have.

    Raises:
        UserError: names the first.
    """
    require(0 < alpha < 0.5, "alpha", alpha, "greater than 0 and less than 0.5")
    require(seed is None or 0 <= seed < 2**64, "seed", seed, "in [0, 2^64)")


def check(config: Config) -> None:
    """Refuse options that no run can have.

    Raises:
        UserError: names the first.
    """
    sigma = config.sigma
    require(sigma is None or 0 < sigma < math.inf, "sigma", sigma, "greater than 0")
    # Less is lost in the rounding of fp32 pixels, far more overflows.
    allowed = "between 1e-6 and 1e6, as pixels lie in [0, 1]"
    require(sigma is None or 1e-6 <= sigma <= 1e6, "sigma", sigma, allowed)
    check_common(config.alpha, config.seed)
    for name in ("n0", "n", "every", "limit", "batch-size"):
        value = getattr(config, name.replace("-", "_"))
        require(value is None or value >= 1, name, value, "at least 1")
    selects = config.protocol in SELECTING
    for option, wrong in (("label-free", selects), ("top2", not selects)):
        value = getattr(config, option.replace("-", "_"))
        allowed = f"left out with --protocol {config.protocol}"
        require(not (wrong and value), option, value, allowed)
    least = bounds.least_samples(config.alpha / 2 if config.top2 else config.alpha)
    if config.n < least:
        raise UserError(
            f"--n {config.n} is too small for --alpha {config.alpha:g}: nothing could ever be "
            f"certified; use at least --n {least}"
        )


def radii(config: Config, sigma: float, largest: float) -> tuple[float, ...]:
    """Radii to certify and of the table; `largest` is the largest possible.

    Raises:
        UserError: they do not increase, or no run can certify them.
    """
    if config.protocol == "anytime":
        largest = min(largest, bounds.radius(largest_hypothesis(config.n, config.alpha), sigma))
    if config.radii is None:
        last = largest if config.protocol in SELECTING else min(largest, 2.5 * sigma)
        return radius_grid(sigma, last)
    if any(a >= b for a, b in itertools.pairwise(config.radii)):
        raise UserError(f"--radii {' '.join(map(str, config.radii))} do not increase; sort them")
    for radius in config.radii:
        if not 0 <= radius <= largest:
            raise UserError(
                f"--radii {radius:g} is out of range: with n = {config.n} and "
                f"alpha = {config.alpha:g} radii go from 0 to {math.floor(largest * 1e4) / 1e4}, "
                "the largest possible"
            )
    return config.radii


def radius_grid(sigma: float, last: float) -> tuple[float, ...]:
    """0, 0.25, 0.5, ... up to `last`.

    Where 2.5 sigma is less than 0.25 the step is halved until that holds it twice; where it is more
    than 10, doubled until it holds it 40 times at most.
    """
    step, far = 0.25, 2.5 * sigma
    if far < step:
        step /= 2 ** math.ceil(math.log2(2 * step / far))
    elif far > 40 * step:
        step *= 2 ** math.ceil(math.log2(far / (40 * step)))
    return tuple(step * i for i in range(math.floor(max(last, 0) / step) + 1))


def images(config: Config, data: ImageDataset) -> list[int]:
    """Indices of the images to certify."""
    return data.places(config.every, config.limit, DEFAULT_IMAGES)


def file_name(config: Config, sigma: float) -> str:
    """A file name that tells other settings apart, so that each run finds its own file again."""
    parts = ["certify", config.data, config.model, f"sigma{sigma:g}", f"n{config.n}"]
    named = {"data", "model", "sigma", "n", "device", "out", "cuda_graphs"}
    if config.protocol in SELECTING:
        named.add("radii")  # those of the table only
    return run_name(parts, config, named)
