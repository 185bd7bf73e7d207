# SPDX-License-Identifier: Apache-2.0
"""Certification runs side by side: what each file holds, and the tables over several of them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.special import ndtr

from nimfast.errors import UserError
from nimfast.report.table import certified_accuracy, summarise
from nimfast.smoothing.bounds import ABSTAIN
from nimfast.smoothing.records import Row, read, read_header
from nimfast.smoothing.settings import GRID_PROTOCOLS

# Radii of the tables of both papers: CIFAR-10 in quarters up to 1, ImageNet 0.5 to 3.
PAPER_RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)

_CSV_COLUMNS = (
    *("number", "run", "images", "sigma", "protocol", "n", "alpha"),
    *("radius", "certified", "low", "high", "known"),
)
_SIGMA_IN_NAME = re.compile(r"sigma[_-]?(\d+(?:\.\d+)?)")
_NAME_LENGTH = 60


@dataclass(frozen=True)
class Run:
    """A result file.

    Attributes:
        number: of its line in the tables, from 1.
        name: that tells it from the other runs of a report.
        path: of the file.
        rows: one per image.
        header: of a file of ours; empty for one with six columns only.
        sigma: of the noise, pixel units of [0, 1]: from the rows, else from the file's name; None
            where neither says.
    """

    number: int
    name: str
    path: Path
    rows: list[Row]
    header: dict[str, Any]
    sigma: float | None

    @property
    def images(self) -> frozenset[tuple[int, int]]:
        """Indices and labels: runs over the same images can be compared image by image."""
        return frozenset((row.idx, row.label) for row in self.rows)

    @property
    def targets(self) -> tuple[float, ...] | None:
        """Radii, increasing, that a sequential protocol was asked for; None where any can result.

        A certificate of such a protocol is one of these radii, however much farther the image would
        have gone.
        """
        radii = self.header.get("radii")  # None for protocols that select a class, by whatever name
        return tuple(radii) if radii else None

    def tests(self, radius: float) -> bool:
        """Whether certified accuracy at `radius` is known, and not only bounded from below.

        Certificates that `nimfast.recertify` carried over lie just below the targets of the run
        before.
        """
        return self.targets is None or (radius in self.targets and "before" not in self.header)

    def beyond(self, radius: float) -> bool:
        """Whether `radius` lies beyond everything the run was asked for."""
        return self.targets is not None and radius > self.targets[-1]

    def lower_bounds(self) -> np.ndarray:
        """Lower bound of p_A of every image of which it is known, in [0, 1].

        A file with six columns only says it of the images that were certified, by their radius.
        """
        given = [row.p_lower for row in self.rows if row.p_lower is not None]
        if given or self.sigma is None:
            return np.array(given, dtype=float)
        certified = [row.radius for row in self.rows if row.predict != ABSTAIN]
        return np.asarray(ndtr(np.array(certified) / self.sigma), dtype=float)


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in `paths`, in that order.

    Raises:
        UserError: a file that is none, is empty or holds an image twice.
    """
    names = _short_names(paths)
    return [_load(i, path, names[i - 1]) for i, path in enumerate(paths, start=1)]


