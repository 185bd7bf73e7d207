# SPDX-License-Identifier: Apache-2.0
"""What a pretrained autoencoder makes of noisy images: the work of `nimfast.reconstruct`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nimfast import cli
from nimfast.corruption import SigmaLaw
from nimfast.data import ImageDataset, load
from nimfast.denoiser import Outcome, Subject, look
from nimfast.errors import UserError
from nimfast.models.checkpoint import (
    Header,
    State,
    build,
    load_weights,
    read_checkpoint,
    weights_hash,
)
from nimfast.models.mae import MAE
from nimfast.models.patches import PatchModel
from nimfast.models.simmim import SimMIM
from nimfast.naming import run_name
from nimfast.report.reconstruction import (
    LABELS,
    finite_psnr,
    plot_grid,
    plot_levels,
    plot_psnr,
)
from nimfast.report.results import Results
from nimfast.restoration import statistics
from nimfast.runtime import DTYPES, check_precision, pick_device, prepare

if TYPE_CHECKING:
    from nimfast.reconstruct import Config

_HOW_TO_MAKE = (
    "python -m train.pretrain digits-demo makes one in two minutes, "
    "python -m train.pretrain dmae --data DATA --out FILE.safetensors a real one"
)


def reconstruct(config: Config) -> None:
    """Write picture, PSNR and curve of what `config` names."""
    device = pick_device(config.device)
    check_precision(config.precision, device)
    if config.model is None:
        raise UserError(f"--model FILE is needed: a pretrained autoencoder; {_HOW_TO_MAKE}")
    state, header = read_checkpoint(config.model)
    data = load(config.data, config.split)
    network = _network(config.model, state, header, data)
    subject = _subject(config, network, header, device)
    sigma = _sigma(config, subject.law)
    out = config.out or Path("results") / _name(config)
    settings = {
        "model": str(config.model),
        "weights_hash": weights_hash(network),
        "data": config.data,
        "split": data.split,
        "data_identity": data.identity(),
        "mask_ratio": subject.mask_ratio,
        "norm_pix": subject.norm_pix,
        "statistics": list(subject.modes),
        "precision": config.precision,
        "device": device.type,
        "seed": config.seed,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        _run(config, subject, data, sigma, out, settings)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another --out") from None
    except torch.OutOfMemoryError:
        raise UserError(
            f"the device has no memory for {config.batch_size} images; give a smaller --batch-size"
        ) from None


def _network(path: Path, state: State, header: Header, data: ImageDataset) -> PatchModel:
    """The autoencoder of a checkpoint, on the CPU; it must take the images of `data`."""
    if not header:
        raise UserError(
            f"{path} does not say what network it is for; a published checkpoint becomes one that "
            f"does by python -m nimfast.convert {path} FILE.safetensors"
        )
    if header["kind"] not in ("autoencoder", "simmim"):
        raise UserError(f"{path} is no autoencoder but a {header['kind']}; {_HOW_TO_MAKE}")
    network = build(header)
    load_weights(network, state, path)
    wanted = (network.arch.channels, *network.arch.image_size)
    if wanted != data.shape:
        raise UserError(
            f"{path} takes {'x'.join(map(str, wanted))} images and {data.name} has "
            f"{'x'.join(map(str, data.shape))}; choose such --data, or add ?size={wanted[1]} to it"
        )
    return network


def _subject(config: Config, network: PatchModel, header: Header, device: torch.device) -> Subject:
    """`network` with what its training settings say, unless `config` says otherwise."""
    trained: dict[str, Any] = header.get("settings", {})

    def choose(name: str, given: Any) -> Any:
        if given is None and name not in trained:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{config.model} does not hold its training's settings; give {option}")
        return trained[name] if given is None else given

    norm_pix = bool(choose("norm_pix", False if isinstance(network, SimMIM) else config.norm_pix))
    modes = statistics(norm_pix)
    if config.stats != "all" and config.stats not in modes:
        predicts = "standardised patches" if norm_pix else "pixels"
        raise UserError(
            f"--stats {config.stats} is not for a model that predicts {predicts}; "
            f"choose {' or '.join(modes)}"
        )
    ratio = float(choose("mask_ratio", config.mask_ratio))
    patch = network.arch.patch
    unit = patch if isinstance(network, MAE) else int(trained.get("mask_unit", 32))
    height, width = network.arch.image_size
    units = (height // unit) * (width // unit)
    if ratio and (height % unit or width % unit or int(units * (1 - ratio)) < 1):
        raise UserError(f"--mask-ratio {ratio} leaves none of {units} patches; give a smaller one")
    return Subject(
        prepare(network, device, config.precision),  # type: ignore[arg-type]
        tuple(header["mean"]),
        tuple(header["std"]),
        norm_pix,
        int(trained.get("p", 1 if isinstance(network, SimMIM) else 2)),
        trained.get("region") == "removed" and ratio > 0,
        SigmaLaw.parse(trained["sigma"]) if "sigma" in trained else None,
        modes if config.stats == "all" else (config.stats,),
        ratio,
        unit,
        device,
        DTYPES[config.precision],
        config.seed,
    )


def _sigma(config: Config, law: SigmaLaw | None) -> float:
    if config.sigma is None:
        if law is None:
            raise UserError(
                f"{config.model} does not say what noise it was trained with; give --sigma 70/255"
            )
        return law.mean
    given = SigmaLaw.parse(config.sigma)
    if given.kind != "fixed":
        raise UserError(f"--sigma {config.sigma} is a law; give one noise level, e.g. 70/255")
    return given.mean


def _name(config: Config) -> str:
    """A folder name that tells other settings apart, so that each run finds its own again."""
    assert config.model is not None
    parts = ["reconstruct", config.data, config.model.stem]
    # What these change is added to a folder, or changes nothing in it.
    named = {"model", "data", "images", "sigmas", "batch_size", "device", "out"}
    return run_name(parts, config, named)


def _run(
    config: Config,
    subject: Subject,
    data: ImageDataset,
    sigma: float,
    out: Path,
    settings: dict[str, Any],
) -> None:
    """Picture, PSNR and curve, each written as soon as there is something of it."""
    title = f"{config.model}, {config.data} ({data.split})"
    level = f"sigma {255 * sigma:g}/255"
    if subject.mask_ratio:
        title += f", {subject.mask_ratio:.0%} masked"
    say = partial(cli.console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"{title}: {level}, statistics {', '.join(subject.modes)}, on {subject.device}")
    places = spread(len(data), config.limit)
    # All are opened before the first is written: a folder of another run stays as it is.
    pictures = Results(out / "images.json", {**settings, "sigma": sigma})
    at_sigma = Results(out / "psnr.json", {**settings, "sigma": sigma, "images": places})
    curve = Results(out / "levels.json", {**settings, "images": places})
    _picture(subject, data, sigma, config.images, pictures, f"{title}, {level}")

    levels = [value for value in config.sigmas if value not in curve.column("sigma")]
    left = len(places) - len(at_sigma.rows)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f} images, {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=cli.console,
    )
    with progress:
        task = progress.add_task("", total=left + len(levels) * len(places), rate="")

        def batches(level: float, places: list[int]) -> Iterator[tuple[list[int], Outcome]]:
            progress.update(task, description=f"sigma {255 * level:g}/255")
            for start in range(0, len(places), config.batch_size):
                part = places[start : start + config.batch_size]
                images = torch.stack([data[index][0] for index in part])
                yield part, look(subject, images, torch.tensor(part), level)
                speed = progress.tasks[0].speed
                progress.update(task, advance=len(part), rate=f"{speed or 0:,.0f} images/s")

        for part, outcome in batches(sigma, places[len(at_sigma.rows) :]):
            for row, index in enumerate(part):
                values = {name: _finite(v[row]) for name, v in outcome.psnr.items()}
                at_sigma.rows.append({"image": index, "loss": outcome.loss[row], "psnr": values})
            at_sigma.write()
        plot_psnr(at_sigma.rows, out / "psnr.png", f"{title}, {level}")

        for value in levels:
            found = [outcome for _, outcome in batches(value / 255, places)]
            names = found[0].psnr
            curve.rows.append(
                {
                    "sigma": value,
                    "loss": _moments([v for outcome in found for v in outcome.loss]),
                    "psnr": {
                        name: _moments([v for outcome in found for v in outcome.psnr[name]])
                        for name in names
                    },
                }
            )
            curve.rows.sort(key=lambda row: row["sigma"])
            curve.write()
            plot_levels(curve.rows, subject.law, out / "levels.png", title)
    cli.console.print(_table(at_sigma, level))
    for name in ("images", "psnr", "levels"):
        say(f"wrote {out / name}.png and .json")


def _picture(
    subject: Subject,
    data: ImageDataset,
    sigma: float,
    count: int,
    results: Results,
    title: str,
) -> None:
    """Original, corrupted image and reconstructions, one row for each image."""
    places = spread(len(data), count)
    pairs = [data[index] for index in places]
    images = torch.stack([image for image, _ in pairs])
    outcome = look(subject, images, torch.tensor(places), sigma)
    columns = {"original": images, "corrupted": outcome.shown}
    captions = {"original": [data.classes[label][:24] for _, label in pairs]}
    for mode, pixels in outcome.pictures.items():
        heading = LABELS[f"stats_{mode}"]
        columns[heading] = pixels
        captions[heading] = [f"{value:.1f} dB" for value in outcome.psnr[f"stats_{mode}"]]
    captions["corrupted"] = [
        f"{value:.1f} dB" if math.isfinite(value) else "" for value in outcome.psnr["noisy"]
    ]
    plot_grid(columns, captions, results.path.with_suffix(".png"), title)
    results.rows = [
        {
            "image": index,
            "label": label,
            "loss": outcome.loss[row],
            "psnr": {name: _finite(values[row]) for name, values in outcome.psnr.items()},
        }
        for row, (index, (_, label)) in enumerate(zip(places, pairs, strict=True))
    ]
    results.write()


def spread(length: int, count: int) -> list[int]:
    """Places of at most `count` images, spread evenly over `length`."""
    count = min(count, length)
    return [place * length // count for place in range(count)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _moments(values: list[float]) -> tuple[float, float] | None:
    """Mean and standard deviation over images; None where infinite (PSNR of an equal image)."""
    if not all(map(math.isfinite, values)):
        return None
    return float(np.mean(values)), float(np.std(values))


def _table(results: Results, level: str) -> Table:
    table = Table(title=f"PSNR over {len(results.rows)} images, {level}")
    table.add_column("")
    table.add_column("dB", justify="right", style="bold")
    table.add_column("standard deviation", justify="right", style="dim")
    for name, values in finite_psnr(results.rows).items():
        table.add_row(LABELS[name], f"{np.mean(values):.2f}", f"{np.std(values):.2f}")
    return table
