# SPDX-License-Identifier: Apache-2.0
"""Certified radii of images, from the command line: ``python -m nimfast.certify``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
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
from torch import nn

from nimfast import cli
from nimfast.data import ImageDataset
from nimfast.data import load as load_data
from nimfast.defense import De3
from nimfast.errors import UserError
from nimfast.loading import load as load_model
from nimfast.models.infer import Hints
from nimfast.ops import grid_slack
from nimfast.processes import Place, place
from nimfast.report import certified_table, plot_certified_accuracy, summarise
from nimfast.runtime import DTYPES, check_precision, environment, keep_freed_memory, prepare
from nimfast.smoothing import bounds, run, settings, smooth
from nimfast.smoothing.batch import default_batch_size, fitting_batch_size
from nimfast.smoothing.checks import check_function
from nimfast.smoothing.denoised import Denoised
from nimfast.smoothing.engine import Sampler
from nimfast.smoothing.network import Network
from nimfast.smoothing.records import Row, header_path, read_header
from nimfast.smoothing.result_file import Part, ResultFile, part_path
from nimfast.smoothing.schedule import batch_rows
from nimfast.smoothing.settings import Config

PROG = "python -m nimfast.certify"
DESCRIPTION = (
    "Certify images by randomised smoothing, report certified accuracy. An interrupted run "
    "continues when the same command is repeated; torchrun shares it among processes."
)


def main(config: Config) -> None:
    """Certify what `config` asks for, continuing a run that was interrupted."""
    settings.check(config)
    here = place(config.device)
    check_precision(config.precision, here.device)
    if here.device.type == "cpu":
        keep_freed_memory()
    data = load_data(config.data)
    classifier, sigma = _classifier(config, data)
    largest = bounds.max_radius(config.n, config.alpha, sigma)
    radii = settings.radii(config, sigma, largest)
    out = config.out or Path("results") / f"{settings.file_name(config, sigma)}.tsv"
    model = Network(
        prepare(classifier, here.device, config.precision, packed=not config.compile),
        len(data.classes),
        sigma,
        noise=config.noise,
        dtype=DTYPES[config.precision],
    )
    if not here.main:
        _follow(config, here, out, data, model)
        return
    try:
        file = ResultFile(out)
    except BaseException:
        here.tell("run", "null")
        raise
    with file:
        try:
            header = _header(config, data, classifier, sigma, radii, model, file, here)
            file.begin(header)
        except BaseException:
            here.tell("run", "null")  # the others wait for it
            raise
        left = [index for index in header["images"] if index not in file.done]
        here.tell("run", json.dumps({"header": header, "left": left}))
        _announce(header, data, len(header["images"]) - len(left), here)
        _certify(file, header, left, data, model, here, config.cuda_graphs)
        here.meet("done")
        file.absorb()
        rows = file.finish()
    _report(out, rows, header, radii, largest)


def _follow(config: Config, here: Place, out: Path, data: ImageDataset, model: Network) -> None:
    """What every process but the first does: its share of the images, in a file of its own."""
    told = json.loads(here.hear("run"))
    if told is None:
        sys.exit(2)  # the first process has said why
    header = told["header"]
    found = read_header(out)
    if found is None or found["seed"] != header["seed"]:
        raise UserError(
            f"process {here.rank} does not see the file {header_path(out)} that process 0 wrote; "
            "give an --out in a folder that all machines share"
        )
    if header["compile"]:
        model.compile(data[header["images"][0]][0].to(here.device), header["batch_size"])
    with Part(part_path(out, here.rank)) as part:
        _certify(part, header, told["left"], data, model, here, config.cuda_graphs)
    here.meet("done")


def _classifier(config: Config, data: ImageDataset) -> tuple[nn.Module, float]:
    """The base classifier, and the sigma of the noise that it is smoothed by."""
    model = load_model(
        config.model,
        num_classes=len(data.classes),
        shape=data.shape,
        checkpoint=config.checkpoint,
        hints=Hints(heads=config.heads, mean=config.mean, std=config.std),
    )
    known = getattr(model, "sigma", None)
    if isinstance(model, De3) and known is not None:
        known /= 255
    sigma = known if config.sigma is None else config.sigma
    if sigma is None:
        raise UserError(
            f"model {config.model} does not say for what noise it was trained; give --sigma"
        )
    return (Denoised(model, sigma) if isinstance(model, De3) else model), float(sigma)


def _header(
    config: Config,
    data: ImageDataset,
    classifier: nn.Module,
    sigma: float,
    radii: tuple[float, ...],
    model: Network,
    file: ResultFile,
    here: Place,
) -> dict[str, Any]:
    """All settings of the run. Seed and batch size not given are those of the run to continue."""
    earlier = file.header if file.header is not None and file.done else {}
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
        raise _out_of_memory(batch_size) from None
    if not deterministic:
        warnings.warn(
            f"model {config.model} answers differently when asked twice: a certificate holds only "
            "if the law of its own randomness does not depend on the image, and this run cannot "
            "be repeated",
            stacklevel=2,
        )
    return {**header, "batch_size": rows, "compile": compiled, "deterministic": deterministic}


def _out_of_memory(rows: int | None) -> UserError:
    return UserError(
        f"the device has no memory for {rows or 'any'} rows of this model; "
        "give a smaller --batch-size"
    )


def _announce(header: dict[str, Any], data: ImageDataset, done: int, here: Place) -> None:
    processes = f", {here.size} processes" if here.size > 1 else ""
    cli.console.print(
        f"{len(header['images'])} images of {data.name} ({data.split}), model {header['model']}, "
        f"sigma {header['sigma']:g}, n {header['n']:,}, alpha {header['alpha']:g}, "
        f"protocol {run.protocol_name(header)}, {run.noise_name(header)}, "
        f"{header['precision']} on {header['device']}{processes}, seed {header['seed']}"
        + (f"; {done} done before" if done else "")
        + ("; De3's noise is the smoothing noise" if header["model"].startswith("de3:") else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


class _Rates(ProgressColumn):
    """Images and samples per second of this session, over all processes."""

    def render(self, task: Task) -> Text:
        if not task.elapsed or not task.fields["samples"]:
            return Text("")
        images = (task.completed - task.fields["before"]) / task.elapsed
        return Text(
            f"{images:.2f} images/s, {task.fields['samples'] / task.elapsed:,.0f} samples/s"
        )


def _certify(
    part: Part,
    header: dict[str, Any],
    left: Sequence[int],
    data: ImageDataset,
    model: Network,
    here: Place,
    graphs: bool,
) -> None:
    """Certify this process's share of the images `left`."""
    sampler = Sampler(model, seed=header["seed"], graphs=graphs)
    total, before = len(header["images"]), len(header["images"]) - len(left)
    progress = Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total} images"),
        _Rates(),
        TimeRemainingColumn(),
        console=cli.console,
        disable=not here.main,
    )
    with progress:
        task = progress.add_task("", total=total, completed=before, before=before, samples=0)

        def watch(images: int, samples: int) -> None:
            progress.update(task, completed=before + images, samples=samples)

        try:
            run.certify_images(part, header, left, data, sampler, here, watch)
        except ValueError as error:
            raise UserError(f"model {header['model']} on {header['data']}: {error}") from None
        except torch.OutOfMemoryError:
            raise _out_of_memory(header["batch_size"]) from None


