# SPDX-License-Identifier: Apache-2.0
"""What the commands that certify share: one result file by many processes, progress, the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from nimfast.defense import De3
from nimfast.errors import UserError
from nimfast.loading import load as load_model
from nimfast.options import Hints
from nimfast.processes import Place
from nimfast.report import certified_table, summarise
from nimfast.smoothing import parquet, run
from nimfast.smoothing.denoised import Denoised
from nimfast.smoothing.engine import Sampler
from nimfast.smoothing.records import Row, header_path, read_header, write_parquet
from nimfast.smoothing.result_file import Part, ResultFile, part_path
from nimfast.smoothing.settings import GRID_PROTOCOLS


def base_classifier(
    name: str,
    data: ImageDataset,
    *,
    checkpoint: Path | None = None,
    hints: Hints | None = None,
    sigma: float | None = None,
) -> tuple[nn.Module, float]:
    """The classifier that ``--model`` names, and the sigma of the noise that it is smoothed by.

    Args:
        name: see ``python -m nimfast.certify --help``.
        data: whose images it classifies.
        checkpoint: weights instead of its own.
        hints: what a published file leaves out.
        sigma: of the noise, pixel units of [0, 1]; None: that of the model's training.

    Raises:
        UserError: no such model, or one that does not say for what noise it was trained.
    """
    model = load_model(
        name,
        num_classes=len(data.classes),
        shape=data.shape,
        checkpoint=checkpoint,
        hints=hints or Hints(),
    )
    if sigma is None:
        sigma = getattr(model, "sigma", None)
        if isinstance(model, De3) and sigma is not None:
            sigma /= 255
    if sigma is None:
        raise UserError(f"model {name} does not say for what noise it was trained; give --sigma")
    return (Denoised(model, sigma) if isinstance(model, De3) else model), float(sigma)


def sharing(here: Place) -> str:
    """Of how many processes this is one, for the line that announces a run; empty if alone."""
    return f", {here.size} processes" if here.size > 1 else ""


def fill(
    out: Path,
    here: Place,
    *,
    describe: Callable[[Mapping[str, Any]], dict[str, Any]],
    begin: Callable[[Part, dict[str, Any]], None],
    work: Callable[[Part, dict[str, Any], Sequence[int]], None],
) -> tuple[dict[str, Any], list[Row]] | None:
    """Make the result file `out`, or continue it, by the processes of this run together.

    Args:
        out: the result file; of a Parquet file the rows stand in a TSV beside it until all are
            there, and stay there for a repeated command.
        here: this process.
        describe: header of the run, from that of the unfinished run in the file (empty without).
        begin: what the first process does before any image is handed out; may append rows.
        work: certify this process's share of the images that it is given, into its part.

    Returns:
        Header and rows, of the first process; None, of the others.

    Raises:
        UserError: as `ResultFile`, or a process that does not see the file.
    """
    target, out = out, out.with_suffix(".tsv") if out.suffix == parquet.SUFFIX else out
    if target != out:
        parquet.pyarrow(target)  # rather than after the work
    if not here.main:
        told = json.loads(here.hear("run"))
        if told is None:
            sys.exit(2)  # the first process has said why
        header = told["header"]
        found = read_header(out)
        if found is None or found["seed"] != header["seed"]:
            raise UserError(
                f"process {here.rank} does not see the file {header_path(out)} that process 0 "
                "wrote; give an --out in a folder that all machines share"
            )
        with Part(part_path(out, here.rank)) as part:
            work(part, header, told["left"])
        here.meet("done")
        return None
    try:
        file = ResultFile(out)
    except BaseException:
        here.tell("run", "null")  # the others wait for it
        raise
    with file:
        try:
            header = describe(file.header if file.header is not None and file.done else {})
            file.begin(header)
            begin(file, header)
        except BaseException:
            here.tell("run", "null")
            raise
        left = [index for index in header["images"] if index not in file.done]
        here.tell("run", json.dumps({"header": header, "left": left}))
        work(file, header, left)
        here.meet("done")
        file.absorb()
        rows = file.finish()
        if target != out:
            write_parquet(target, rows, header)
        return header, rows


def sample(
    part: Part,
    header: Mapping[str, Any],
    left: Sequence[int],
    data: ImageDataset,
    sampler: Sampler,
    here: Place,
    ask: run.Ask,
) -> None:
    """Certify this process's share of the images `left`, under a progress bar.

    Args: as `run.certify_images`.

    Raises:
        UserError: an image or a model that does not go, memory that does not suffice.
    """
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
            run.certify_images(part, header, left, data, sampler, here, ask, watch)
        except ValueError as error:
            raise UserError(f"model {header['model']} on {header['data']}: {error}") from None
        except torch.OutOfMemoryError:
            raise out_of_memory(header["batch_size"]) from None


def out_of_memory(rows: int | None) -> UserError:
    """What to say where a batch of `rows` rows does not fit."""
    return UserError(
        f"the device has no memory for {rows or 'any'} rows of this model; "
        "give a smaller --batch-size"
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


def report(
    out: Path,
    rows: list[Row],
    header: Mapping[str, Any],
    radii: Sequence[float],
    largest: float,
) -> None:
    """Table, summary and curve of a finished run, and where everything was written.

    Args:
        out: the result file.
        rows: what it holds.
        header: of the run.
        radii: of the table.
        largest: the largest radius that its samples could certify.

    Raises:
        UserError: the picture cannot be written.
    """
    of = "possible"
    if header["protocol"] in GRID_PROTOCOLS:  # however far an image would go, these are all
        largest, of = header["radii"][-1], "asked for"
    # Here: matplotlib takes half a second, which the first sample need not wait for.
    from nimfast.report import plot_certified_accuracy

    summary = summarise(rows)
    picture = out.with_suffix(".png")
    title = f"data {header['data']}, model {header['model']}, sigma {header['sigma']:g}"
    try:
        plot_certified_accuracy(rows, picture, title=title, largest=largest, of=of)
    except OSError as error:
        raise UserError(f"cannot write {picture}: {error.strerror}; choose another --out") from None
    drawn = sum(row.samples or 0 for row in rows)
    say = cli.console.print
    say(certified_table(rows, radii))
    say(
        f"average certified radius {summary.average_radius:.3f} (at most {largest:.3f} {of}), "
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
