# SPDX-License-Identifier: Apache-2.0
"""Certified radii of images, from the command line: ``python -m nimfast.certify``."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nimfast import cli
from nimfast.data import ImageDataset, load
from nimfast.errors import UserError
from nimfast.models import Classifier, load_classifier
from nimfast.report import certified_table, plot_certified_accuracy, summarise
from nimfast.runtime import DTYPES, Precision, check_precision, environment, pick_device, prepare
from nimfast.smoothing import bounds, records, smooth
from nimfast.smoothing.engine import Sampler, batch_rows, default_batch_size

PROG = "python -m nimfast.certify"
DESCRIPTION = (
    "Certify images under Gaussian noise (CERTIFY, Cohen et al. 2019), report certified accuracy. "
    "An interrupted run continues when the same command is repeated."
)
DEFAULT_IMAGES = 100


@dataclass
class Config:
    """Options of the command; without any, a spread of embedded digits and the embedded model."""

    data: str = "digits"
    """Images: digits | cifar10[:DIR] | imagefolder:DIR | parquet:GLOB | hf:NAME."""
    model: str = "digits"
    """Classifier: digits | FILE.safetensors | timm:NAME | hf-hub:NAME | package.module:function."""
    checkpoint: Path | None = None
    """Weights for the model, instead of its own."""
    sigma: float | None = None
    """Standard deviation of the noise, pixels in [0, 1]. Default: that of the model's training."""
    n0: int = 100
    """Samples that select the class."""
    n: int = 10_000
    """Fresh samples that bound its probability."""
    alpha: float = 0.001
    """Probability, over the samples, that an image's certificate is wrong."""
    every: int | None = None
    """Certify every K-th image. Default: a spread of --limit images, or of 100."""
    limit: int | None = None
    """At most this many images."""
    radii: tuple[float, ...] | None = None
    """Radii of the table. Default: 0, 0.25, 0.5, ... up to the largest possible."""
    batch_size: int | None = None
    """Most noisy images per forward pass. Default: a fixed rule by device and model."""
    precision: Precision = "fp32"
    """Precision of the classifier that is certified: fp32 | tf32 | bf16 | fp16."""
    seed: int | None = None
    """Seed of the noise. Default: from the operating system. It is recorded."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    out: Path | None = None
    """TSV to write; .json (header) and .png (curve) go beside it. Default: results/ and a name that
    says the settings."""


def main(config: Config) -> None:
    """Certify what `config` asks for, continuing a run that was interrupted."""
    _check(config)
    device = pick_device(config.device)
    check_precision(config.precision, device)
    data = load(config.data)
    classifier = load_classifier(
        config.model,
        num_classes=len(data.classes),
        shape=data.shape,
        checkpoint=config.checkpoint,
    )
    sigma = _sigma(config, classifier)
    largest = bounds.max_radius(config.n, config.alpha, sigma)
    radii = _radii(config, largest)
    images = data.places(config.every, config.limit, DEFAULT_IMAGES)
    out = config.out or Path("results") / f"{_name(config, sigma)}.tsv"
    with records.ResultFile(out) as file:
        header = _header(config, data, classifier, sigma, images, device, file)
        file.begin(header)
        _certify(file, header, data, prepare(classifier, device, config.precision))
        _report(file, header, radii, largest)


def _check(config: Config) -> None:
    def require(holds: bool, name: str, allowed: str) -> None:
        if not holds:
            value = getattr(config, name.replace("-", "_"))
            raise UserError(f"--{name} is {value}; it must be {allowed}")

    require(config.sigma is None or 0 < config.sigma < math.inf, "sigma", "greater than 0")
    require(0 < config.alpha < 0.5, "alpha", "greater than 0 and less than 0.5")
    for name in ("n0", "n", "every", "limit", "batch-size"):
        value = getattr(config, name.replace("-", "_"))
        require(value is None or value >= 1, name, "at least 1")
    require(config.seed is None or 0 <= config.seed < 2**64, "seed", "in [0, 2^64)")
    least = bounds.least_samples(config.alpha)
    if config.n < least:
        raise UserError(
            f"--n {config.n} is too small for --alpha {config.alpha:g}: nothing could ever be "
            f"certified; use at least --n {least}"
        )


def _sigma(config: Config, classifier: Classifier) -> float:
    sigma = classifier.sigma if config.sigma is None else config.sigma
    if sigma is None:
        raise UserError(
            f"model {config.model} does not say for what noise it was trained; give --sigma"
        )
    return float(sigma)


def _radii(config: Config, largest: float) -> tuple[float, ...]:
    if config.radii is None:
        return tuple(0.25 * step for step in range(math.floor(largest / 0.25) + 1))
    for radius in config.radii:
        if not 0 <= radius <= largest:
            raise UserError(
                f"--radii {radius:g} is out of range: with n = {config.n} and "
                f"alpha = {config.alpha:g} radii go from 0 to {math.floor(largest * 1e4) / 1e4}, "
                "the largest possible"
            )
    return config.radii


def _name(config: Config, sigma: float) -> str:
    """A file name that tells other settings apart, so that each run finds its own file again."""
    parts = ["certify", config.data, config.model, f"sigma{sigma:g}", f"n{config.n}"]
    named = {"data", "model", "sigma", "n", "radii", "device", "out"}
    return cli.run_name(parts, config, named)


def _header(
    config: Config,
    data: ImageDataset,
    classifier: Classifier,
    sigma: float,
    images: list[int],
    device: torch.device,
    file: records.ResultFile,
) -> dict[str, Any]:
    """All settings of the run. Seed and batch size not given are those of the run to continue."""
    earlier = file.header if file.header is not None and file.rows else {}
    seed = config.seed if config.seed is not None else earlier.get("seed", smooth.new_seed())
    batch_size = (
        config.batch_size
        or earlier.get("batch_size")
        or default_batch_size(classifier, device, data.shape)
    )
    return {
        "data": config.data,
        "split": data.split,
        "data_identity": data.identity(),
        "model": config.model,
        "checkpoint": str(config.checkpoint) if config.checkpoint else None,
        "weights_hash": classifier.weights_hash,
        "sigma": sigma,
        "n0": config.n0,
        "n": config.n,
        "alpha": config.alpha,
        "protocol": "cohen",
        "noise": "gaussian",
        "precision": config.precision,
        "device": device.type,
        "batch_size": batch_rows(batch_size, smooth.certify_requests(config.n0, config.n)),
        "seed": seed,
        "images": images,
        "environments": [environment(device)],
    }


class _Rates(ProgressColumn):
    """Images and samples per second of this session."""

    def render(self, task: Task) -> Text:
        samples = task.completed - task.fields["before"]
        if not task.elapsed or not samples:
            return Text("")
        rate = samples / task.elapsed
        return Text(f"{rate / task.fields['per_image']:.2f} images/s, {rate:,.0f} samples/s")


def _certify(
    file: records.ResultFile,
    header: dict[str, Any],
    data: ImageDataset,
    classifier: torch.nn.Module,
) -> None:
    """Certify the images that `file` does not hold yet, one row each."""
    images, done = header["images"], len(file.rows)
    cli.console.print(
        f"{len(images)} images of {data.name} ({data.split}), model {header['model']}, "
        f"sigma {header['sigma']:g}, n {header['n']:,}, alpha {header['alpha']:g}, "
        f"{header['precision']} on {header['device']}, seed {header['seed']}"
        + (f"; {done} done before" if done else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    sampler = Sampler(
        classifier,
        len(data.classes),
        header["sigma"],
        seed=header["seed"],
        dtype=DTYPES[header["precision"]],
    )
    settings = {name: header[name] for name in ("n0", "n", "alpha", "batch_size")}
    same_in_all_rows = ("sigma", "n", "alpha", "protocol", "noise", "precision", "seed", "n0")
    columns = {name: header[name] for name in same_in_all_rows}
    per_image = header["n0"] + header["n"]
    progress = Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.fields[done]}/{task.fields[images]} images"),
        _Rates(),
        TimeRemainingColumn(),
        console=cli.console,
    )
    with progress:
        task = progress.add_task(
            "",
            total=len(images) * per_image,
            completed=done * per_image,
            before=done * per_image,
            per_image=per_image,
            done=done,
            images=len(images),
        )
        for index in images[done:]:
            image, label = data[index]
            start = time.perf_counter()
            try:
                found = smooth.certify(
                    sampler,
                    image,
                    index,
                    **settings,
                    progress=lambda samples: progress.advance(task, samples),
                )
            except torch.OutOfMemoryError:
                raise UserError(
                    f"the device has no memory for {header['batch_size']} rows of this model; "
                    "give a smaller --batch-size"
                ) from None
            row = records.Row(
                idx=index,
                label=label,
                correct=found.predict == label,
                time=time.perf_counter() - start,
                **asdict(found),
                **columns,
            )
            file.append(row)
            progress.update(task, done=len(file.rows))


def _report(
    file: records.ResultFile, header: dict[str, Any], radii: tuple[float, ...], largest: float
) -> None:
    """Table, summary and curve of the finished run, and where everything was written."""
    rows, summary = file.rows, summarise(file.rows)
    picture = file.path.with_suffix(".png")
    title = f"data {header['data']}, model {header['model']}, sigma {header['sigma']:g}"
    try:
        plot_certified_accuracy(rows, picture, title=title, largest=largest)
    except OSError as error:
        raise UserError(f"cannot write {picture}: {error.strerror}; choose another --out") from None
    say = cli.console.print
    say(certified_table(rows, radii))
    say(
        f"average certified radius {summary.average_radius:.3f} (at most {largest:.3f} possible), "
        f"abstained {summary.abstained:.1%}, mean time per image {summary.seconds:.2f} s",
        highlight=False,
        soft_wrap=True,
    )
    if summary.invalid:
        say(
            f"[bold yellow]NaN or infinity[/] in {summary.invalid:,} samples of "
            f"{summary.invalid_images} images: counted as votes for no class",
            highlight=False,
            soft_wrap=True,
        )
    for path in (file.path, records.header_path(file.path), picture):
        say(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    continues = "the same command continues where it stopped"
    cli.run(main, Config, PROG, DESCRIPTION, args, on_interrupt=continues)


if __name__ == "__main__":
    command()
