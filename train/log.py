# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it goes: progress bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nimfast import cli
from nimfast.errors import UserError
from nimfast.files import replacing

_CALM = 1.0  # seconds between changes of the figures beside the bar
_QUIET = 30.0  # seconds between lines where no bar can be drawn


class Log:
    """Progress bar and log files of one run; silent in all processes but one.

    Args:
        path: the JSON lines; TensorBoard's files go into the folder with its name and no suffix.
        steps: of the whole run.
        main: whether this process tells anything.
        tensorboard: whether it writes for TensorBoard.
    """

    def __init__(self, path: Path, steps: int, main: bool, tensorboard: bool) -> None:
        self.path, self.main = path, main
        self.tensorboard = tensorboard and main
        self.writer: Any = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=cli.console,
            disable=not main,
        )
        self.task = self.progress.add_task(path.stem, total=steps, rate="", loss="")
        self.printed = self.marked = time.monotonic()
        self.steps = self.marked_steps = 0

    def open(self, epoch: int, steps: int) -> None:
        """Start with `epoch`, after `steps`: rows of it and later ones, told before, are dropped.

        Raises:
            UserError: the folder or the file cannot be written.
        """
        if not self.main:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            told = self.path.read_text().splitlines() if epoch and self.path.exists() else []
            # A killed run may leave half a line.
            rows = [
                line for line in told if line.endswith("}") and json.loads(line)["epoch"] < epoch
            ]
            with replacing(self.path) as file:
                file.write("".join(row + "\n" for row in rows).encode())
        except OSError as error:
            raise UserError(f"cannot write to {self.path.parent} ({error.strerror})") from None
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.path.with_suffix("")), purge_step=epoch)
        self.steps = self.marked_steps = steps
        self.progress.update(self.task, completed=steps)
        self.progress.start()

    def close(self) -> None:
        """Take the bar away and close the files."""
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def advance(self) -> None:
        """One step more."""
        self.steps += 1
        self.progress.update(self.task, advance=1)

    def show(self, loss: float, batch: int) -> None:
        """Show the loss, and the images/s since the last time."""
        now = time.monotonic()
        if now - self.marked < _CALM:
            return
        speed = (self.steps - self.marked_steps) * batch / (now - self.marked)
        self.marked, self.marked_steps = now, self.steps
        self.progress.update(self.task, rate=f"{speed:,.0f} images/s", loss=f"loss {loss:.4f}")

    def write(self, row: dict[str, Any], measured: dict[str, float]) -> None:
        """Write the row of an epoch; print it where something was measured.

        Raises:
            UserError: the disk is full.
        """
        if not self.main:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); make room") from None
        if self.writer is not None:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self.writer.add_scalar(name, value, row["epoch"])
        now = time.monotonic()
        hidden = not self.progress.console.is_terminal and now - self.printed > _QUIET
        if measured or hidden:
            shown = "".join(f"  {name} {value:.3f}" for name, value in measured.items())
            loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
            self.progress.console.print(f"epoch {row['epoch']:4d}  loss {loss}{shown}")
            self.printed = now
