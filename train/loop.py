# SPDX-License-Identifier: Apache-2.0
"""What every training script shares: data order, optimiser, schedule, step, log and checkpoint."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nimfast import cli, runtime
from nimfast import data as datasets
from nimfast.corruption import Purpose, SigmaLaw, uniform
from nimfast.data.base import ImageDataset
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, save_checkpoint
from nimfast.models.vit import Architecture, Encoder, architecture
from train.augment import Affine

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Settings:
    """Fields that all recipes have."""

    data: str
    """digits, cifar10[:DIR], imagefolder:DIR, parquet:GLOB or hf:NAME"""
    out: Path
    """checkpoint to write (safetensors); the log stands beside it as .jsonl"""
    model: str = "base"
    """architecture: tiny, small, base, large, huge or digits"""
    sigma: str = "0.25"
    """noise level in pixel units: 0.25, uniform(0,0.75), gamma(25,3)/255, 0 for none"""
    epochs: int = 100
    """passes over the training images"""
    batch_size: int = 1024
    """images per step"""
    lr: float = 5e-4
    """learning rate per 256 images: the step's is lr * batch_size / 256"""
    min_lr: float = 0.0
    """where the cosine ends"""
    warmup: float = 5.0
    """epochs of linear warm-up"""
    weight_decay: float = 0.05
    """of everything with two or more dimensions"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's"""
    layer_decay: float = 1.0
    """factor of the learning rate from each block to the one before it"""
    augment: Annotated[Affine, tyro.conf.arg(name="")] = field(default_factory=Affine)
    """random affine maps"""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """normalisation, one value per channel"""
    std: tuple[float, ...] = IMAGENET_STD
    """normalisation, one value per channel"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """of matrix products (autocast); weights stay fp32"""
    workers: int = 0
    """processes that read images; the batches do not depend on it"""
    seed: int = 0
    """of everything random"""
    device: str = "auto"
    """auto, cpu or cuda:0"""

    def check(self) -> None:
        """Raise `UserError` for what no run can use."""
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} must be positive, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed must lie in [0, 2^64), not {self.seed}")
        if not 0 <= self.warmup < self.epochs:
            raise UserError(f"--warmup must be less than --epochs {self.epochs}")
        if self.out.suffix != ".safetensors":
            raise UserError(f"--out must end in .safetensors, not {self.out.name!r}")
        if self.out.exists():
            raise UserError(f"{self.out} exists; remove it or choose another --out")
        SigmaLaw.parse(self.sigma)


def recipes(kind: type[Settings], table: dict[str, dict[str, Any]]) -> type[Any]:
    """A type for `cli.run`: the first word names the recipe, whose entries become the defaults."""
    return tyro.extras.subcommand_type_from_defaults(
        {
            name: kind(**{"data": tyro.MISSING, "out": tyro.MISSING, **changes})
            for name, changes in table.items()
        }
    )


class Batch(NamedTuple):
    """Images ``[B, C, H, W]`` in [0, 1], augmented; labels and places in the data set, ``[B]``."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class _Indexed(Dataset[tuple[Tensor, int, int]]):
    def __init__(self, data: ImageDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return *self.data[index], index


def load_data(settings: Settings, split: str) -> ImageDataset:
    """The data of `settings`, whose channels must agree with the normalisation."""
    data = datasets.load(settings.data, split)
    if not len(settings.mean) == len(settings.std) == data.shape[0]:
        raise UserError(
            f"--data {settings.data} has {data.shape[0]} channels; give --mean and --std for each"
        )
    if split == "train" and len(data) < settings.batch_size:
        raise UserError(f"--batch-size must be at most {len(data)}, the number of training images")
    return data


def named_architecture(
    settings: Settings, data: ImageDataset, patch: int | None = None
) -> Architecture:
    """The architecture ``--model`` names, for images of this data."""
    try:
        return architecture(settings.model, data.shape, patch)
    except ValueError as error:
        raise UserError(f"--model {settings.model} --data {settings.data}: {error}") from None


def batches(
    data: ImageDataset, settings: Settings, epoch: int, device: torch.device
) -> Iterator[Batch]:
    """One epoch of full batches, in an order drawn from (seed, epoch)."""
    draws = uniform(settings.seed, Purpose.ORDER, torch.arange(len(data)), 1, epoch)[:, 0]
    loader = DataLoader(
        _Indexed(data),
        batch_size=settings.batch_size,
        sampler=draws.argsort(stable=True).tolist(),
        num_workers=settings.workers,
        drop_last=True,
    )
    for images, labels, indices in loader:
        images, indices = images.to(device), indices.to(device)
        images = settings.augment(images, indices, epoch, settings.seed)
        yield Batch(images, labels.to(device), indices)


def cosine(progress: float, epochs: float, warmup: float, lr: float, min_lr: float) -> float:
    """Learning rate at `progress` (epochs and fractions): linear warm-up, then half a cosine."""
    if progress < warmup:
        return lr * progress / warmup
    done = (progress - warmup) / (epochs - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(
    model: Encoder, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups: `scale` is layer_decay to the number of blocks above (head 0, embedding most).

    Parameters with fewer than two dimensions, and learned tokens, have no weight decay.
    """
    top = model.arch.depth + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        if first in ("patch_embed", "cls_token"):
            layer = 0
        else:
            layer = int(rest.split(".")[0]) + 1 if first == "blocks" else top
        decays = parameter.ndim > 1 and not name.endswith("_token")
        groups.setdefault((layer, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "scale": layer_decay ** (top - layer),
        }
        for (layer, decays), parameters in groups.items()
    ]


class Run:
    """One training run: optimiser, schedule, progress bar, log and the final checkpoint.

    Use as a context manager; call `step` once per batch, `end_epoch` after each epoch and `save` at
    the end.
    """

    def __init__(self, model: Encoder, settings: Settings, images: int) -> None:
        self.settings = settings
        self.device = runtime.pick_device(settings.device)
        self.model = model.to(self.device).train()
        self.steps_per_epoch = images // settings.batch_size
        self.steps = 0
        groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)
        self.losses: list[Tensor] = []
        self.started = time.monotonic()
        self.log_path = settings.out.with_suffix(".jsonl")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=cli.console,
        )
        self.task = self.progress.add_task(
            settings.out.stem, total=settings.epochs * self.steps_per_epoch, rate=""
        )

    def __enter__(self) -> Run:
        try:
            self.settings.out.parent.mkdir(parents=True, exist_ok=True)
            self.log_path.write_text("")
        except OSError as error:
            where = self.settings.out.parent
            raise UserError(f"cannot write to {where} ({error.strerror})") from None
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def autocast(self) -> torch.autocast:
        """Half precision for what runs inside, where the settings ask for it."""
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def step(self, loss: Tensor) -> None:
        """One optimiser step along `loss`, with the learning rate of this very step."""
        s = self.settings
        peak = s.lr * s.batch_size / 256
        rate = cosine(self.steps / self.steps_per_epoch, s.epochs, s.warmup, peak, s.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())  # read once per epoch, so no step waits for the device
        self.steps += 1
        speed = self.steps * s.batch_size / (time.monotonic() - self.started)
        self.progress.update(self.task, advance=1, rate=f"{speed:,.0f} images/s")

    def end_epoch(self, epoch: int, **measured: float) -> None:
        """Log the epoch's mean loss and whatever else was measured.

        Raises:
            UserError: the loss is not a finite number.
        """
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        if not math.isfinite(loss):
            raise UserError(f"the loss became {loss} in epoch {epoch}; lower --lr")
        seconds = round(time.monotonic() - self.started, 1)
        row = {"epoch": epoch, "loss": loss, **measured, "seconds": seconds}
        with open(self.log_path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if measured:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in measured.items())
            self.progress.console.print(f"epoch {epoch:4d}  loss {loss:.4f}  {shown}")

    def save(self, script: str, data: ImageDataset, **entries: Any) -> None:
        """Write the checkpoint; its header repeats settings, command and the data's identity."""
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self.settings).items()
        }
        header: Header = {
            "mean": self.settings.mean,
            "std": self.settings.std,
            "classes": data.classes,
            "data": {"name": data.name, "split": data.split, "identity": data.identity()},
            "command": shlex.join(["python", "-m", script, *sys.argv[1:]]),
            "seed": self.settings.seed,
            "settings": settings,
            **entries,
        }
        save_checkpoint(self.settings.out, self.model, header)
        cli.console.print(f"wrote {self.settings.out} and {self.log_path}")
