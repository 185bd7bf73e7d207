# SPDX-License-Identifier: Apache-2.0
"""The options that all training scripts have, and what makes no sense among them."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from nimfast import data as datasets
from nimfast.corruption import Resize, SigmaLaw
from nimfast.data.base import ImageDataset
from nimfast.data.transforms import Augmentation
from nimfast.errors import UserError
from nimfast.models.checkpoint import Header, State, read_checkpoint
from nimfast.models.patches import Shape
from nimfast.models.vit import Architecture, architecture
from train.augment import Affine

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Settings:
    """Fields that all recipes have."""

    data: str
    """digits, cifar10[:DIR], imagefolder:DIR, parquet:GLOB or hf:NAME"""
    out: Path
    """checkpoint to write (safetensors); log and saved states stand beside it"""
    model: str = "base"
    """architecture: nano, tiny, small, base, large, huge or digits"""
    init: Path | None = None
    """checkpoint to start from; architecture and normalisation are its"""
    sigma: str = "0.25"
    """noise level in pixel units: 0.25, uniform(0,0.75), gamma(25,3)/255, 0 for none"""
    epochs: int = 100
    """passes over the training images"""
    batch_size: int = 1024
    """images per step, over all processes"""
    micro_batch: int | None = None
    """images a process handles at once; gradients add up to the batch (default: its share)"""
    lr: float = 5e-4
    """learning rate per `lr_batch` images: the step's is lr * batch_size / lr_batch"""
    lr_batch: int = 256
    """see lr"""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """half a cosine down to min_lr, or a tenth of the rate after each of the milestones"""
    min_lr: float = 0.0
    """where the cosine ends"""
    milestones: tuple[float, ...] = (0.875,)
    """shares of the epochs after which multistep lowers the rate"""
    warmup: float = 5.0
    """epochs of linear warm-up"""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """lars: rates by the ratio of weights to gradient (You et al., 2017), timm's"""
    momentum: float = 0.9
    """of sgd and lars"""
    weight_decay: float = 0.05
    """of everything with two or more dimensions"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's"""
    layer_decay: float = 1.0
    """factor of the learning rate from each block to the one before it"""
    clip: float = 0.0
    """largest norm of the gradient; 0: any"""
    ema: float = 0.0
    """decay of a moving average of the weights, saved beside as .ema.safetensors; 0: none"""
    pictures: Annotated[Augmentation, tyro.conf.arg(name="")] = field(default_factory=Augmentation)
    """random crop, flip and colours"""
    augment: Annotated[Affine, tyro.conf.arg(name="")] = field(default_factory=Affine)
    """random affine maps; where any is given they take the place of crop and flip"""
    resize: int | None = None
    """side in pixels to which noisy images are enlarged (bicubic), as DMAE does with CIFAR-10"""
    antialias: bool = False
    """of --resize; the published runs had none"""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """normalisation, one value per channel"""
    std: tuple[float, ...] = IMAGENET_STD
    """normalisation, one value per channel"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """of matrix products (autocast); weights stay fp32"""
    compile: bool = False
    """translate the network by torch.compile: a minute's wait, then faster steps"""
    shard: bool = False
    """processes share weights, gradients and moments (FSDP2); without, each holds all of them"""
    deterministic: bool = False
    """on CUDA: only algorithms that repeat bit for bit (slower); on a CPU all do"""
    workers: int = 0
    """processes that read images; the batches do not depend on it"""
    threads: int | None = None
    """CPU threads of each process (default: torch's choice)"""
    seed: int = 0
    """of everything random"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:0; with torchrun each process takes its own"""
    save_every: float = 5.0
    """epochs, also parts of one, between saved states"""
    keep: int = 2
    """saved states to keep"""
    resume: bool = False
    """go on from the last saved state; start anew where there is none"""
    tensorboard: bool = False
    """write the log for TensorBoard too"""

    def check(self) -> None:
        """Raise `UserError` for what no run can use."""
        positive = ("epochs", "batch_size", "lr", "lr_batch", "save_every", "keep")
        for name in (*positive, "micro_batch", "threads", "resize"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{option(name)} must be positive, not {getattr(self, name)}")
        for name in ("min_lr", "warmup", "weight_decay", "clip", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{option(name)} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"--seed must lie in [0, 2^64), not {self.seed}")
        if self.warmup >= self.epochs:
            raise UserError(f"--warmup must be less than --epochs {self.epochs}")
        if not all(0 < share < 1 for share in self.milestones):
            raise UserError(f"--milestones are shares of the run, in (0, 1), not {self.milestones}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum must lie in [0, 1), not {self.momentum}; 0.9 is usual")
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema must lie in [0, 1), not {self.ema}; 0.9999 is usual")
        if self.out.suffix != ".safetensors":
            raise UserError(f"--out must end in .safetensors, not {self.out.name!r}")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs it: pip install '.[train]'")
        self.pictures.check()
        SigmaLaw.parse(self.sigma)

    @property
    def crop_and_flip(self) -> Augmentation:
        """What is done to an image as it is read."""
        return self.pictures if self.augment == Affine() else Augmentation()

    @property
    def enlarge(self) -> Resize | None:
        """What ``--resize`` does to noisy images; None: nothing."""
        return Resize((self.resize, self.resize), self.antialias) if self.resize else None

    def image_shape(self, data: ImageDataset) -> tuple[int, int, int]:
        """``(C, H, W)`` of what the network gets to see."""
        return (data.shape[0], self.resize, self.resize) if self.resize else data.shape

    def split_batch(self, processes: int) -> tuple[int, int]:
        """Images of one micro-batch of one process, and how many of them make its part of a step.

        Raises:
            UserError: the batch cannot be reached; names the nearest that can.
        """
        micro = self.micro_batch or max(1, self.batch_size // processes)
        once = micro * processes
        if self.batch_size % once:
            nearest = max(1, round(self.batch_size / once)) * once
            raise UserError(
                f"--batch-size {self.batch_size} cannot be reached by {processes} process"
                f"{'es' * (processes > 1)} with {micro} images at once; the nearest that can is "
                f"--batch-size {nearest}"
            )
        return micro, self.batch_size // once

    def entries(self) -> dict[str, Any]:
        """Name -> value, nothing nested: what headers and saved states hold."""
        plain: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                plain |= value
            else:
                plain[name] = str(value) if isinstance(value, Path) else value
        return plain


S = TypeVar("S", bound=Settings)


def option(name: str) -> str:
    """A field's name as it is typed."""
    return "--" + name.replace("_", "-")


def recipes(kind: type[Settings], table: dict[str, dict[str, Any]]) -> type[Any]:
    """A type for `cli.run`: the first word names the recipe, whose entries become the defaults."""
    return tyro.extras.subcommand_type_from_defaults(
        {
            name: kind(**{"data": tyro.MISSING, "out": tyro.MISSING, **changes})
            for name, changes in table.items()
        }
    )


def load_data(settings: Settings, split: str) -> ImageDataset:
    """The data of `settings`, whose channels must agree with the normalisation."""
    data = datasets.load(settings.data, split)
    if not len(settings.mean) == len(settings.std) == data.shape[0]:
        if settings.init is not None:  # whose normalisation it is
            raise UserError(
                f"--init {settings.init} takes images of {len(settings.mean)} channels and --data "
                f"{settings.data} has {data.shape[0]}; choose such --data, or another --init"
            )
        raise UserError(
            f"--data {settings.data} has {data.shape[0]} channels; give --mean and --std for each"
        )
    if data.on_gpu and settings.workers:
        raise UserError("decode=cuda decodes in the training process itself; give --workers 0")
    if split == "train" and len(data) < settings.batch_size:
        raise UserError(f"--batch-size must be at most {len(data)}, the number of training images")
    return data


def named_architecture(
    settings: Settings, data: ImageDataset, patch: int | None = None
) -> Architecture:
    """The architecture ``--model`` names, for images of this data."""
    try:
        return architecture(settings.model, settings.image_shape(data), patch)
    except ValueError as error:
        raise UserError(f"--model {settings.model} --data {settings.data}: {error}") from None


def adopt(
    settings: S, kinds: tuple[str, ...] = ("autoencoder", "simmim")
) -> tuple[S, State, Header]:
    """Settings with the model and the normalisation of ``--init``, its weights and its header.

    Without ``--init``: the settings as they are, and nothing.

    Raises:
        UserError: the file is none of ours, or of another kind than `kinds`.
    """
    if settings.init is None:
        return settings, {}, {}
    state, header = read_checkpoint(settings.init)
    if header.get("kind") not in kinds:
        raise UserError(
            f"--init {settings.init} is not an {' or '.join(kinds)} of ours; "
            "python -m nimfast.convert makes one of a published file"
        )
    mean, std = tuple(header["mean"]), tuple(header["std"])
    # A converted file has no settings; the architecture is in its header all the same.
    model = header.get("settings", {}).get("model", settings.model)
    return replace(settings, model=model, mean=mean, std=std), state, header


def check_shape(settings: Settings, data: ImageDataset, arch: Shape) -> None:
    """Raise `UserError` unless the network of ``--init`` takes the images of `data`."""
    if (arch.channels, *arch.image_size) != settings.image_shape(data):
        wanted = "x".join(map(str, (arch.channels, *arch.image_size)))
        raise UserError(
            f"--init {settings.init} takes {wanted} images; choose such --data, or give --resize "
            f"{arch.image_size[0]}"
        )
