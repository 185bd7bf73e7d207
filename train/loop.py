# SPDX-License-Identifier: Apache-2.0
"""The loop that all training scripts share: steps, epochs, log and saved states.

A run is a function of its settings: data order, noise, masks and drop path are drawn from the seed
and the number of the epoch or step. So it can stop anywhere and go on, in any number of processes.
"""

from __future__ import annotations

import copy
import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nimfast import cli
from nimfast.data.base import ImageDataset
from nimfast.data.transforms import Skipped
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header
from nimfast.models.patches import PatchModel
from train.cpu import speed_up
from train.feed import Batch, batches, in_order
from train.log import Log
from train.optim import Optimizer, learning_rate
from train.parallel import World, join
from train.settings import Settings
from train.sharding import Shards
from train.state import States, describe_run

# Steps between looks at the device's numbers. Each look makes the host wait for the device, which
# on CUDA costs the few milliseconds for which the host had run ahead.
_LOOK = {"cpu": 1, "cuda": 50}

ON_INTERRUPT = "the same command with --resume goes on from the last saved state"


class Run:
    """One training run, as a context manager.

    Loop over `epochs` and `batches`, send images through `network` under `autocast`, call `step`
    with each micro-batch's mean loss, `end_epoch` after each epoch and `finish` at the end.

    Args:
        model: what is trained; its weights are in the checkpoint.
        settings: see `Settings`.
        data: training images.
        script: how ``python -m`` calls this run.
        entries: of the checkpoint's header, besides the usual ones.

    Attributes:
        network: `model` as it has to be called: compiled, averaging gradients over processes.
        world: the processes.
        device: this process's.
    """

    def __init__(
        self, model: PatchModel, settings: Settings, data: ImageDataset, script: str, **entries: Any
    ) -> None:
        self.settings, self.data, self.script, self.entries = settings, data, script, entries
        self.states = States(settings.out, settings.keep)
        self.states.check(settings.resume)
        self.world: World = join(settings.device)
        self.device = self.world.device
        _, self.parts = settings.split_batch(self.world.size)
        self.steps_per_epoch = len(data) // settings.batch_size
        self.steps = self.part = 0
        # Of the images this process was to read: those trained on first, then held-out ones.
        self.broken = [Skipped(data)]
        self.complete = False  # whether an earlier run did everything
        self.shards: list[Shards] = []  # of model and average, where processes share them
        self.best: dict[str, Any] | None = None  # see keep_best
        if settings.deterministic and self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it said
            torch.use_deterministic_algorithms(True)
        self.model = model.to(self.device).train()
        speed_up(model, self.device, settings.precision)
        self.average = copy.deepcopy(model).requires_grad_(False) if settings.ema else None
        self.shared = settings.shard and self.world.size > 1
        if settings.compile and not self.shared:  # else `Shards` compiles
            model.compile()
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)  # sum over the epoch
        self.counted = torch.zeros((), dtype=torch.float64, device=self.device)  # steps in it
        self.pending = torch.zeros((), device=self.device)  # sum over the step's parts
        self.before = 0.0  # seconds of the runs that this one continues
        self.started = self.told = time.monotonic()
        self.told_steps = 0
        total = settings.epochs * self.steps_per_epoch
        self.log = Log(
            settings.out.with_suffix(".jsonl"), total, self.world.main, settings.tensorboard
        )

    def __enter__(self) -> Run:
        self.threads = torch.get_num_threads()  # as they were
        torch.set_num_threads(self.settings.threads or self.threads)
        state = self._load() if self.settings.resume else None
        if self.shared:
            self.shards = [Shards(self.model, self.settings.compile)]
            if self.average is not None:
                self.shards.append(Shards(self.average))
            self.network: nn.Module = self.model
        else:
            self.network = self.world.wrap(self.model)
        self.optimizer = Optimizer(self.model, self.settings, self.device, self.average)
        if state:
            self.optimizer.load(state["optimizer"])
        if not self.finished:
            self.log.open(self.epoch, self.steps)
            if self.world.main:
                self.states.sweep()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.log.close()
        torch.set_num_threads(self.threads)
        if error is None:  # else the others may be waiting, and leaving would wait for them
            self.world.leave()
        if isinstance(error, torch.OutOfMemoryError):
            micro, _parts = self.settings.split_batch(self.world.size)
            way = "lower --micro-batch, which leaves the batch as it is"
            if micro == 1:
                way = "choose a smaller --model, or let processes share it by --shard"
            raise UserError(
                f"{self.device} has not enough memory for {micro} images at once; {way}"
            ) from None

    @property
    def epoch(self) -> int:
        """The epoch of the next step."""
        return self.steps // self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether every step has been made."""
        return self.epoch >= self.settings.epochs

    def epochs(self) -> Iterator[int]:
        """Numbers of the epochs still to do, the first of them perhaps in part."""
        self.feed = batches(self.data, self.settings, self.world, self.broken[0], self.steps)
        self.told, self.told_steps = time.monotonic(), self.steps
        yield from range(self.epoch, self.settings.epochs)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """This process's micro-batches in what remains of `epoch`."""
        steps = (epoch + 1) * self.steps_per_epoch - self.steps
        for number, batch in enumerate(itertools.islice(self.feed, steps * self.parts)):
            self.part = number % self.parts
            if self.part == 0:
                self._seed()
            if isinstance(self.network, DistributedDataParallel):
                # Gradients travel once per step, with the last part.
                self.network.require_backward_grad_sync = self.part == self.parts - 1
            yield batch

    def in_order(self, data: ImageDataset, size: int) -> Iterator[Batch]:
        """This process's part of the held-out `data`, in batches of at most `size`.

        Broken images are left out, counted and named at the end.
        """
        if all(broken.data is not data for broken in self.broken):
            self.broken.append(Skipped(data))
        broken = next(broken for broken in self.broken if broken.data is data)
        return in_order(data, size, self.world, broken)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, `model` is in eval mode and may be called as often as each process likes."""
        with ExitStack() as stack:
            for shards in self.shards:
                stack.enter_context(shards.gathered())
            self.model.eval()
            yield
        self.model.train()

    def autocast(self) -> torch.autocast:
        """Half precision for what runs inside, where the settings ask for it."""
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def step(self, loss: Tensor) -> None:
        """Go down along `loss`, the mean over one micro-batch; the last one of a step moves."""
        # All parts of all processes have as many images, so a mean of means is the batch's mean.
        torch.autograd.backward(loss / self.parts)
        self.pending += loss.detach().float() / self.parts
        if self.part < self.parts - 1:
            return
        progress = self.steps / self.steps_per_epoch
        bad = self.optimizer.step(learning_rate(self.settings, progress))
        self.loss += torch.where(bad, 0.0, self.pending)
        self.counted += bad.logical_not()
        self.steps += 1
        self.log.advance()
        if self.steps % _LOOK.get(self.device.type, 50) == 0:
            self.optimizer.skipped()
            self.log.show(self.pending.item(), self.settings.batch_size)
        self.pending = torch.zeros_like(self.pending)
        if self.steps % self.steps_per_epoch and self._due():
            self._save()

    def end_epoch(self, epoch: int, **measured: float) -> None:
        """Log the epoch's mean loss and whatever else was measured; save when it is time.

        Raises:
            UserError: too many gradients in a row were not finite, or the disk is full.
        """
        skipped = self.optimizer.skipped()
        total, counted = self.world.total(torch.stack([self.loss, self.counted])).tolist()
        self.loss.zero_()
        self.counted.zero_()
        now = time.monotonic()
        images = (self.steps - self.told_steps) * self.settings.batch_size
        row = {
            "epoch": epoch,
            "loss": total / counted if counted else None,
            **measured,
            "lr": learning_rate(self.settings, epoch + 1),
            "skipped": skipped,
            "images_per_s": round(images / (now - self.told), 1),
            "seconds": round(self._seconds(), 1),
        }
        self.told, self.told_steps = now, self.steps
        self.log.write(row, measured)
        if not self.finished and self._due():
            self._save()

    def keep_best(self, epoch: int, measured: dict[str, float], by: str) -> None:
        """Keep the weights as they are now if ``measured[by]`` is the largest so far.

        `finish` then writes these, and not the last. Call it before `end_epoch`.
        """
        if self.best is None or measured[by] > self.best[by]:
            self.best = {"epoch": epoch, **measured}
            model, average = self._whole()
            if self.world.main:
                self.states.save_best(model, average, self._header())

    def finish(self, **entries: Any) -> None:
        """Write the checkpoint, with `entries` in its header besides those of the constructor.

        Its weights are those that `keep_best` kept, if it was called, else the last.
        """
        out = self.settings.out
        if self.complete:
            if self.world.main:
                cli.console.print(f"{out} is finished already; nothing to do")
            return
        self.entries |= entries
        self._save(final=True)
        if self.world.main:
            self.states.drop_best()
        for broken in self.broken:
            for line in broken.report():
                cli.console.print(line, markup=False)
        if self.world.main:
            cli.console.print(f"wrote {out} and {self.log.path}")

    def _seed(self) -> None:
        # What torch itself draws (drop path) depends on step and process alone, so a state need not
        # hold any generator's.
        words = np.random.SeedSequence([self.settings.seed, self.steps, self.world.rank])
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def _due(self) -> bool:
        """Whether a state has to be saved after the step just made."""
        every = max(1, round(self.settings.save_every * self.steps_per_epoch))
        return self.steps % every == 0

    @cached_property
    def identity(self) -> str:
        """Of the data; computed once, since it may list a million files."""
        return self.data.identity()

    def _described(self) -> dict[str, Any]:
        return describe_run(self.script, self.settings, self.identity)

    def _load(self) -> Any:
        """The newest state, its weights and counts taken over; None where there is none."""
        state = self.states.load(self.model, self.average, self._described())
        self.steps = state["steps"] if state else 0
        if not self.world.agree(self.steps):
            raise UserError(
                f"not all machines see the same states at {self.settings.out.parent}; "
                "put --out into a folder that they share"
            )
        if state:
            self.before, self.best = state["seconds"], state["best"]
            if self.world.main:  # sums over all processes: one of them has to hold them
                self.loss.fill_(state["loss"])
                self.counted.fill_(state["counted"])
                if not self.finished:
                    done = f"{self.steps} of {self.settings.epochs * self.steps_per_epoch} steps"
                    cli.console.print(f"going on after {done}")
        self.complete = self.finished
        return state

    def _whole(self) -> tuple[PatchModel, nn.Module | None]:
        """Model and average as files hold them; all processes have to ask together."""
        if not self.shards:
            return self.model, self.average
        model, *average = (shards.whole(self.world.main) for shards in self.shards)
        return model, average[0] if average else None

    def _save(self, final: bool = False) -> None:
        """Write a state; with `final` the checkpoint that the run was for, of its best epoch."""
        self.optimizer.skipped()  # raises before a state of a failed run is written
        loss, counted = self.world.total(torch.stack([self.loss, self.counted])).tolist()
        model, average = self._whole()
        optimizer = self.optimizer.state()
        if not self.world.main:
            return
        if final and self.best:
            self.states.load_best(model, average)
        state = {
            "run": self._described(),
            "steps": self.steps,
            "seconds": self._seconds(),
            "loss": loss,
            "counted": counted,
            "best": self.best,
            "optimizer": optimizer,
        }
        self.states.save(model, average, self._header(), state, final)

    def _header(self) -> Header:
        """Of every checkpoint of this run."""
        s = self.settings
        resize = {"resize": asdict(s.enlarge)} if s.enlarge else {}
        epochs_done = self.steps / self.steps_per_epoch
        if self.best and self.finished:
            epochs_done = self.best["epoch"] + 1
        return {
            "mean": s.mean,
            "std": s.std,
            "classes": self.data.classes,
            "data": {
                "name": self.data.name,
                "split": self.data.split,
                "identity": self.identity,
            },
            "command": shlex.join(["python", "-m", self.script, *sys.argv[1:]]),
            "seed": s.seed,
            "settings": s.entries(),
            "epochs_done": epochs_done,
            **resize,
            **self.entries,
        }