def _load(number: int, path: Path, name: str) -> Run:
    rows = read(path)
    if not rows:
        raise UserError(f"{path} holds no image yet; give it when the run has begun")
    seen: set[int] = set()
    for row in rows:
        if row.idx in seen:
            raise UserError(f"{path} holds image {row.idx} twice; keep one of its rows")
        seen.add(row.idx)
    header = (read_header(path) if rows[0].n is not None else None) or {}
    sigmas = {row.sigma for row in rows}
    if len(sigmas) > 1:
        raise UserError(f"{path} mixes several sigma; keep one file for each")
    (sigma,) = sigmas
    if sigma is None and (found := _SIGMA_IN_NAME.findall(path.stem)):
        sigma = float(found[-1])
    return Run(number, name, path, rows, header, sigma)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """File names, and as much of the folders before them as tells equal ones apart."""
    names: list[str] = []
    for depth in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join([*path.parts[-depth:-1], path.stem]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [n if len(n) <= _NAME_LENGTH else "..." + n[3 - _NAME_LENGTH :] for n in names]


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs over the same images together, in the order of their first."""
    found: dict[frozenset[tuple[int, int]], list[Run]] = {}
    for run in runs:
        found.setdefault(run.images, []).append(run)
    return list(found.values())


def radii_reached(runs: Sequence[Run]) -> tuple[float, ...]:
    """The papers' radii, as far as any image of `runs` was certified."""
    reached = max((row.radius for run in runs for row in run.rows), default=0.0)
    return tuple(radius for radius in PAPER_RADII if radius <= reached) or (0.0,)


def accuracy_table(runs: Sequence[Run], radii: Sequence[float]) -> Table:
    """Certified accuracy in %, with 95% intervals: a line for each run, a column for each radius.

    Where there are several, the last line is the best of them at each radius, and whose it is. What
    a sequential run was not asked for is a bound (>=), or left out beyond its last radius.

    Args:
        runs: over the same images.
        radii: in pixel units of [0, 1].
    """
    table = Table(title=_heading(runs), caption="in %, with its 95% interval over images")
    for heading, justify in (("#", "right"), ("run", "left"), ("sigma", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for radius in radii:
        table.add_column(f"r = {radius:g}", justify="right")
    shares = np.array([certified_accuracy(run.rows, radii) for run in runs])  # [runs, 3, R]
    for run, ends in zip(runs, shares, strict=True):
        cells = [
            _known(run, radius, f"{100 * share:.1f} ({100 * low:.1f}-{100 * high:.1f})")
            for radius, (share, low, high) in zip(radii, ends.T, strict=True)
        ]
        table.add_row(str(run.number), run.name, _number(run.sigma), *cells)
    if len(runs) > 1:
        cells = []
        for radius, at_radius in zip(radii, shares[:, 0].T, strict=True):
            best = int(at_radius.argmax())
            who = f" ({_who(runs, runs[best])})" if at_radius[best] > 0 else ""
            bound = "" if runs[best].tests(radius) or not who else ">= "
            cells.append(f"{bound}{100 * at_radius[best]:.1f}{who}")
        table.add_row("", "best", "", *cells)
    return table


def narrow_table(runs: Sequence[Run], radii: Sequence[float]) -> Table:
    """The same for a terminal: a line for each radius, a column for each run, the best with a *."""
    table = Table(title=_heading(runs), caption="in %")
    table.add_column("radius", justify="right")
    for run in runs:
        sigma = "" if run.sigma is None else f" sigma {run.sigma:g}"
        table.add_column(f"#{run.number}{sigma}", justify="right")
    shares = np.array([certified_accuracy(run.rows, radii)[0] for run in runs])  # [runs, R]
    for radius, at_radius in zip(radii, shares.T, strict=True):
        best = max(at_radius) if len(runs) > 1 and max(at_radius) > 0 else None
        cells = [
            _known(run, radius, f"{100 * share:.1f}{'*' if share == best else ' '}")
            for run, share in zip(runs, at_radius, strict=True)
        ]
        table.add_row(f"{radius:g}", *cells)
    return table


def accuracy_csv(runs: Sequence[Run], radii: Sequence[float]) -> str:
    """Certified accuracy for further use: a line for each run and radius, numbers only.

    Shares are in [0, 1], `low` and `high` their 95% interval over images. `known` is ``=``, or
    ``>=`` where a sequential run was not asked for the radius; beyond its last there is no line.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for run in runs:
        first = run.rows[0]
        settings = (run.number, run.name, len(run.rows), run.sigma, first.protocol, first.n)
        for radius, *shares in zip(radii, *certified_accuracy(run.rows, radii), strict=True):
            if not run.beyond(radius):
                known = "=" if run.tests(radius) else ">="
                numbers = [round(float(share), 6) for share in shares]
                writer.writerow([*settings, first.alpha, radius, *numbers, known])
    return text.getvalue()


def _known(run: Run, radius: float, text: str) -> str:
    """The cell `text` of `run` at `radius`, as far as the run knows it."""
    if run.tests(radius):
        return text
    return "-" if run.beyond(radius) else f">= {text}"


def _heading(runs: Sequence[Run]) -> str:
    return f"Certified accuracy over {len(runs[0].rows)} images"


def _who(runs: Sequence[Run], one: Run) -> str:
    """What names a run within a cell: its sigma, where no other run has it, else its number."""
    alone = one.sigma is not None and sum(run.sigma == one.sigma for run in runs) == 1
    return f"sigma {one.sigma:g}" if alone else f"#{one.number}"


# What of `runs_table` a terminal of 80 columns has room for, beside names.
_NARROW = ("ACR", "abstained", "samples/image", "s/image")


def runs_table(runs: Sequence[Run], narrow: bool = False) -> Table:
    """What each run was, found and cost: a line for each. What no file says is left out.

    `narrow`: what it found and cost, for a terminal.
    """
    lines = []
    for run in runs:
        summary, first = summarise(run.rows), run.rows[0]
        radii = np.array([row.radius * row.correct for row in run.rows])
        half = 1.96 * radii.std(ddof=1) / len(radii) ** 0.5 if len(radii) > 1 else 0.0
        samples = [row.samples for row in run.rows if row.samples is not None]
        lines.append(
            {
                "protocol": first.protocol or "",
                "noise": first.noise or "",
                "images": str(summary.images),
                "sigma": _number(run.sigma),
                "n": "" if first.n is None else f"{first.n:,}",
                "alpha": _number(first.alpha),
                "ACR": f"{summary.average_radius:.3f} +- {half:.3f}",
                "abstained": f"{summary.abstained:.1%}",
                "samples/image": f"{np.mean(samples):,.0f}" if samples else "",
                "s/image": f"{summary.seconds:.3g}",
            }
        )
    known = [
        heading
        for heading in (_NARROW if narrow else lines[0])
        if any(line[heading] for line in lines)
    ]
    table = Table(title="Runs", caption="ACR: average certified radius, with its 95% interval")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("run", overflow="fold")
    for heading in known:
        words = heading in ("protocol", "noise")
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words)
    for run, line in zip(runs, lines, strict=True):
        table.add_row(str(run.number), run.name, *(line[heading] for heading in known))
    return table


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the tables must know of the files."""
    found = []
    for run in runs:
        if run.rows[0].sigma is None:
            source = "is that in its name" if run.sigma is not None else "is not known"
            found.append(f"{run.name}: six columns only; sigma {source}")
        elif not run.header and (run.rows[0].protocol or "").startswith(GRID_PROTOCOLS):
            found.append(
                f"{run.name}: no header beside it, so the radii it was asked for are not known; "
                "between them its accuracy is a lower bound"
            )
        wanted = run.header.get("images", [])
        if len(wanted) > len(run.rows):
            found.append(f"{run.name}: {len(run.rows)} of {len(wanted)} images, not finished")
        if slack := run.header.get("slack"):
            found.append(
                f"{run.name}: noise on the 8-bit grid, its distance from the normal law (slack "
                f"{slack:.2g}) taken off every bound"
            )
        summary = summarise(run.rows)
        if summary.invalid:
            found.append(
                f"{run.name}: NaN or infinity in {summary.invalid:,} samples of "
                f"{summary.invalid_images} images, votes for no class"
            )
    if any(run.targets for run in runs):
        found.append(
            "a sequential protocol certifies the radii it was asked for: accuracy between them is "
            "a lower bound (>=), beyond them it is not known (-); ACR is a lower bound too"
        )
    if len(groups(runs)) > 1:
        found.append("the runs are not over the same images: those that are share a table")
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
