# SPDX-License-Identifier: Apache-2.0
"""Certified radii of images: the work of ``python -m nimfast.certify``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nimfast import cli
from nimfast.commands.certification import (
    base_classifier,
    fill,
    out_of_memory,
    report,
    sample,
    sharing,
)
from nimfast.corruption import warn_if_units_look_wrong
from nimfast.data import ImageDataset
from nimfast.data import load as load_data
from nimfast.errors import UserError
from nimfast.ops import grid_slack
from nimfast.options import Hints
from nimfast.processes import Place, place
from nimfast.runtime import DTYPES, check_precision, environment, keep_freed_memory, prepare
from nimfast.smoothing import bounds, run, settings, smooth
from nimfast.smoothing.batch import default_batch_size, fitting_batch_size
from nimfast.smoothing.checks import check_function
from nimfast.smoothing.engine import Sampler
from nimfast.smoothing.network import Network
from nimfast.smoothing.protocols import Judge, Request
from nimfast.smoothing.result_file import Part
from nimfast.smoothing.schedule import batch_rows
from nimfast.smoothing.settings import Config


def certify(config: Config) -> None:
    """Certify what `config` asks for, continuing a run that was interrupted."""
    here = place(config.device)
    check_precision(config.precision, here.device)
    if here.device.type == "cpu":
        keep_freed_memory()
    _warn(config, here)
    data = load_data(config.data)
    hints = Hints(heads=config.heads, mean=config.mean, std=config.std)
    classifier, sigma = base_classifier(
        config.model, data, checkpoint=config.checkpoint, hints=hints, sigma=config.sigma
    )
    n, alpha = config.n, config.alpha
    _, of_two = bounds.top2(n, 0, n, alpha, sigma)
    largest = of_two if config.top2 else bounds.max_radius(n, alpha, sigma)
    radii = settings.radii(config, sigma, largest)
    out = config.out or Path("results") / f"{settings.file_name(config, sigma)}.tsv"
    network = Network(
        prepare(classifier, here.device, config.precision, packed=not config.compile),
        len(data.classes),
        sigma,
        noise=config.noise,
        dtype=DTYPES[config.precision],
    )

    def describe(earlier: Mapping[str, Any]) -> dict[str, Any]:
        return _header(config, data, classifier, sigma, radii, network, earlier, here)

    def begin(part: Part, header: dict[str, Any]) -> None:
        _announce(header, data, len(part.done), here)

    def work(part: Part, header: dict[str, Any], left: Sequence[int]) -> None:
        if header["compile"] and not here.main:  # the first has, to write the header
            network.compile(data[header["images"][0]][0].to(here.device), header["batch_size"])
        sampler = Sampler(network, seed=header["seed"], graphs=config.cuda_graphs)
        most = run.most_requests(header)

        def ask(index: int, label: int) -> tuple[Judge, list[Request]]:
            return run.make_judge(header, label, len(data.classes)), most

        sample(part, header, left, data, sampler, here, ask)

    if done := fill(out, here, describe=describe, begin=begin, work=work):
        header, rows = done
        report(out, rows, header, radii, largest)


def _warn(config: Config, here: Place) -> None:
    """Say which options do nothing, and which value may be another than was meant."""
    if config.sigma is not None:
        warn_if_units_look_wrong(config.sigma, 1)
    if config.cuda_graphs and here.device.type != "cuda":
        warnings.warn(f"--cuda-graphs does nothing on {here.device.type}", stacklevel=2)
    if config.n0 != Config.n0 and config.protocol not in settings.SELECTING:
        warnings.warn(
            f"--n0 does nothing with --protocol {config.protocol}, which selects no class by "
            "samples of their own",
            stacklevel=2,
        )


def _header(
    config: Config,
    data: ImageDataset,
    classifier: nn.Module,
    sigma: float,
    radii: tuple[float, ...],
    model: Network,
    earlier: Mapping[str, Any],
    here: Place,
) -> dict[str, Any]:
    """All settings of the run. Seed and batch size not given are those of the run to continue."""
    seed = config.seed if config.seed is not None else earlier.get("seed", smooth.new_seed())
    selects = config.protocol in settings.SELECTING
    images = settings.images(config, data)
    header = {
        "data": config.data,
        "split": data.split,
        "data_identity": data.identity(),
        "model": config.model,
        "checkpoint": str(config.checkpoint) if config.checkpoint else None,
        "weights_hash": classifier.weights_hash,
        "sigma": sigma,
        "protocol": config.protocol,
        "label_free": config.label_free,
        "top2": config.top2,
        "n0": config.n0 if selects else 0,
        "n": config.n,
        "alpha": config.alpha,
        "radii": None if selects else list(radii),
        "noise": config.noise,
        "slack": None,  # Gaussian noise is taken as exact
        "precision": config.precision,
        "device": here.device.type,
        "seed": seed,
        "images": images,
        "environments": [{**environment(here.device), "processes": here.size}],
    }
    try:
        if config.noise == "grid":
            header["slack"] = grid_slack(data.shape, sigma)
        run.make_judge(header, 0, len(data.classes))
        image = data[images[0]][0].to(here.device)
        batch_size = config.batch_size or earlier.get("batch_size")
        if batch_size is None:
            batch_size = default_batch_size(classifier, here.device, data.shape)
            if here.device.type == "cuda":
                batch_size = fitting_batch_size(model, image, batch_size)
        rows = batch_rows(batch_size, run.most_requests(header))
        deterministic = check_function(model, image, rows)
        compiled = config.compile and model.compile(image, rows)
    except ValueError as error:
        raise UserError(f"model {config.model} on {config.data}: {error}") from None
    except torch.OutOfMemoryError:
        raise out_of_memory(batch_size) from None
    if not deterministic:
        warnings.warn(
            f"model {config.model} answers differently when asked twice: a certificate holds only "
            "if the law of its own randomness does not depend on the image, and this run cannot "
            "be repeated",
            stacklevel=2,
        )
    return {**header, "batch_size": rows, "compile": compiled, "deterministic": deterministic}


def _announce(header: dict[str, Any], data: ImageDataset, done: int, here: Place) -> None:
    cli.console.print(
        f"{len(header['images'])} images of {data.name} ({data.split}), model {header['model']}, "
        f"sigma {header['sigma']:g}, n {header['n']:,}, alpha {header['alpha']:g}, "
        f"protocol {run.protocol_name(header)}, {run.noise_name(header)}, "
        f"{header['precision']} on {header['device']}{sharing(here)}, seed {header['seed']}"
        + (f"; {done} done before" if done else "")
        + ("; De3's noise is the smoothing noise" if header["model"].startswith("de3:") else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