def _report(
    out: Path,
    rows: list[Row],
    header: dict[str, Any],
    radii: tuple[float, ...],
    largest: float,
) -> None:
    """Table, summary and curve of the finished run, and where everything was written."""
    summary = summarise(rows)
    picture = out.with_suffix(".png")
    title = f"data {header['data']}, model {header['model']}, sigma {header['sigma']:g}"
    try:
        plot_certified_accuracy(rows, picture, title=title, largest=largest)
    except OSError as error:
        raise UserError(f"cannot write {picture}: {error.strerror}; choose another --out") from None
    drawn = sum(row.samples or 0 for row in rows)
    say = cli.console.print
    say(certified_table(rows, radii))
    say(
        f"average certified radius {summary.average_radius:.3f} (at most {largest:.3f} possible), "
        f"abstained {summary.abstained:.1%}, mean time per image {_seconds(summary.seconds)}, "
        f"mean samples per image {drawn / len(rows):,.0f}",
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
    for path in (out, header_path(out), picture):
        say(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def command(args: Sequence[str] | None = None) -> NoReturn:
    """The command line, as typed or as `args`; exits."""
    continues = "the same command continues where it stopped"
    cli.run(main, Config, PROG, DESCRIPTION, args, on_interrupt=continues)


if __name__ == "__main__":
    command()
